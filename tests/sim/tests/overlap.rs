//! Handoffs whose second part is sent while the first one computes: what shows of the transfer, and that nothing is left behind by what fails.

mod support;

use std::ops::ControlFlow;

use baton_sim::engine::speed::{Speed, Step, known, pairs};
use baton_sim::fleet::{Card, Fleet, Outage};
use baton_sim::sim::{
    Answer, MAX_ATTEMPTS, Outcome, Overlap, Placer, Plan, Progress, Report, Request, Window, run_observed,
};
use baton_sim::trace::{First, Generator, Length, Shape, Source};
use baton_sim::{Nanos, nanos, seconds};
use proptest::prelude::*;

/// Three chunks.
const PROMPT: u32 = 3 * CHUNK;
const CHUNK: u32 = 8192;
const RTT: f64 = 200e-6;

/// Engines on hosts of their own.
fn fleet(gbit: f64) -> Fleet {
    let example = include_str!("../../../benches/fleets/8b-h100x8.toml");
    let mut fleet = Fleet { slo: None, ..Fleet::parse(example).expect("an example").with_gbit(gbit) };
    (fleet.engines[0].per_host, fleet.links.rtt_us, fleet.links.transfer_gbit) = (1, RTT * 1e6, None);
    fleet
}

fn speed() -> Speed {
    known("8B", "H100").expect("a row of the table")
}

/// Seconds of the steps that compute so many tokens.
fn steps(tokens: u32) -> Vec<f64> {
    let chunk = |at: u32| {
        let new = u64::from(CHUNK.min(tokens - at));
        speed().step_seconds(&Step { new, pairs: pairs(new, u64::from(at)), ..Step::default() })
    };
    (0..tokens).step_by(CHUNK as usize).map(chunk).collect()
}

/// Seconds that so many tokens are on their way.
fn sending(fleet: &Fleet, tokens: u32) -> f64 {
    speed().kv_bytes(tokens.into()) / (fleet.links.gbit * 1e9 / 8.0 * fleet.links.efficiency)
}

/// The last token once more, on the decode engine: no step is shorter than reading the weights.
fn first_step(tokens: u32) -> f64 {
    (speed().d + speed().c * f64::from(tokens)) / 1e3
}

/// From engine 0 to engine 1; whoever failed there goes to 2, whole.
struct Handoff {
    overlap: Option<Overlap>,
    progress: Vec<(Nanos, Progress)>,
}

impl Placer for Handoff {
    fn place(&mut self, _now: Nanos, request: &Request<'_>) -> Answer {
        let plan = Plan::Disaggregated { prefill: 0, decode: 1 };
        match (request.avoid.is_empty(), self.overlap) {
            (false, _) => Answer::Goes(Plan::Colocated { engine: 2 }),
            (true, Some(overlap)) => Answer::Overlaps(plan, overlap),
            (true, None) => Answer::Goes(plan),
        }
    }

    fn progress(&mut self, now: Nanos, _key: u32, progress: &Progress) {
        self.progress.push((now, *progress));
    }
}

fn observe(fleet: &Fleet, source: &mut dyn Source, placer: &mut dyn Placer) -> (Report, Vec<Outcome>) {
    let mut outcomes = Vec::new();
    let results = run_observed(fleet, 64, source, placer, Window::ALL, &mut |outcome| {
        outcomes.extend(outcome.copied());
        ControlFlow::Continue(())
    });
    (results.report, outcomes)
}

fn single(prompt: u32) -> First<Generator> {
    let shape = Shape::single(Length::fixed(prompt), Length::fixed(11));
    First::new(Generator::new(vec![shape], 1.0, 64, 1), 1)
}

/// When the request of [`single`] arrives.
fn arrival() -> f64 {
    let mut placer = Handoff { overlap: None, progress: Vec::new() };
    seconds(observe(&fleet(100.0), &mut single(PROMPT), &mut placer).1[0].arrived)
}

/// The one request, and what was heard of it.
fn served(
    fleet: &Fleet,
    prompt: u32,
    overlap: Option<(f64, f64)>,
) -> (Report, Option<Outcome>, Vec<(Nanos, Progress)>) {
    let overlap =
        overlap.map(|(after, more_time)| Overlap { after: nanos(after), more_time: nanos(more_time) });
    let mut placer = Handoff { overlap, progress: Vec::new() };
    let (report, outcomes) = observe(fleet, &mut single(prompt), &mut placer);
    (report, outcomes.first().copied(), placer.progress)
}

