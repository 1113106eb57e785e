//! One step after another.

use super::host::HostTier;
use super::speed::{Step, pairs};
use super::{Engine, Output, Sequence, State, Work, publish};
use crate::{Nanos, nanos};

/// Times between tokens are recorded with at most this relative error, where the steps of a run grow.
const GAP_ERROR: f64 = 0.002;

impl Engine {
    /// Begins the next step, where there is something to compute.
    pub(super) fn schedule(&mut self, now: Nanos) {
        loop {
            self.chunks.clear();
            let mut step = Step::default();
            let mut budget = self.settings.max_num_batched_tokens;
            let preempted = self.plan_running(now, &mut step, &mut budget);
            // As in vLLM: who was just preempted for lack of blocks is not let in again at once.
            if !preempted {
                self.admit(now, &mut step, &mut budget);
            }
            if step.new == 0 && step.sequences == 0 {
                if preempted {
                    continue;
                }
                return;
            }
            let steps = if self.chunks.is_empty() && !preempted { self.run_length() } else { 1 };
            let first = self.settings.speed.step_seconds(&step);
            let growth = self.settings.speed.f * step.sequences as f64 / 1e3;
            let sequences = step.sequences as u32;
            let prompts = !self.chunks.is_empty();
            let mut work = Work { start: now, end: now, steps, prompts, first, growth, sequences };
            work.end = work.end_of(steps);
            self.work = Some(work);
            self.version += 1;
            return;
        }
    }

    /// Plans what already runs. Returns whether somebody was preempted.
    fn plan_running(&mut self, now: Nanos, step: &mut Step, budget: &mut u32) -> bool {
        let mut preempted = false;
        let mut place = 0;
        'sequences: while place < self.running.len() {
            let at = self.running[place];
            let block_tokens = self.settings.block_tokens;
            let sequence = &mut self.sequences[at as usize];
            if sequence.state == State::Decode {
                if sequence.blocks.len() as u32 * block_tokens <= sequence.computed {
                    while !self.pool.allocate(1, &mut self.sequences[at as usize].blocks) {
                        preempted = true;
                        let Some(last) = self.running.pop() else { break 'sequences };
                        self.preempt(now, last);
                        if last == at {
                            break 'sequences;
                        }
                    }
                }
                *budget = budget.saturating_sub(1);
                step.sequences += 1;
                step.context += u64::from(self.sequences[at as usize].tokens());
            } else {
                let left = sequence.tokens() - sequence.computed;
                let new = left.min(*budget);
                // A prompt that is not computed in chunks waits for a step that has room for it.
                if new > 0 && (self.settings.chunked_prefill || new == left) {
                    self.chunk(at, new, step, budget);
                }
            }
            place += 1;
        }
        preempted
    }

    fn chunk(&mut self, at: u32, new: u32, step: &mut Step, budget: &mut u32) {
        let sequence = &mut self.sequences[at as usize];
        *budget -= new;
        step.new += u64::from(new);
        step.pairs += pairs(u64::from(new), u64::from(sequence.computed));
        let then = sequence.computed + new;
        publish(&mut self.pool, &mut self.host, sequence, self.settings.block_tokens, then);
        self.chunks.push((at, new));
    }

    fn preempt(&mut self, now: Nanos, at: u32) {
        let sequence = &mut self.sequences[at as usize];
        sequence.state = State::Waiting;
        sequence.computed = 0;
        sequence.published = 0;
        sequence.offered = 0;
        if sequence.generated > 0 {
            sequence.last_token = now;
        }
        self.pool.release(&sequence.blocks);
        sequence.blocks.clear();
        self.waiting.push_front(at);
        self.totals.preemptions += 1;
    }

