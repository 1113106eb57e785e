//! Prices the parts of plans, and puts them together.
//!
//! What a plan costs is the sum of what depends on the prefill engine alone, on the decode engine alone, and on the link
//! between them. Each part is computed once for an engine, whatever the number of plans it is in.

use super::overlap;
use super::{MOST_SECOND_COPY_SECONDS, Plan, Priced, ROOM, SHARERS, SPREAD, Slo, Term, Terms};
use crate::fleet::{Fleet, Hot};
use crate::links::{AtLeast, Queued, TransferSeconds};
use crate::load::{Loads, Reserved};
use crate::speed::CHUNK_TOKENS;

/// Context assumed of a sequence that is not ours, where none of ours runs beside it.
const FOREIGN_CONTEXT_TOKENS: f64 = 1024.0;

/// What depends on the engine that computes the prompt.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PrefillCost {
    pub(crate) queue: f64,
    pub(crate) mixed: f64,
    pub(crate) stall: f64,
    pub(crate) second_copy: f64,
    /// Of those that decode there.
    pub(crate) slo_risk: f64,
    pub(crate) sums: PrefillSums,
}

/// As much of it as plans are compared by.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PrefillSums {
    pub(crate) prefill: f64,
    /// For how long before its end KV can leave.
    pub(crate) early: f64,
    /// The request's own: `queue + mixed + prefill`.
    pub(crate) own: f64,
    /// All: `own + stall + second_copy + slo_risk`.
    pub(crate) seconds: f64,
}

/// What a pull adds before the prefill, in seconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Fetch {
    /// Until the source's turn to hold the blocks has come.
    pub(crate) queue: f64,
    /// What holding them takes it.
    pub(crate) hold: f64,
    /// The transfer.
    pub(crate) way: TransferSeconds,
}

/// What depends on the engine that answers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DecodeCost {
    /// Of a handoff only.
    pub(crate) queue: f64,
    pub(crate) room: f64,
    /// Of a handoff only.
    pub(crate) first_step: f64,
    /// Of a handoff only.
    pub(crate) second_copy: f64,
    pub(crate) decode: f64,
    pub(crate) batch: f64,
    pub(crate) itl: f64,
    /// Of those that decode there.
    pub(crate) slo_risk: f64,
    pub(crate) sums: DecodeSums,
}

/// As much of it as plans are compared by.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DecodeSums {
    /// Of any plan: `room + decode + batch + slo_risk`.
    pub(crate) seconds: f64,
    /// Of any plan: until its KV finds room.
    pub(crate) room: f64,
    /// Of a handoff: to the first token, without the transfer.
    pub(crate) handoff_own: f64,
    /// Of a handoff: all, without the transfer.
    pub(crate) handoff_seconds: f64,
    /// How likely its ITL is missed: where the engine computes its prompt too.
    pub(crate) itl_risk: f64,
    /// The same, of a handoff.
    pub(crate) handoff_itl_risk: f64,
}

/// What a handoff to an engine moves at least.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moving {
    pub(crate) bytes: f64,
    /// One by its tokens; infinite where none move.
    of_tokens: f64,
    /// Seconds that no handoff is predicted to show less than, waiting included.
    pub(crate) least: f64,
}

/// What its end of the links makes of handoffs from an engine, waiting included.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sender {
    host: u32,
    /// To other hosts, and to its own, for each byte; of what is queued, as much as the prefill does not hide.
    ways: [AtLeast; 2],
    /// Tokens that go alone; infinite where all do.
    chunk_tokens: f64,
}

impl Sender {
    /// No handoff of so much to this host is predicted to show less.
    #[inline]
    pub(crate) fn at_least(&self, moving: &Moving, host: u32) -> f64 {
        let way = &self.ways[usize::from(host == self.host)];
        let (seconds, last) =
            (way.bytes * moving.bytes, overlap::last_share(self.chunk_tokens, moving.of_tokens));
        (way.behind + seconds).max(way.round_trips + last * seconds)
    }
}

/// By what plans compare.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Key {
    pub(crate) seconds: f64,
    /// To the first token.
    pub(crate) ttft: f64,
}

impl Key {
    pub(crate) fn order(&self, other: &Key) -> std::cmp::Ordering {
        self.seconds.total_cmp(&other.seconds)
    }
}

