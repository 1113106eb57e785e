-- Requests for wrk: one of the shared prefixes in turn, and a tail that no request before had.
--
--   wrk ... -s load.lua URL -- FOLDER HOST FIRST
--
-- FOLDER holds `heads` (a line each: the JSON body up to the tail), `phrases` (lines of one length) and `foot`. FIRST
-- is the number of the first request; a number is used once. All costs here are the same whoever is asked: a request
-- is one concatenation.

local heads, phrases, foot = {}, {}, ""
local number, state = 0, 1
local PHRASES = 0

local function lines(path)
   local all = {}
   for line in io.lines(path) do
      all[#all + 1] = line
   end
   return all
end

function init(args)
   local folder, host = args[1], args[2]
   number = tonumber(args[3])
   state = number % 2147483646 + 1
   phrases = lines(folder .. "/phrases")
   foot = lines(folder .. "/foot")[1]
   PHRASES = tonumber(lines(folder .. "/count")[1])
   local tail = 10 + PHRASES * #phrases[1]
   for i, head in ipairs(lines(folder .. "/heads")) do
      heads[i] = "POST /v1/completions HTTP/1.1\r\nHost: " .. host
         .. "\r\nContent-Type: application/json\r\nContent-Length: " .. (#head + tail + #foot) .. "\r\n\r\n" .. head
   end
end

local function pick(list)
   -- Park and Miller's generator: exact in a double.
   state = state * 48271 % 2147483647
   return list[state % #list + 1]
end

function request()
   local head = heads[number % #heads + 1]
   number = number + 1
   local count = string.format(" %09d", number)
   if PHRASES == 1 then
      return head .. count .. pick(phrases) .. foot
   end
   return head .. count .. pick(phrases) .. pick(phrases) .. pick(phrases) .. pick(phrases) .. foot
end

function done(summary, latency)
   local errors = summary.errors
   io.write(string.format(
      '{"requests":%d,"microseconds":%d,"refused":%d,"broken":%d,"p50_us":%d,"p99_us":%d}\n',
      summary.requests, summary.duration, errors.status,
      errors.connect + errors.read + errors.write + errors.timeout,
      latency:percentile(50), latency:percentile(99)))
end