    /// Lets in who waits, in order, while there is room.
    fn admit(&mut self, now: Nanos, step: &mut Step, budget: &mut u32) {
        while *budget > 0 && (self.running.len() as u32) < self.settings.max_num_seqs {
            let Some(at) = self.waiting.front().copied() else { return };
            let ready = self.sequences[at as usize].state == State::Ready;
            if !ready && !self.take_blocks(now, at, *budget) {
                return;
            }
            let sequence = &mut self.sequences[at as usize];
            if sequence.state == State::Fetching {
                self.waiting.pop_front();
                self.fetching += 1;
                continue;
            }
            let left = sequence.tokens() - sequence.computed;
            if !self.settings.chunked_prefill && left > *budget {
                return;
            }
            sequence.state = State::Prefill;
            if sequence.generated == 0 && !ready {
                let hit_tokens = sequence.computed;
                self.outputs.push(Output::Started { key: sequence.job.key, hit_tokens });
            }
            self.waiting.pop_front();
            self.running.push(at);
            self.chunk(at, left.min(*budget), step, budget);
        }
    }

    /// Takes the cached blocks of a request, and free ones for all the rest, unless it cannot be let in now.
    fn take_blocks(&mut self, now: Nanos, at: u32, budget: u32) -> bool {
        let block_tokens = self.settings.block_tokens;
        let sequence = &mut self.sequences[at as usize];
        let tokens = sequence.tokens();
        let findable = (((tokens - 1) / block_tokens) as usize).min(sequence.job.ids.len());
        let hits = self.pool.hits(&sequence.job.ids[..findable]);
        let hit_tokens = hits as u32 * block_tokens;
        let in_host = |host: &HostTier| host.hits(&sequence.job.ids[hits..findable]);
        let host_blocks = self.host.as_ref().map_or(0, in_host);
        let loaded = host_blocks as u32 * block_tokens;
        let fetches = sequence.job.remote_tokens > hit_tokens + loaded;
        let copies = !fetches && loaded > 0;
        if !fetches && !copies && !self.settings.chunked_prefill && tokens - hit_tokens > budget {
            return false;
        }
        let fresh = tokens.div_ceil(block_tokens) - hits as u32;
        if fresh > self.pool.free()
            || fresh + self.pool.free_among(&sequence.job.ids[..hits]) > self.pool.free()
        {
            return false;
        }
        self.pool.share(&sequence.job.ids[..hits], &mut sequence.blocks);
        let taken = self.pool.allocate(fresh, &mut sequence.blocks);
        debug_assert!(taken, "there were enough");
        sequence.computed = hit_tokens;
        sequence.published = hits as u32;
        let key = sequence.job.key;
        if fetches {
            sequence.state = State::Fetching;
            self.outputs.push(Output::Started { key, hit_tokens });
            self.outputs.push(Output::Fetch { key, tokens: sequence.job.remote_tokens - hit_tokens });
        } else if sequence.job.remote_tokens > 0 {
            sequence.job.remote_tokens = 0;
            self.outputs.push(Output::Fetch { key, tokens: 0 });
        }
        if copies {
            sequence.state = State::Fetching;
            if sequence.generated == 0 {
                self.outputs.push(Output::Started { key, hit_tokens: hit_tokens + loaded });
            }
            if let Some(host) = &mut self.host {
                host.used(&sequence.job.ids[hits..hits + host_blocks]);
            }
            self.copy(now, at, loaded);
        }
        true
    }