fn ttft(fleet: &Fleet, prompt: u32, overlap: Option<f64>) -> f64 {
    let (report, outcome, progress) = served(fleet, prompt, overlap.map(|after| (after, 10.0)));
    assert_eq!((report.fetched_tokens, report.transfers, report.failed_transfers), (prompt.into(), 1, 0));
    // The link's speed is learnt from the time with bytes on their way, which waiting for chunks is no part of.
    let took = progress.iter().find_map(|(_, progress)| match progress {
        Progress::Transferred { seconds, .. } => Some(*seconds),
        _ => None,
    });
    near(took.expect("it was transferred"), sending(fleet, prompt) + 2.0 * RTT);
    seconds(outcome.expect("it ended").ttft)
}

fn near(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-6, "{a} is not {b}");
}

#[test]
fn only_the_last_chunk_shows_after_the_prefill() {
    let fleet = fleet(100.0);
    let (steps, dispatch) = (steps(PROMPT), fleet.control.dispatch_us / 1e6);
    let prefill: f64 = steps.iter().sum();
    let chunk = sending(&fleet, CHUNK);
    assert!(steps.iter().all(|step| *step > chunk), "a chunk is gone before the next one is there");
    let rest = RTT + first_step(PROMPT);
    near(ttft(&fleet, PROMPT, Some(0.0)), dispatch + prefill + chunk + rest);
    // Sent so late that all but the last chunk is just gone when the prefill ends.
    let latest = prefill - dispatch - RTT - 2.0 * chunk;
    near(ttft(&fleet, PROMPT, Some(latest)), dispatch + prefill + chunk + rest);
    // And later.
    for late in [0.3 * chunk, chunk] {
        near(ttft(&fleet, PROMPT, Some(latest + late)), dispatch + prefill + chunk + late + rest);
    }
    // Never later than one that is sent when the prefill is over.
    let after = dispatch + prefill + dispatch + RTT + 3.0 * chunk + rest;
    near(ttft(&fleet, PROMPT, None), after);
    near(ttft(&fleet, PROMPT, Some(prefill + 1.0)), after);
    near(ttft(&fleet, PROMPT, Some(prefill - dispatch / 2.0)), after - dispatch / 2.0);
}

#[test]
fn over_a_slow_link_it_begins_when_the_first_chunk_is_there() {
    let fleet = fleet(10.0);
    let (steps, dispatch) = (steps(PROMPT), fleet.control.dispatch_us / 1e6);
    let all = sending(&fleet, PROMPT);
    near(ttft(&fleet, PROMPT, Some(0.0)), dispatch + steps[0] + all + RTT + first_step(PROMPT));
}

#[test]
fn of_one_chunk_nothing_goes_before_its_end() {
    let (fleet, prompt) = (fleet(10.0), 6400);
    let dispatch = fleet.control.dispatch_us / 1e6;
    let plain = ttft(&fleet, prompt, None);
    near(plain, 2.0 * dispatch + steps(prompt)[0] + sending(&fleet, prompt) + 2.0 * RTT + first_step(prompt));
    near(ttft(&fleet, prompt, Some(10.0)), plain);
    // What the request itself takes is over by then.
    near(ttft(&fleet, prompt, Some(0.0)), plain - dispatch - RTT);
    // Nor where prompts are computed whole.
    let mut whole = fleet.clone();
    (whole.engines[0].chunked_prefill, whole.engines[0].max_num_batched_tokens) = (false, PROMPT);
    let [plain, early] = [None, Some(0.0)].map(|overlap| ttft(&whole, PROMPT, overlap));
    near(early, plain - dispatch - RTT);
}

fn dying(engine: u32, at: f64, gbit: f64) -> Fleet {
    let outage = Outage { engine, from_seconds: at, until_seconds: None };
    Fleet { outages: vec![outage], ..fleet(gbit) }
}

fn count(progress: &[(Nanos, Progress)], of: Progress) -> usize {
    progress.iter().filter(|entry| entry.1 == of).count()
}

