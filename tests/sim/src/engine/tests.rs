//! Runs of steps are what single steps are, and a full pool serves everyone.

use proptest::prelude::*;

use super::speed::{Speed, known};
use super::{Engine, Job, Output, Settings};
use crate::{Nanos, SECOND};

fn settings(blocks: u32, has_host: bool) -> Settings {
    // Every step takes whole nanoseconds, so that a run of them, which is rounded once, ends where its steps do.
    let row = known("8B", "H100").expect("a row of the table");
    Settings {
        speed: Speed { c: 2e-6, f: 4.2e-5, ..row },
        block_tokens: 16,
        blocks,
        max_num_seqs: 16,
        max_num_batched_tokens: 512,
        chunked_prefill: true,
        kv_events: true,
        // With room for all: in a run of steps, blocks come to the host in another order.
        host_blocks: if has_host { 1 << 20 } else { 0 },
        host_block_seconds: 1e-4,
    }
}

/// All that an engine says to these jobs, each with its arrival. `single`: every step by itself.
fn transcript(
    (blocks, has_host): (u32, bool),
    jobs: &[(Nanos, u32, u32)],
    single: bool,
) -> (Vec<(Nanos, Output)>, u64, u128) {
    let mut engine = Engine::new(settings(blocks, has_host));
    let mut jobs = jobs.iter().enumerate().peekable();
    let (mut said, mut outputs, mut gaps) = (Vec::new(), Vec::new(), 0);
    loop {
        let arrival = jobs.peek().map(|(_, job)| job.0);
        let next = engine.next().map(|next| next.0);
        let now = match (arrival, next) {
            (Some(at), next) if next.is_none_or(|next| at < next) => {
                let (key, job) = jobs.next().expect("it was peeked");
                // Half of the prompts begin alike. No two generate the same block at the same time: in a run of steps, the
                // order in which they would come to the pool is another one.
                let shared = |at: u64| key % 2 == 0 && at < u64::from(job.1 / 16);
                let id = |at| if shared(at) { 1000 + at } else { 100_000 * (key as u64 + 1) + at };
                let ids = (0..u64::from((job.1 + job.2) / 16)).map(id).collect();
                let (prompt_tokens, output_tokens) = (job.1, job.2);
                let key = key as u32;
                engine.submit(
                    at,
                    Job { key, ids, prompt_tokens, output_tokens, remote_tokens: 0, hold: false },
                );
                at
            }
            (_, Some(next)) => {
                engine.wake(next);
                next
            }
            (_, None) => break,
        };
        if single {
            // The run in hand is cut at its first step.
            engine.interrupt(now);
        }
        engine.take_outputs(&mut outputs);
        for output in outputs.drain(..) {
            match output {
                Output::Gaps { gap, count } => gaps += u128::from(gap) * u128::from(count),
                output => said.push((now, output)),
            }
        }
    }
    assert_eq!(engine.load().free_blocks, blocks);
    (said, engine.totals().preemptions, gaps)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn runs_of_steps_are_exact(
        blocks in 40..400u32,
        has_host in any::<bool>(),
        jobs in proptest::collection::vec((0..3 * SECOND, 1..500u32, 1..120u32), 1..40),
    ) {
        let mut jobs = jobs;
        jobs.sort();
        let (coarse, coarse_preemptions, coarse_gaps) = transcript((blocks, has_host), &jobs, false);
        let (single, single_preemptions, single_gaps) = transcript((blocks, has_host), &jobs, true);
        prop_assert_eq!(coarse.len(), single.len());
        let ends = |output: &Output| matches!(output, Output::Finished { .. });
        prop_assert_eq!(coarse.iter().filter(|said| ends(&said.1)).count(), jobs.len());
        prop_assert_eq!(coarse_preemptions, single_preemptions);
        for (coarse, single) in coarse.iter().zip(&single) {
            prop_assert_eq!(coarse, single);
        }
        prop_assert!((coarse_gaps as f64 - single_gaps as f64).abs() <= 1e-5 * single_gaps as f64 + 1e6);
    }
}

#[test]
fn a_full_pool_preempts_and_still_serves_everyone() {
    let jobs: Vec<(Nanos, u32, u32)> = (0..12).map(|at| (at, 100, 300)).collect();
    let (said, preemptions, _) = transcript((60, false), &jobs, false);
    assert!(preemptions > 0);
    assert_eq!(said.iter().filter(|said| matches!(said.1, Output::Finished { .. })).count(), 12);
}