    /// Steps until the first of the running sequences ends, or needs a block that is not there.
    fn run_length(&self) -> u32 {
        let all = || self.running.iter().map(|at| &self.sequences[*at as usize]);
        let left = |sequence: &Sequence| sequence.job.output_tokens - sequence.generated;
        let most = all().map(left).min().unwrap_or(1);
        let block_tokens = self.settings.block_tokens;
        let free = u64::from(self.pool.free());
        if self.running.len() as u64 * u64::from(most / block_tokens + 1) <= free {
            return most;
        }
        let (mut low, mut high) = (1, most);
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            if self.blocks_needed(middle) <= free { low = middle } else { high = middle - 1 }
        }
        low
    }

    /// Blocks that running sequences lack for the tokens of so many steps.
    fn blocks_needed(&self, steps: u32) -> u64 {
        let need = |at: &u32| {
            let sequence = &self.sequences[*at as usize];
            let blocks = (sequence.computed + steps).div_ceil(self.settings.block_tokens);
            u64::from(blocks.saturating_sub(sequence.blocks.len() as u32))
        };
        self.running.iter().map(need).sum()
    }

    /// What was being computed is there.
    pub(super) fn complete(&mut self, now: Nanos, work: &Work) {
        let took = work.end - work.start;
        match work.prompts {
            true => self.totals.prefill += took,
            false => self.totals.decode += took,
        }
        self.totals.steps += u64::from(work.steps);
        self.record_gaps(work);
        let mut ended = self.complete_decodes(work.steps);
        ended |= self.complete_chunks(now);
        if ended {
            let sequences = &self.sequences;
            let ends = |at: &u32| {
                let sequence = &sequences[*at as usize];
                sequence.generated == sequence.job.output_tokens
            };
            let finished: Vec<u32> = self.running.iter().copied().filter(ends).collect();
            self.running.retain(|at| !ends(at));
            finished.into_iter().for_each(|at| self.finish(at));
        }
    }

    /// Returns whether any sequence ended.
    fn complete_decodes(&mut self, steps: u32) -> bool {
        let block_tokens = self.settings.block_tokens;
        let mut ended = false;
        for at in &self.running {
            let sequence = &mut self.sequences[*at as usize];
            if sequence.state != State::Decode {
                continue;
            }
            sequence.computed += steps;
            sequence.generated += steps;
            let missing =
                sequence.computed.div_ceil(block_tokens).saturating_sub(sequence.blocks.len() as u32);
            if missing > 0 {
                let taken = self.pool.allocate(missing, &mut sequence.blocks);
                debug_assert!(taken, "the run was as long as blocks suffice");
            }
            let computed = sequence.computed;
            publish(&mut self.pool, &mut self.host, sequence, block_tokens, computed);
            self.totals.output_tokens += u64::from(steps);
            ended |= sequence.generated == sequence.job.output_tokens;
        }
        ended
    }

    /// Returns whether any sequence ended.
    fn complete_chunks(&mut self, now: Nanos) -> bool {
        let mut ended = false;
        for (at, new) in self.chunks.drain(..) {
            let sequence = &mut self.sequences[at as usize];
            sequence.computed += new;
            self.totals.prefill_tokens += u64::from(new);
            if sequence.computed < sequence.tokens() {
                if sequence.job.hold {
                    let tokens = sequence.computed;
                    self.outputs.push(Output::Computed { key: sequence.job.key, tokens });
                }
                continue;
            }
            sequence.generated += 1;
            sequence.state = State::Decode;
            self.totals.output_tokens += 1;
            self.outputs.push(match sequence.generated {
                1 => Output::FirstToken { key: sequence.job.key },
                _ => Output::Gaps { gap: now - sequence.last_token, count: 1 },
            });
            ended |= sequence.generated == sequence.job.output_tokens;
        }
        ended
    }

    fn finish(&mut self, at: u32) {
        let sequence = &mut self.sequences[at as usize];
        self.outputs.push(Output::Finished { key: sequence.job.key });
        if let Some(host) = &mut self.host {
            host.used(&sequence.job.ids[..sequence.offered as usize]);
        }
        match sequence.job.hold {
            true => sequence.state = State::Held,
            false => self.vacate(at),
        }
    }

    fn record_gaps(&mut self, work: &Work) {
        if work.sequences == 0 {
            return;
        }
        let grown = work.growth * f64::from(work.steps - 1) / work.first.max(f64::MIN_POSITIVE);
        let pieces = ((grown / (2.0 * GAP_ERROR)).ceil() as u32).clamp(1, work.steps);
        let mut done = 0;
        for piece in 1..=pieces {
            let until = (u64::from(work.steps) * u64::from(piece) / u64::from(pieces)) as u32;
            let steps = until - done;
            let gap = nanos((work.seconds(until) - work.seconds(done)) / f64::from(steps));
            self.outputs.push(Output::Gaps { gap, count: u64::from(steps) * u64::from(work.sequences) });
            done = until;
        }
    }
}
