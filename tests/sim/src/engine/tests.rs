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

/// Runs until nothing is left to do.
fn run(engine: &mut Engine, said: &mut Vec<Output>) {
    while let Some((now, _)) = engine.next() {
        engine.wake(now);
        engine.take_outputs(said);
    }
}

fn job(key: u32, tokens: u32, hold: bool) -> Job {
    let ids = (0..u64::from(tokens / 16)).map(|at| 100_000 * u64::from(key + 1) + at).collect();
    Job { key, ids, prompt_tokens: tokens, output_tokens: 1, remote_tokens: 0, hold }
}

#[test]
fn of_a_prompt_that_will_be_held_it_is_said_what_is_there() {
    let mut engine = Engine::new(settings(400, false));
    let mut said = Vec::new();
    let handle = engine.submit(0, job(7, 1200, true));
    run(&mut engine, &mut said);
    let computed = |tokens| Output::Computed { key: 7, tokens };
    let expected = [
        Output::Started { key: 7, hit_tokens: 0 },
        computed(512),
        computed(1024),
        Output::FirstToken { key: 7 },
        Output::Finished { key: 7 },
    ];
    assert_eq!(said, expected);
    engine.release(SECOND, handle);
    // What was cached is computed, too; of one that is not held nothing is said.
    said.clear();
    let handle = engine.submit(2 * SECOND, Job { ids: job(7, 2000, true).ids, ..job(7, 2000, true) });
    run(&mut engine, &mut said);
    assert_eq!(said[0], Output::Started { key: 7, hit_tokens: 1200 });
    assert_eq!(said[1], computed(1712));
    engine.release(3 * SECOND, handle);
    said.clear();
    engine.submit(4 * SECOND, job(8, 2000, false));
    run(&mut engine, &mut said);
    assert!(!said.iter().any(|output| matches!(output, Output::Computed { .. })));
    assert_eq!(engine.load().free_blocks, 400);
}

#[test]
fn a_prompt_that_is_preempted_between_chunks_begins_again() {
    let mut engine = Engine::new(settings(112, false));
    let mut said = Vec::new();
    // At every step one of these needs a block, and the last one to come takes all that are free but one.
    for key in 0..8 {
        engine.submit(0, Job { output_tokens: 40, ..job(key, 25 + key, false) });
    }
    let (at, _) = engine.next().expect("a step");
    let handle = engine.submit(at, job(99, 1520, true));
    run(&mut engine, &mut said);
    let of_it = |output: &&Output| {
        matches!(
            output,
            Output::Started { key: 99, .. } | Output::Computed { key: 99, .. } | Output::Finished { key: 99 }
        )
    };
    let of_it: Vec<Output> = said.iter().filter(of_it).copied().collect();
    let begins = of_it.iter().filter(|output| matches!(output, Output::Started { .. })).count();
    assert!(begins == 2 && engine.totals().preemptions > 0, "{of_it:?}");
    assert!(matches!(of_it[1], Output::Computed { tokens, .. } if tokens < 512), "beside others: {of_it:?}");
    assert_eq!(of_it.last(), Some(&Output::Finished { key: 99 }));
    engine.release(SECOND, handle);
    assert_eq!(engine.load().free_blocks, 112);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn aborted_requests_leave_nothing_and_say_nothing(
        jobs in proptest::collection::vec((0..SECOND, 1..1500u32, any::<bool>(), proptest::option::of(0..SECOND)), 1..30),
        has_host in any::<bool>(),
    ) {
        let mut engine = Engine::new(settings(200, has_host));
        let mut todo: Vec<(Nanos, u32, bool)> = Vec::new();
        for (key, (at, _, _, aborted)) in jobs.iter().enumerate() {
            todo.push((*at, key as u32, false));
            todo.extend(aborted.map(|later| (at + later, key as u32, true)));
        }
        todo.sort_unstable();
        let (mut handles, mut gone, mut ended) = (vec![None; jobs.len()], vec![false; jobs.len()], 0);
        let mut outputs = Vec::new();
        let mut todo = todo.into_iter().peekable();
        loop {
            let next = engine.next().map(|next| next.0);
            let now = match (todo.peek().copied(), next) {
                (Some((at, key, aborts)), next) if next.is_none_or(|next| at < next) => {
                    todo.next();
                    let (_, tokens, hold, _) = jobs[key as usize];
                    match aborts {
                        // Every third prompt is like another one's.
                        false => {
                            let job = Job { ids: job(key % 3, tokens, hold).ids, ..job(key, tokens, hold) };
                            handles[key as usize] = Some(engine.submit(at, job));
                        }
                        true => {
                            if let Some(handle) = handles[key as usize].take() {
                                gone[key as usize] = true;
                                engine.abort(at, handle);
                            }
                        }
                    }
                    at
                }
                (_, Some(next)) => {
                    engine.wake(next);
                    next
                }
                (_, None) => break,
            };
            engine.take_outputs(&mut outputs);
            for output in outputs.drain(..) {
                match output {
                    Output::Started { key, .. } | Output::Computed { key, .. } | Output::FirstToken { key } => {
                        prop_assert!(!gone[key as usize]);
                    }
                    Output::Finished { key } => {
                        prop_assert!(!gone[key as usize]);
                        ended += 1;
                        let handle = handles[key as usize].take().expect("it was there");
                        if jobs[key as usize].2 {
                            engine.release(now, handle);
                        }
                    }
                    Output::Fetch { .. } | Output::Gaps { .. } => {}
                }
            }
        }
        prop_assert_eq!(ended + gone.iter().filter(|gone| **gone).count(), jobs.len());
        let load = engine.load();
        prop_assert_eq!((load.waiting, load.running, load.free_blocks), (0, 0, 200));
    }
}