#[test]
fn where_the_prefill_engine_dies_what_came_is_used() {
    let (at, steps) = (arrival() + 500e-6, steps(PROMPT));
    // In the second chunk, when all of the first has come.
    let dies = dying(0, at + steps[0] + 0.9 * steps[1], 100.0);
    let (report, outcome, progress) = served(&dies, PROMPT, Some((0.0, 1.0)));
    assert_eq!((report.finished, report.failed, report.retried, report.failed_transfers), (1, 0, 0, 1));
    assert_eq!(report.fetched_tokens, u64::from(CHUNK));
    assert_eq!(report.engines[1].prefill_tokens, u64::from(PROMPT - CHUNK));
    assert_eq!((count(&progress, Progress::Sent), count(&progress, Progress::FellBack)), (1, 1));
    assert_eq!(count(&progress, Progress::Prefilled), 0);
    let expected = 500e-6 + steps[0] + 0.9 * steps[1] + RTT + steps[1] + steps[2];
    assert!((seconds(outcome.expect("it ended").ttft) - expected).abs() < 1e-4);
    // In the first chunk: nothing came. And in the midst of one that is on its way.
    let dies = dying(0, at + 0.5 * steps[0], 100.0);
    let (report, ..) = served(&dies, PROMPT, Some((0.0, 1.0)));
    assert_eq!((report.finished, report.fetched_tokens), (1, 0));
    let dies = dying(0, at + steps[0] + 0.05, 10.0);
    let (report, ..) = served(&dies, PROMPT, Some((0.0, 1.0)));
    let came = report.fetched_tokens;
    assert!(came > 0 && came < u64::from(CHUNK) && came.is_multiple_of(64), "{came}");
    assert_eq!(report.engines[1].prefill_tokens, u64::from(PROMPT) - came);
    // Before the second part was sent: it is left out, as ever.
    let dies = dying(0, at + steps[0] + 0.5 * steps[1], 100.0);
    let (report, _, progress) = served(&dies, PROMPT, Some((steps[0] + 0.6 * steps[1], 1.0)));
    assert_eq!((report.finished, report.fetched_tokens, report.failed_transfers), (1, 0, 0));
    assert_eq!((count(&progress, Progress::Sent), count(&progress, Progress::FellBack)), (0, 1));
}

#[test]
fn where_the_decode_engine_dies_the_prefill_is_dropped() {
    let (at, steps) = (arrival() + 500e-6, steps(PROMPT));
    // While the second part waits for chunks, and before it comes.
    for (dies, sent) in [(at + steps[0] + 0.9 * steps[1], 1), (at + 0.2 * steps[0], 1), (0.0, 1)] {
        let (report, outcome, progress) = served(&dying(1, dies, 100.0), PROMPT, Some((0.0, 1.0)));
        assert_eq!((report.finished, report.retried, report.transfers, report.expired_holds), (1, 1, 0, 0));
        assert_eq!(report.engines[2].prefill_tokens, u64::from(PROMPT));
        assert!(report.engines[0].prefill_tokens < u64::from(PROMPT), "the rest is not computed");
        assert_eq!(report.engines[0].output_tokens, 0);
        assert_eq!((count(&progress, Progress::Sent), count(&progress, Progress::Failed)), (sent, 1));
        assert_eq!(outcome.expect("it ended").plan, Plan::Colocated { engine: 2 });
    }
}

#[test]
fn the_deadline_is_later_by_the_prefill() {
    let (steps, mut fleet) = (steps(PROMPT), fleet(100.0));
    let prefill: f64 = steps.iter().sum();
    // Longer than the last chunk takes, shorter than the prefill.
    fleet.control.pull_deadline_ms = 0.8 * steps[0] * 1e3;
    let (report, ..) = served(&fleet, PROMPT, Some((0.0, prefill)));
    assert_eq!((report.transfers, report.failed_transfers), (1, 0));
    // Without that nothing has come by then. All is computed where it is to be answered, and the first part is dropped if it is not over by the end.
    let (report, outcome, _) = served(&fleet, PROMPT, Some((0.0, 0.0)));
    assert_eq!((report.finished, report.transfers, report.failed_transfers), (1, 0, 1));
    assert_eq!((report.fetched_tokens, report.engines[1].prefill_tokens), (0, PROMPT.into()));
    let expected = 2.0 * 500e-6 + 0.8 * steps[0] + prefill;
    assert!((seconds(outcome.expect("it ended").ttft) - expected).abs() < 1e-4);
}