/// What the cost of a request depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pricing<'a> {
    pub(crate) fleet: &'a Fleet,
    pub(crate) loads: &'a Loads,
    /// Leading blocks that each engine of the fleet holds.
    pub(crate) held: &'a [u32],
    pub(crate) prompt_tokens: u64,
    /// How long answers of the model are.
    answer_tokens: f64,
    /// How long this one will be: as others, but no longer than it may.
    output_tokens: f64,
    pub(crate) slo: Slo,
    /// What is promised to a request, in seconds.
    pub(crate) promised: f64,
    /// The most prompt tokens that an engine holds which may take part.
    pub(crate) longest_hit: u64,
    /// Of the block size of the fleet's first engine, which most fleets have everywhere.
    blocks: Blocks,
}

/// A prompt in blocks of a size.
#[derive(Clone, Copy, Debug)]
struct Blocks {
    size: u32,
    /// Whole blocks before its last token.
    usable: u64,
    /// All, a partial one included.
    all: u64,
}

impl Blocks {
    #[inline]
    fn of(prompt_tokens: u64, size: u32) -> Self {
        let tokens = u64::from(size);
        Self { size, usable: prompt_tokens.saturating_sub(1) / tokens, all: prompt_tokens.div_ceil(tokens) }
    }
}

impl<'a> Pricing<'a> {
    /// Of a request with this many tokens, of which no engine is known to hold any. It may generate `max_tokens`, and answers have
    /// `answer_tokens` on average.
    pub(crate) fn new(
        fleet: &'a Fleet,
        loads: &'a Loads,
        held: &'a [u32],
        prompt_tokens: u64,
        (answer_tokens, max_tokens): (f64, Option<u64>),
        slo: Slo,
    ) -> Self {
        let blocks = Blocks::of(prompt_tokens, fleet.hot().first().map_or(1, |hot| hot.block_size));
        let output_tokens = max_tokens.map_or(answer_tokens, |most| answer_tokens.min(most as f64)).max(1.0);
        let promised = slo.ttft_seconds.unwrap_or(0.0) + answer_tokens * slo.itl_seconds.unwrap_or(0.0);
        Self {
            fleet,
            loads,
            held,
            prompt_tokens,
            answer_tokens,
            output_tokens,
            slo,
            promised,
            longest_hit: 0,
            blocks,
        }
    }

    /// Divisions are slow, and there would be some for each engine.
    #[inline]
    fn blocks(&self, size: u32) -> Blocks {
        if size == self.blocks.size { self.blocks } else { Blocks::of(self.prompt_tokens, size) }
    }

