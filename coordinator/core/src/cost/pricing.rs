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
mod tests {
    use super::*;
    use crate::links::Links;
    use crate::load::LinkLoad;
    use crate::placement::testing::{engine, fleet, with};

    fn pricing<'a>(fleet: &'a Fleet, loads: &'a Loads, held: &'a [u32], prompt_tokens: u64) -> Pricing<'a> {
        Pricing::new(fleet, loads, held, prompt_tokens, (128.0, Some(11)), Slo::default())
    }

    fn idle(engines: usize) -> Loads {
        Loads::new(vec![Reserved::default(); engines], Vec::new())
    }

    fn sum_is_total(priced: &Priced) {
        assert!((priced.terms.total() / priced.seconds - 1.0).abs() < 1e-12, "{priced:?}");
    }

    #[test]
    fn an_engine_always_computes_the_last_token() {
        let (fleet, loads) = (fleet(1), idle(1));
        let hit = |prompt_tokens| pricing(&fleet, &loads, &[4], prompt_tokens).hit_tokens(0);
        assert_eq!([hit(64), hit(65), hit(1000), hit(0)], [48, 64, 64, 0]);
    }

    #[test]
    fn a_handoff_moves_only_what_the_decode_engine_lacks() {
        let (fleet, loads) = (fleet(2), idle(2));
        let priced =
            pricing(&fleet, &loads, &[10, 30], 1000).price(Plan::Disaggregated { prefill: 0, decode: 1 });
        assert_eq!((priced.hit_tokens, priced.uncached_tokens), (160, 840));
        assert_eq!(priced.transfer_bytes, (63 - 30) * fleet.engines()[0].info.block_bytes);
        sum_is_total(&priced);
        let own = [Term::Prefill, Term::Transfer, Term::FirstStep].map(|term| priced.terms.get(term));
        assert!((own.iter().sum::<f64>() - priced.ttft_seconds).abs() < 1e-12);
    }

    #[test]
    fn a_block_is_priced_as_it_travels_to_who_pulls_it() {
        let on = |n, host: &str, block, wire| {
            with(engine(n), |info| {
                (info.host, info.block_bytes, info.wire_block_bytes) = (host.into(), block, wire);
                info.can_pull_cached = true;
            })
        };
        // The last one has every head on two ranks, each of which pulls its own.
        let engines = vec![
            on(0, "a", 1000, 510),
            on(1, "a", 1000, 1000),
            on(2, "b", 1000, 1000),
            on(3, "b", 2000, 1020),
        ];
        let (fleet, loads) = (Fleet::new(engines, Links::default()), idle(4));
        let pricing = pricing(&fleet, &loads, &[0, 10, 0, 0], 161);
        for (from, to, block) in
            [(1, 0, 1000), (2, 0, 510), (0, 1, 1000), (2, 1, 1000), (3, 2, 1000), (2, 3, 2000), (0, 3, 1020)]
        {
            let blocks = 11 - u64::from(pricing.held[to as usize]);
            assert_eq!(pricing.handoff_bytes(from, to), blocks * block, "{from} to {to}");
            let least = pricing.moving(to, 0.0);
            assert!(least.bytes <= (blocks * block) as f64);
            let way = pricing.transfer(from, to, blocks * block);
            assert!(least.least <= way.wait + way.transfer, "{from} to {to}");
        }
        assert_eq!(pricing.pulled(1, 0), Some((160, 10 * 1000)));
        assert_eq!(pricing.pulled(1, 3), Some((160, 10 * 1020)));
    }

    #[test]
    fn queue_stall_and_steps_are_what_the_table_says() {
        let mut slow = engine(0);
        slow.speed = crate::speed::Speed {
            request_seconds: 0.0,
            token_seconds: 1e-3,
            attention_seconds: 0.0,
            step_seconds: 0.01,
            sequence_seconds: 0.001,
            context_seconds: 1e-6,
        };
        let fleet = Fleet::new(vec![slow], Links::default());
        let reserved = Reserved {
            prefill_seconds: 1.0,
            prefills: 2,
            sequences: 3,
            context_tokens: 3000,
            ..Reserved::default()
        };
        let loads = Loads::new(vec![reserved], Vec::new());
        let priced = pricing(&fleet, &loads, &[0], 4000).price(Plan::Colocated { engine: 0 });
        let near = |term, seconds: f64| {
            let got = priced.terms.get(term);
            assert!((got - seconds).abs() < 1e-9, "{term:?}: {got}");
        };
        near(Term::QueueWait, 0.75);
        near(Term::Prefill, 4.0);
        near(Term::MixedSteps, 2.0 * (0.003 + 0.003));
        near(Term::DecodeStall, 3.0 * (4.0 - 2.0 * 0.01));
        near(Term::Decode, 10.0 * (0.01 + 0.004 + (3000.0 + 4005.5) * 1e-6));
        near(Term::DecodeBatch, 3.0 * 10.0 * (0.001 + 4005.5e-6));
        near(Term::Transfer, 0.0);
        sum_is_total(&priced);
    }

    #[test]
    fn a_full_cache_makes_wait_until_sequences_end() {
        let mut full = with(engine(0), |info| info.num_blocks = 10_000 / 16);
        full.kv_beyond = 1000.0;
        let fleet = Fleet::new(vec![full, engine(1)], Links::default());
        let reserved = Reserved { sequences: 4, context_tokens: 7000, ..Reserved::default() };
        let loads = Loads::new(vec![reserved; 2], Vec::new());
        let priced = |engine, prompt_tokens| {
            let priced = pricing(&fleet, &loads, &[0, 0], prompt_tokens).price(Plan::Colocated { engine });
            sum_is_total(&priced);
            priced
        };
        assert_eq!(priced(0, 1000).terms.get(Term::RoomWait), 0.0);
        assert_eq!(priced(1, 100_000).terms.get(Term::RoomWait), 0.0, "it is not known what the cache takes");
        // A quarter of 8,000 tokens is too much: that goes when a quarter of what the others still have to say is said.
        let over = priced(0, 3000);
        let wait = over.terms.get(Term::RoomWait);
        assert!((wait - 0.25 * 128.0 * over.itl_seconds).abs() < 1e-9, "{wait}");
        let own = [Term::MixedSteps, Term::Prefill, Term::RoomWait].map(|term| over.terms.get(term));
        assert!((own.iter().sum::<f64>() - over.ttft_seconds).abs() < 1e-12);
        let to = |decode| {
            pricing(&fleet, &loads, &[0, 0], 3000).price(Plan::Disaggregated { prefill: 1 - decode, decode })
        };
        assert_eq!(to(0).terms.get(Term::RoomWait), wait);
        assert_eq!(to(1).terms.get(Term::RoomWait), 0.0);
        sum_is_total(&to(0));
    }

    #[test]
    fn a_second_copy_is_charged_for_those_to_come() {
        let (fleet, loads) = (fleet(2), idle(2));
        let mut pricing = pricing(&fleet, &loads, &[0, 10], 3000);
        let charged = |pricing: &Pricing<'_>, engine| {
            let priced = pricing.price(Plan::Colocated { engine });
            sum_is_total(&priced);
            (priced.terms.get(Term::SecondCopy), priced.ttft_seconds)
        };
        let (nothing, ttft) = charged(&pricing, 0);
        assert_eq!(nothing, 0.0);
        pricing.longest_hit = 160;
        assert_eq!(charged(&pricing, 1).0, 0.0);
        let speed = &fleet.engines()[0].speed;
        let lost = speed.prefill_seconds(3000, 0) - speed.prefill_seconds(2840, 160);
        let (second, same) = charged(&pricing, 0);
        assert!((second - SHARERS * lost).abs() < 1e-12);
        assert_eq!(same, ttft, "the request itself does not wait for it");
        let mut long = Pricing::new(&fleet, &loads, &[0, 6000], 100_000, (128.0, Some(11)), Slo::default());
        long.longest_hit = 96_000;
        assert_eq!(charged(&long, 0).0, MOST_SECOND_COPY_SECONDS);
    }

    #[test]
    fn what_a_copy_displaces_is_charged_by_how_much_is_found_again_and_by_who_waits() {
        let charged = |reused: f64, reserved: Reserved, slo: Slo, plan: Plan| {
            let of = |n| {
                let engine = with(engine(n), |info| info.can_pull_cached = true);
                crate::fleet::Engine { reused: Some(reused), ..engine }
            };
            let fleet = Fleet::new(vec![of(0), of(1)], Links::default());
            let loads = Loads::new(vec![Reserved::default(), reserved], Vec::new());
            let held = [1000, 10];
            let pricing = Pricing::new(&fleet, &loads, &held, 20_000, (100.0, None), slo);
            let priced = pricing.price(plan);
            sum_is_total(&priced);
            priced.terms.get(Term::SecondCopy)
        };
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} is not {b}");
        let (pull, handoff) =
            (Plan::Pull { source: 0, engine: 1 }, Plan::Disaggregated { prefill: 0, decode: 1 });
        let (idle, free) = (Reserved::default(), Slo::default());
        let token = engine(0).speed.token_seconds;
        for (plan, tokens) in [(pull, 990.0 * 16.0), (handoff, 1240.0 * 16.0)] {
            near(charged(0.0, idle, free, plan), 0.0);
            near(charged(0.5, idle, free, plan), 0.5 * tokens * token);
            let busy = Reserved { sequences: 3, context_tokens: 3000, prefills: 2, ..idle };
            near(charged(0.5, busy, free, plan), 6.0 * 0.5 * tokens * token);
            // Three that are as likely late as not without it, more likely with it.
            let itl = engine(0).speed.decode_step_seconds(3.0, 3000.0);
            let slo = Slo { itl_seconds: Some(itl), ..free };
            let computing = 1e-4 * tokens * token;
            let risk = 3.0 * 100.0 * itl * (computing / 100.0 / itl / (2.0 * SPREAD));
            near(charged(1e-4, busy, slo, plan), 6.0 * computing + risk);
        }
    }

    #[test]
    fn a_pull_waits_for_the_longer_queue_and_then_for_the_transfer() {
        let pulls = |n| with(engine(n), |info| info.can_pull_cached = true);
        let fleet = Fleet::new(vec![pulls(0), pulls(1)], Links::default());
        let plan = Plan::Pull { source: 0, engine: 1 };
        let price = |source: f64, destination: f64| {
            let reserved = |prefill_seconds: f64| Reserved {
                prefill_seconds,
                prefills: u64::from(prefill_seconds > 0.0),
                ..Reserved::default()
            };
            // Of the one prompt before it half is done.
            let loads = Loads::new(vec![reserved(2.0 * source), reserved(2.0 * destination)], Vec::new());
            let priced = pricing(&fleet, &loads, &[1000, 10], 20_000).price(plan);
            sum_is_total(&priced);
            assert_eq!((priced.hit_tokens, priced.uncached_tokens), (16_000, 4000));
            assert_eq!(priced.transfer_bytes, 990 * 100_000);
            assert!((priced.terms.get(Term::Transfer) - 0.101).abs() < 1e-9);
            (priced.terms.get(Term::QueueWait), priced.terms.get(Term::Hold), priced.ttft_seconds)
        };
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} is not {b}");
        let step = fleet.engines()[0].speed.prefill_seconds(1, 16_000);
        let (queue, hold, idle) = price(0.0, 0.0);
        near(queue, 0.0);
        near(hold, step);
        for (source, destination, queue, hold) in [
            (4.0, 0.0, 4.0, step),
            (0.0, 4.0, 4.0, 0.0),
            (4.0, 4.0 + step / 4.0, 4.0 + step / 4.0, step * 0.75),
        ] {
            let got = price(source, destination);
            near(got.0, queue);
            near(got.1, hold);
            near(got.2, idle - step + queue + hold);
        }
        // Beside sequences that decode, the one token shares a step with them.
        let busy = Reserved { sequences: 3, context_tokens: 3000, ..Reserved::default() };
        let loads = Loads::new(vec![busy, Reserved::default()], Vec::new());
        let priced = pricing(&fleet, &loads, &[1000, 10], 20_000).price(plan);
        let mixed = fleet.engines()[0].speed.mixed_seconds(3.0, 3000.0);
        near(priced.terms.get(Term::Hold), step + mixed);
        assert_eq!(priced.terms.get(Term::DecodeStall), 0.0);
    }

    #[test]
    fn a_transfer_waits_for_what_other_engines_of_its_hosts_exchange_with_other_hosts() {
        let on = |n, host: &str| with(engine(n), |info| info.host = host.to_owned());
        let fleet =
            Fleet::new(vec![on(0, "a"), on(1, "a"), on(2, "b"), on(3, "b"), on(4, "c")], Links::default());
        let link = LinkLoad { destination: 3, source: 1, bytes: 1_000_000_000 };
        let mut loads = Loads::new(vec![Reserved::default(); 5], vec![link]);
        loads.sum_by_host(&fleet);
        let pricing = pricing(&fleet, &loads, &[0; 5], 1000);
        let wait = |prefill, decode| {
            let priced = pricing.price(Plan::Disaggregated { prefill, decode });
            sum_is_total(&priced);
            let own = pricing.transfer(prefill, decode, 0).wait;
            let terms = priced.terms.get(Term::TransferWait);
            assert!((own - terms).abs() < 1e-9);
            terms
        };
        for (prefill, decode, seconds) in
            [(0, 2, 1.0), (0, 4, 1.0), (4, 2, 1.0), (0, 1, 0.0), (2, 0, 0.0), (4, 0, 0.0)]
        {
            assert!((wait(prefill, decode) - seconds).abs() < 1e-9, "{prefill} to {decode}");
        }
    }

    #[test]
    fn lateness_is_the_requests_own_and_risk_is_a_part_of_what_was_promised() {
        let fleet = fleet(1);
        let reserved = Reserved { sequences: 2, context_tokens: 2000, ..Reserved::default() };
        let loads = Loads::new(vec![reserved], Vec::new());
        let with = |ttft_seconds, itl_seconds| {
            let slo = Slo { ttft_seconds, itl_seconds };
            let pricing = Pricing::new(&fleet, &loads, &[0], 10_000, (128.0, Some(11)), slo);
            let priced = pricing.price(Plan::Colocated { engine: 0 });
            sum_is_total(&priced);
            (priced, priced.terms.get(Term::SloRisk))
        };
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} is not {b}");
        let (free, nothing) = with(None, None);
        assert_eq!((free.late_seconds, nothing), (0.0, 0.0));
        let (kept, nothing) = with(Some(10.0), Some(1.0));
        assert_eq!((kept.late_seconds, nothing), (0.0, 0.0));

        // Predicted as promised: as likely late as not.
        near(with(Some(free.ttft_seconds), None).1, free.ttft_seconds / 2.0);
        let (late, certain) = with(Some(free.ttft_seconds / 2.0), None);
        near(late.late_seconds, free.ttft_seconds / 2.0);
        near(certain, free.ttft_seconds / 2.0);

        // Ten further tokens are late. Those beside it are more likely so by its prefill, and by its own steps.
        let step = fleet.engines()[0].speed.decode_step_seconds(2.0, 2000.0);
        let stalled = free.terms.get(Term::DecodeStall) / 2.0 / 128.0;
        let slo = step / 0.75;
        let (late, risk) = with(None, Some(slo));
        near(late.late_seconds, 10.0 * (free.itl_seconds - slo).max(0.0));
        let of = |itl: f64| ((itl / slo - 0.75) / 0.5).clamp(0.0, 1.0);
        let added = free.terms.get(Term::DecodeBatch) / 2.0 / 10.0;
        let beside = of(step + stalled) + of(free.itl_seconds) - of(free.itl_seconds - added);
        near(risk, 128.0 * slo * (of(free.itl_seconds) + 2.0 * beside));
    }
}