#[test]
fn a_second_part_that_ends_first_drops_the_first() {
    // The second request finds all but the last tokens of its prompt where it is to be answered, and does not wait for those.
    struct Twice;
    impl Placer for Twice {
        fn place(&mut self, _now: Nanos, request: &Request<'_>) -> Answer {
            let plan = Plan::Disaggregated { prefill: 0, decode: 1 };
            match request.number {
                0 => Answer::Goes(Plan::Colocated { engine: 1 }),
                _ => Answer::Overlaps(plan, Overlap { after: 0, more_time: 0 }),
            }
        }
    }
    let shape = Shape {
        prefixes: 1,
        prefix: Length::fixed(PROMPT),
        ..Shape::single(Length::fixed(10), Length::fixed(2))
    };
    let mut source = First::new(Generator::new(vec![shape], 0.1, 64, 3), 2);
    let mut fleet = fleet(100.0);
    fleet.control.pull_deadline_ms = 1.0;
    let (report, outcomes) = observe(&fleet, &mut source, &mut Twice);
    assert_eq!((report.finished, report.transfers, report.failed_transfers), (2, 0, 1));
    let rest = speed().prefill_seconds(10, PROMPT.into()) + speed().decode_seconds(1, PROMPT.into());
    assert!(seconds(outcomes[1].e2e) < 0.01 + 2.0 * rest);
    let computed = report.engines[0].prefill_tokens;
    assert!(computed > 0 && computed < u64::from(PROMPT), "{computed}");
}

/// From anywhere to anywhere, sent at any time; half of the requests whole.
struct Anything;

impl Placer for Anything {
    fn place(&mut self, _now: Nanos, request: &Request<'_>) -> Answer {
        let draw = request.number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let free: Vec<u32> = (0..8).filter(|at| !request.avoid.contains(at)).collect();
        let at = |draw: u64| free[draw as usize % free.len()];
        let (prefill, decode) = (at(draw), at(draw >> 8));
        let overlap = Overlap { after: nanos((draw >> 16 & 7) as f64 * 0.1), more_time: nanos(0.3) };
        match draw >> 20 & 3 {
            0 => Answer::Goes(Plan::Colocated { engine: decode }),
            1 => Answer::Goes(Plan::Disaggregated { prefill, decode }),
            _ => Answer::Overlaps(Plan::Disaggregated { prefill, decode }, overlap),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn nothing_is_lost_or_kept_whatever_fails(
        outages in proptest::collection::vec((0..8u32, 0.0..40.0f64, 0.001..3.0f64), 0..10),
        cut in proptest::option::of((0..8u32, 0.0..30.0f64, 0.0..2.0f64)),
        kv_tokens in prop_oneof![Just(400_000u64), 20_000..60_000u64],
        deadline_ms in prop_oneof![Just(10_000.0), 1.0..500.0f64],
        hold_seconds in prop_oneof![Just(60.0), 0.001..0.2f64],
        chunk in prop_oneof![Just(8192u32), 600..3000u32],
        seed in any::<u64>(),
    ) {
        let mut fleet = fleet(25.0);
        let mut outages: Vec<Outage> = outages
            .into_iter()
            .map(|(engine, from_seconds, takes)| Outage { engine, from_seconds, until_seconds: Some(from_seconds + takes) })
            .collect();
        outages.sort_by(|a, b| a.engine.cmp(&b.engine).then(a.from_seconds.total_cmp(&b.from_seconds)));
        outages.dedup_by(|b, a| a.engine == b.engine && a.until_seconds.is_some_and(|until| until >= b.from_seconds));
        let card = |(host, from_seconds, gbit)| Card { host, from_seconds, until_seconds: Some(35.0), gbit };
        (fleet.outages, fleet.cards) = (outages, cut.map(card).into_iter().collect());
        (fleet.engines[0].kv_tokens, fleet.engines[0].max_num_batched_tokens) = (kv_tokens, chunk);
        (fleet.control.pull_deadline_ms, fleet.control.hold_seconds) = (deadline_ms, hold_seconds);
        fleet.check().expect("consistent");
        // Debug builds check at the end of a run that nobody uses a block.
        let mut source = First::new(Generator::new(Shape::mix(), 8.0, 64, seed), 250);
        let (report, outcomes) = observe(&fleet, &mut source, &mut Anything);
        let ended = report.finished + report.refused + report.too_long + report.failed;
        prop_assert_eq!((report.requests, report.unfinished), (ended, 0));
        prop_assert_eq!(outcomes.len() as u64, report.finished);
        prop_assert!(report.retried <= report.requests * (MAX_ATTEMPTS as u64 - 1));
    }
}