    #[inline]
    pub(crate) fn hot(&self, at: u32) -> &'a Hot {
        &self.fleet.hot()[at as usize]
    }

    /// Leading blocks that the engine can use. It always computes the last token, so of a prompt that it holds
    /// wholly it uses one block less.
    #[inline]
    pub(crate) fn usable_blocks(&self, at: u32) -> u64 {
        u64::from(self.held[at as usize]).min(self.blocks(self.hot(at).block_size).usable)
    }

    /// Prompt tokens that the engine need not compute.
    #[inline]
    pub(crate) fn hit_tokens(&self, at: u32) -> u64 {
        self.usable_blocks(at) * u64::from(self.hot(at).block_size)
    }

    /// Prices the prefill on an engine of what it does not hold.
    #[inline(always)]
    pub(crate) fn prefill(&self, at: u32) -> PrefillCost {
        let cached = self.hit_tokens(at);
        let cost = self.computing(at, self.prompt_tokens - cached, cached);
        self.with_second_copy(at, cached, cost)
    }

    /// Prices the prefill behind so many tokens, those of them that it does not hold being fetched before.
    #[inline]
    pub(crate) fn prefill_behind(&self, at: u32, cached: u64, fetch: &Fetch) -> PrefillCost {
        let cost = self.computing(at, self.prompt_tokens - cached, cached);
        let mut cost = self.with_second_copy(at, cached, cost);
        let fetched = cost.queue.max(fetch.queue + fetch.hold) + fetch.way.wait + fetch.way.transfer;
        let added = fetched - cost.queue;
        cost.queue = cost.queue.max(fetch.queue);
        let displaced = self.displaced(at, cached.saturating_sub(self.hit_tokens(at)));
        cost.second_copy += displaced;
        cost.sums.own += added;
        cost.sums.seconds += added + displaced;
        cost
    }

    /// What it costs those to come that so many tokens of KV which another engine has, too, take room on this one: a part of what they
    /// displace is computed again, beside what decodes here now.
    #[inline]
    fn displaced(&self, at: u32, tokens: u64) -> f64 {
        let hot = self.hot(at);
        if hot.reused == 0.0 || tokens == 0 {
            return 0.0;
        }
        let reserved = &self.loads.engines[at as usize];
        let (sequences, context) = decoding(hot, reserved);
        let others = sequences + reserved.prefills as f64 + f64::from(hot.foreign_waiting);
        let computing = hot.reused * tokens as f64 * hot.speed.token_seconds;
        let mut seconds = computing * (1.0 + others);
        if sequences > 0.0 && self.slo.itl_seconds.is_some() {
            let itl = hot.speed.decode_step_seconds(sequences, context) / (1.0 - hot.prefill_share);
            let risk = |seconds: f64| self.itl_risk(itl + seconds / self.answer_tokens);
            seconds += sequences * self.promised * (risk(computing) - risk(0.0));
        }
        seconds
    }

    /// Until the engine has computed the prompts dispatched to it before.
    #[inline]
    pub(crate) fn queue(&self, at: u32) -> f64 {
        queue_seconds(self.hot(at), &self.loads.engines[at as usize])
    }

    /// What it takes the source of a pull to hold its cached blocks: one token behind them. Without the transfer.
    #[inline]
    pub(crate) fn hold(&self, source: u32) -> Fetch {
        let cost = self.computing(source, 1, self.hit_tokens(source));
        Fetch { queue: cost.queue, hold: cost.mixed + cost.sums.prefill, way: TransferSeconds::default() }
    }

    /// Prices the prefill of so many new tokens behind cached ones.
    #[inline(always)]
    fn computing(&self, at: u32, new: u64, cached: u64) -> PrefillCost {
        let (hot, reserved) = (self.hot(at), &self.loads.engines[at as usize]);
        let (sequences, context) = decoding(hot, reserved);
        let queue = queue_seconds(hot, reserved);
        let prefill = hot.speed.prefill_seconds(new, cached);
        let steps = new.div_ceil(CHUNK_TOKENS) as f64;
        // Each of its steps takes longer than one without it by this.
        let held_up = (prefill - steps * hot.speed.step_seconds).max(0.0);
        let (mut mixed, mut slo_risk) = (0.0, 0.0);
        if sequences > 0.0 {
            let step = hot.speed.decode_step_seconds(sequences, context);
            mixed = steps * hot.speed.mixed_seconds(sequences, context);
            let itl = step / (1.0 - hot.prefill_share);
            let risk = |seconds: f64| self.itl_risk(itl + seconds / self.answer_tokens);
            slo_risk = sequences * self.promised * (risk(queue + held_up) - risk(queue));
        }
        let stall = sequences * held_up;
        let own = queue + mixed + prefill;
        let early = overlap::early_seconds(hot.chunk_tokens, new as f64, prefill);
        let sums = PrefillSums { prefill, early, own, seconds: own + stall + slo_risk };
        PrefillCost { queue, mixed, stall, second_copy: 0.0, slo_risk, sums }
    }

    /// Adds what it costs those to come that the engine computes, behind so many tokens, what another one holds.
    #[inline(always)]
    fn with_second_copy(&self, at: u32, cached: u64, mut cost: PrefillCost) -> PrefillCost {
        let longest = self.longest_hit;
        if cached < longest {
            let speed = &self.hot(at).speed;
            let [here, there] =
                [cached, longest].map(|hit| speed.prefill_seconds(self.prompt_tokens - hit, hit));
            let shared = (SHARERS * (here - there)).clamp(0.0, MOST_SECOND_COPY_SECONDS);
            cost.second_copy = shared + self.displaced(at, longest - cached);
            cost.sums.seconds += cost.second_copy;
        }
        cost
    }

    /// Prices the decode on an engine.
    #[inline(always)]
    pub(crate) fn decode(&self, at: u32) -> DecodeCost {
        let (hot, reserved) = (self.hot(at), &self.loads.engines[at as usize]);
        let (sequences, context) = decoding(hot, reserved);
        let steps = self.output_tokens - 1.0;
        // Half of the output is there on average.
        let own_context = self.prompt_tokens as f64 + self.output_tokens / 2.0;
        let step = hot.speed.decode_step_seconds(sequences + 1.0, context + own_context);
        let running = 1.0 / (1.0 - hot.prefill_share);
        let itl = step * running;
        let decode = steps * itl;
        let added = hot.speed.sequence_seconds + hot.speed.context_seconds * own_context;
        let batch = sequences * steps * added;
        let queue = queue_seconds(hot, reserved);
        let first_step = hot.speed.request_seconds + step;
        // What is queued now comes before the prompt that is computed here, and in the midst of an answer to one that was computed
        // elsewhere. Behind the former as much will queue as comes while it waits.
        let risk = |itl: f64, held_up: f64, tokens: f64| self.itl_risk(itl + held_up / tokens);
        let others =
            risk(itl, queue, self.answer_tokens) - risk(itl - added * running, queue, self.answer_tokens);
        let slo_risk = sequences * self.promised * others;
        let room = self.room(at, itl);
        let seconds = room + decode + batch + slo_risk;
        let second_copy = self.displaced(at, self.handoff_blocks(at) * u64::from(hot.block_size));
        DecodeCost {
            queue,
            room,
            first_step,
            second_copy,
            decode,
            batch,
            itl,
            slo_risk,
            sums: DecodeSums {
                seconds,
                room,
                handoff_own: queue + room + first_step,
                handoff_seconds: queue + first_step + second_copy + seconds,
                itl_risk: risk(itl, hot.prefill_share * queue, self.output_tokens),
                handoff_itl_risk: risk(itl, queue, self.output_tokens),
            },
        }
    }

    /// Until the KV of the prompt finds room: as long as it takes sequences to end that hold as much as is too much. What is in use is what the
    /// engine reported, and what was reserved and released since.
    #[inline]
    fn room(&self, at: u32, itl: f64) -> f64 {
        let hot = self.hot(at);
        let used = self.loads.engines[at as usize].context_tokens as f64 + hot.kv_beyond;
        let over = used + self.prompt_tokens as f64 - ROOM * hot.kv_tokens;
        if over > 0.0 && used > 0.0 { over / used * self.answer_tokens * itl } else { 0.0 }
    }

    /// How likely an ITL that is predicted so will be above the SLO.
    #[inline]
    fn itl_risk(&self, itl: f64) -> f64 {
        self.slo.itl_seconds.map_or(0.0, |slo| risk(itl, slo))
    }

    /// What it costs the request that its SLOs may be missed.
    #[inline]
    pub(crate) fn own_risk(&self, ttft: f64, itl_risk: f64) -> f64 {
        let ttft_risk = self.slo.ttft_seconds.map_or(0.0, |slo| risk(ttft, slo));
        self.promised * (ttft_risk + itl_risk).min(1.0)
    }

    /// Bytes of a handoff: the blocks that the decode engine does not hold.
    #[inline]
    pub(crate) fn handoff_bytes(&self, prefill: u32, decode: u32) -> u64 {
        let block = block_on_its_way(self.hot(prefill), self.hot(decode));
        self.handoff_blocks(decode).saturating_mul(block)
    }

    #[inline]
    fn handoff_blocks(&self, decode: u32) -> u64 {
        let blocks = self.blocks(self.hot(decode).block_size);
        blocks.all.saturating_sub(u64::from(self.held[decode as usize]))
    }

    /// Tokens of the blocks that a handoff to this engine moves.
    #[inline]
    fn handoff_tokens(&self, decode: u32) -> f64 {
        self.handoff_blocks(decode) as f64 * f64::from(self.hot(decode).block_size)
    }

    /// What any handoff to this engine moves and takes at least, where no prefill hides more than `most_early` of it.
    #[inline]
    pub(crate) fn moving(&self, decode: u32, most_early: f64) -> Moving {
        let hot = self.hot(decode);
        let bytes = self.handoff_blocks(decode).saturating_mul(hot.wire_block_bytes.min(hot.block_bytes));
        let links = self.fleet.links();
        let at_least = links.at_least_into(hot.slot, bytes, self.loads.at_host(hot.host));
        let (mut of_tokens, mut least) = (f64::INFINITY, at_least.behind);
        if let Some(chunk) = self.fleet.chunk_tokens() {
            of_tokens = 1.0 / self.handoff_tokens(decode);
            let last = overlap::last_share(f64::from(chunk), of_tokens);
            least = (least - most_early).max(at_least.round_trips + last * at_least.bytes);
        }
        Moving { bytes: bytes as f64, of_tokens, least }
    }

    /// The end of all links out of an engine.
    pub(crate) fn sender(&self, prefill: u32, early: f64) -> Sender {
        let hot = self.hot(prefill);
        let links = self.fleet.links();
        let chunk_tokens = if early > 0.0 { f64::from(hot.chunk_tokens) } else { f64::INFINITY };
        let ways = links.at_least_out_of(hot.slot, self.loads.at_host(hot.host));
        Sender {
            host: hot.host,
            ways: ways.map(|way| AtLeast { behind: way.behind - early, ..way }),
            chunk_tokens,
        }
    }

    /// What a transfer takes behind what is queued.
    #[inline]
    pub(crate) fn transfer(&self, source: u32, destination: u32, bytes: u64) -> TransferSeconds {
        let (from, to) = (self.hot(source), self.hot(destination));
        let queued = Queued {
            link: self.loads.on_link(from.slot, to.slot),
            source: self.loads.at_host(from.host),
            destination: self.loads.at_host(to.host),
        };
        self.fleet.links().transfer(from.slot, to.slot, bytes, queued)
    }

    /// What a handoff's transfer takes, the prefill left out of account.
    #[inline]
    fn handoff_alone(&self, prefill: u32, decode: u32) -> TransferSeconds {
        self.transfer(prefill, decode, self.handoff_bytes(prefill, decode))
    }

    /// As much of it as shows after the prefill; see [`overlap`].
    #[inline]
    fn shown(&self, prefill: u32, decode: u32, way: TransferSeconds, cost: &PrefillSums) -> TransferSeconds {
        if cost.early == 0.0 {
            return way;
        }
        let chunk = f64::from(self.hot(prefill).chunk_tokens);
        let last = overlap::last_share(chunk, 1.0 / self.handoff_tokens(decode));
        overlap::shown(way, cost.early, last)
    }

    /// What a handoff's transfer takes after the prefill.
    #[inline]
    pub(crate) fn handoff(&self, prefill: u32, decode: u32, cost: &PrefillSums) -> TransferSeconds {
        self.shown(prefill, decode, self.handoff_alone(prefill, decode), cost)
    }

    /// A plan on one engine.
    #[inline]
    pub(crate) fn whole_key(&self, prefill: &PrefillSums, decode: &DecodeSums) -> Key {
        self.key(prefill.own + decode.room, decode.itl_risk, prefill.seconds + decode.seconds)
    }

    /// A handoff.
    #[inline]
    pub(crate) fn pair_key(&self, prefill: &PrefillSums, decode: &DecodeSums, way: TransferSeconds) -> Key {
        let moving = way.wait + way.transfer;
        self.key(
            prefill.own + moving + decode.handoff_own,
            decode.handoff_itl_risk,
            prefill.seconds + decode.handoff_seconds + moving,
        )
    }

    #[inline]
    fn key(&self, ttft: f64, itl_risk: f64, seconds: f64) -> Key {
        Key { seconds: seconds + self.own_risk(ttft, itl_risk), ttft }
    }

    /// What a pull moves and leaves to compute, where the source holds more than the engine: tokens that are there
    /// then, and bytes.
    #[inline]
    pub(crate) fn pulled(&self, source: u32, engine: u32) -> Option<(u64, u64)> {
        let (from, to) = (self.hot(source), self.hot(engine));
        let (theirs, ours) = (self.usable_blocks(source), self.usable_blocks(engine));
        if from.block_size != to.block_size || theirs <= ours {
            return None;
        }
        let bytes = (theirs - ours).saturating_mul(block_on_its_way(from, to));
        Some((theirs * u64::from(to.block_size), bytes))
    }

    /// Prices a plan with all its terms.
    pub(crate) fn price(&self, plan: Plan) -> Priced {
        let mut terms = Terms::default();
        let decode = self.decode(plan.decode());
        let (mut hit_tokens, mut transfer_bytes) = (self.hit_tokens(plan.prefill()), 0);
        let (mut itl_risk, mut copied) = (decode.sums.itl_risk, 0.0);
        let (mut transfer_seconds, mut early_seconds) = (0.0, None);
        let (prefill, key) = match plan {
            Plan::Colocated { engine } | Plan::Append { engine } => {
                let prefill = self.prefill(engine);
                (prefill, self.whole_key(&prefill.sums, &decode.sums))
            }
            Plan::Pull { source, engine } => {
                let mut fetch = Fetch::default();
                if let Some((cached, bytes)) = self.pulled(source, engine) {
                    fetch = Fetch { way: self.transfer(source, engine, bytes), ..self.hold(source) };
                    (hit_tokens, transfer_bytes) = (cached, bytes);
                    transfer_seconds = fetch.way.wait + fetch.way.transfer;
                }
                let prefill = self.prefill_behind(engine, hit_tokens, &fetch);
                terms.set(Term::Hold, (fetch.queue + fetch.hold - prefill.queue).max(0.0));
                terms.set(Term::TransferWait, fetch.way.wait);
                terms.set(Term::Transfer, fetch.way.transfer);
                (prefill, self.whole_key(&prefill.sums, &decode.sums))
            }
            Plan::Disaggregated { prefill: from, decode: to } => {
                let prefill = self.prefill(from);
                let alone = self.handoff_alone(from, to);
                let way = self.shown(from, to, alone, &prefill.sums);
                transfer_seconds = alone.wait + alone.transfer;
                early_seconds = (self.hot(from).chunk_tokens > 0).then_some(prefill.sums.early);
                (itl_risk, copied) = (decode.sums.handoff_itl_risk, decode.second_copy);
                transfer_bytes = self.handoff_bytes(from, to);
                terms.set(Term::TransferWait, way.wait);
                terms.set(Term::Transfer, way.transfer);
                terms.set(Term::DecodeQueueWait, decode.queue);
                terms.set(Term::FirstStep, decode.first_step);
                (prefill, self.pair_key(&prefill.sums, &decode.sums, way))
            }
        };
        terms.set(Term::QueueWait, prefill.queue);
        terms.set(Term::RoomWait, decode.room);
        terms.set(Term::MixedSteps, prefill.mixed);
        terms.set(Term::Prefill, prefill.sums.prefill);
        terms.set(Term::DecodeStall, prefill.stall);
        terms.set(Term::SecondCopy, prefill.second_copy + copied);
        terms.set(Term::Decode, decode.decode);
        terms.set(Term::DecodeBatch, decode.batch);
        let own_risk = self.own_risk(key.ttft, itl_risk);
        terms.set(Term::SloRisk, prefill.slo_risk + decode.slo_risk + own_risk);
        let over = |predicted: f64, slo: Option<f64>| slo.map_or(0.0, |slo| (predicted - slo).max(0.0));
        let late_rest = (self.output_tokens - 1.0) * over(decode.itl, self.slo.itl_seconds);
        Priced {
            plan,
            terms,
            seconds: key.seconds,
            ttft_seconds: key.ttft,
            itl_seconds: decode.itl,
            late_seconds: over(key.ttft, self.slo.ttft_seconds) + late_rest,
            hit_tokens,
            uncached_tokens: self.prompt_tokens - hit_tokens,
            transfer_bytes,
            transfer_seconds,
            early_seconds,
            prefill_seconds: prefill.sums.prefill,
        }
    }
}

/// How likely what is predicted will be above what is promised: it may turn out up to [`SPREAD`] of the promise higher or lower,
/// anything between being as likely.
#[inline]
fn risk(predicted: f64, promised: f64) -> f64 {
    ((predicted / promised - (1.0 - SPREAD)) / (2.0 * SPREAD)).clamp(0.0, 1.0)
}

/// Sequences that decode on an engine, as far as known, and their tokens of context.
#[inline]
fn decoding(hot: &Hot, reserved: &Reserved) -> (f64, f64) {
    let (ours, foreign) = (reserved.sequences as f64, f64::from(hot.foreign_running));
    let context = reserved.context_tokens as f64;
    let mean = if ours > 0.0 { context / ours } else { FOREIGN_CONTEXT_TOKENS };
    (ours + foreign, context + foreign * mean)
}

/// Seconds until the engine has computed the prompts dispatched to it before. Requests of others count with what
/// one of ours costs there on average.
#[inline]
fn queue_seconds(hot: &Hot, reserved: &Reserved) -> f64 {
    let mean = match reserved.prefills {
        0 => 0.0,
        n => reserved.prefill_seconds / n as f64,
    };
    let foreign = f64::from(hot.foreign_waiting) * mean.max(hot.speed.request_seconds);
    reserved.prefill_seconds - mean / 2.0 + foreign
}

/// Bytes that a block takes on its way from one engine to another: what each rank there pulls, as its agent asks for it from
/// other hosts, and as it lies within one.
#[inline]
fn block_on_its_way(from: &Hot, to: &Hot) -> u64 {
    match from.host == to.host {
        true => to.block_bytes,
        false => to.wire_block_bytes,
    }
}

#[cfg(test)]
mod tests;
