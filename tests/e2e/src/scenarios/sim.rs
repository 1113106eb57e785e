//! The simulator beside the live fleet: one script of 60 requests, in two modes, live and simulated.
//!
//! The script is 15 sessions of 4 turns behind three system prompts, sent as token ids, one request at a time: the engines of a test share few
//! cores, and two that compute at once slow one another down, which no engine's own constants say. Under one request at a time what is
//! calibrated is what happens, so a difference is the simulator's.
//!
//! Constants come from requests before it, on prompts of their own, each from what measures just it: prefill and decode from requests to one
//! engine, through the coordinator's own estimator; fixed cost and pace of a handoff from its second leg alone, by least squares
//! over what is pulled. The first leg is a prefill like any other. `a` holds all that a request costs besides its tokens, HTTP and the coordinator
//! included, so the simulated dispatch takes no time.
//!
//! Whatever is timed is sent [`PASSES`] times, and the quickest counts, in the calibration and of the script: where something else runs
//! on one of the few cores for a moment, a request takes twice as long, and neither fleet nor simulator can know. Passes over the script
//! alternate between the modes, each with empty caches.
//!
//! *Hit tokens* are the prompts' tokens less those that an engine computed, both live (the engines' counters) and simulated. A
//! prompt whose KV was pulled counts as pulled to its last token, though the engine computes that one again.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use baton_coordinator_core::speed::{DecodeSample, PrefillSample, SpeedEstimate};
use baton_fleet::{Part, Policy};
use baton_sim::decision::{Production, Speeds};
use baton_sim::engine::speed::Speed;
use baton_sim::fleet::{Control, Fleet, Kind, Links, Role};
use baton_sim::trace::{
    Arrival, Context, Conversation, Conversations, Generator, Length, Prompts, Rows, Said, Shape, Source,
    When,
};
use baton_sim::{nanos, sim};
use serde_json::json;
use tokio::time::Instant;

use crate::ask::{Answer, Ask};
use crate::bed::Bed;
use crate::report::Line;

/// Requests of the script, and turns of each of its sessions.
const REQUESTS: u64 = 60;
const TURNS: u32 = 4;
/// Tokens of each answer.
const OUTPUT: u32 = 12;
/// Between a request's end and the next one: KV events reach the index meanwhile.
const PAUSE: Duration = Duration::from_millis(200);
/// How often everything that is timed is sent.
const PASSES: usize = 2;
/// What may lie between live and simulated.
const TTFT_OFF: f64 = 0.15;
const HITS_OFF: f64 = 0.02;
const SEED: u64 = 4;
/// Between engines of one host where a handoff's pace is too fast to be measured, Gbit/s.
const FASTEST_GBIT: f64 = 200.0;

const MODES: [Policy; 2] = [Policy::Colocated, Policy::Disaggregated];

/// How long a hold may wait for its pull, in the calibration.
const LEASE_MS: u32 = 30_000;

/// What one mode came to.
struct Outcome {
    mean_ttft: Duration,
    prompt_tokens: u64,
    hit_tokens: u64,
}

/// What one mode's passes over the script came to, live.
#[derive(Default)]
struct Passes {
    /// Of each request, the quickest.
    ttfts: Vec<Duration>,
    /// Over all passes.
    prompt_tokens: u64,
    hit_tokens: u64,
}

impl Passes {
    fn outcome(&self) -> Outcome {
        let passes = PASSES as u64;
        Outcome {
            mean_ttft: self.ttfts.iter().sum::<Duration>() / REQUESTS as u32,
            prompt_tokens: self.prompt_tokens / passes,
            hit_tokens: self.hit_tokens / passes,
        }
    }
}

/// Keeps the smaller one of each place.
fn quicker(times: &mut Vec<Duration>, place: usize, time: Duration) {
    match times.get_mut(place) {
        Some(quickest) => *quickest = time.min(*quickest),
        None => times.push(time),
    }
}

pub(super) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let unit = (bed.scale.fault_tokens / 10) as u32;
    let block_tokens = bed.block_size() as u32;
    let prompts = prompts(bed, block_tokens).await?;
    let script = script(unit, block_tokens);
    let fleet = calibrate(bed, &prompts, unit, block_tokens).await.context("calibration")?;
    let mut constants = Line::new("sim.constants");
    let speed = fleet.engines[0].constants.context("they were measured")?;
    constants
        .figure("a_ms", speed.a)
        .figure("b_ms", speed.b)
        .figure("c_us", 1e3 * speed.c)
        .figure("step_ms", 1e3 * speed.decode_seconds(1, u64::from(4 * unit)))
        .figure("kv_kib", speed.kv_kib)
        .figure("handoff_rtt_ms", fleet.links.rtt_us / 1e3)
        .figure("handoff_gbit", fleet.links.local_gbit);
    let mut lines = vec![constants];
    let mut passes = MODES.map(|_| Passes::default());
    for pass in 0..PASSES {
        for (mode, passes) in MODES.into_iter().zip(&mut passes) {
            live(bed, &prompts, &script, mode, pass, passes).await.context(mode.as_str())?;
        }
    }
    let mut means = Vec::new();
    for (mode, passes) in MODES.into_iter().zip(&passes) {
        let live = passes.outcome();
        let simulated = simulated(&fleet, &script, block_tokens, mode)?;
        let off = |live: f64, simulated: f64| (simulated - live).abs() / live.max(1.0);
        let ttft_off = off(ms(live.mean_ttft), ms(simulated.mean_ttft));
        let hits_off = off(live.hit_tokens as f64, simulated.hit_tokens as f64);
        let mut line = Line::new(format!("sim.{}", mode.as_str()));
        line.figure("requests", REQUESTS)
            .figure("live_ttft_ms", ms(live.mean_ttft))
            .figure("sim_ttft_ms", ms(simulated.mean_ttft))
            .figure("ttft_off", ttft_off)
            .figure("prompt_tokens", live.prompt_tokens)
            .figure("live_hit_tokens", live.hit_tokens)
            .figure("sim_hit_tokens", simulated.hit_tokens)
            .figure("hits_off", hits_off)
            .check(live.prompt_tokens == simulated.prompt_tokens, || {
                format!("{} prompt tokens live, {} simulated", live.prompt_tokens, simulated.prompt_tokens)
            })
            .check(ttft_off <= TTFT_OFF, || format!("mean TTFT is off by {:.1} %", 100.0 * ttft_off))
            .check(hits_off <= HITS_OFF, || format!("hit tokens are off by {:.1} %", 100.0 * hits_off));
        means.push((live.mean_ttft, simulated.mean_ttft));
        lines.push(line);
    }
    let best = |of: fn(&(Duration, Duration)) -> Duration| {
        let at = if of(&means[0]) <= of(&means[1]) { 0 } else { 1 };
        MODES[at].as_str()
    };
    let (live, simulated) = (best(|means| means.0), best(|means| means.1));
    let mut winner = Line::new("sim.winner");
    winner
        .figure("live", live)
        .figure("sim", simulated)
        .check(live == simulated, || format!("{live} wins live, {simulated} simulated"));
    lines.push(winner);
    Ok(lines)
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e5).round() / 100.0
}

/// Prompts of token ids that are words of the model's vocabulary.
async fn prompts(bed: &mut Bed, block_tokens: u32) -> anyhow::Result<Prompts> {
    let text = bed.prompts.text(600);
    let body = json!({"model": bed.model(), "prompt": text, "add_special_tokens": false});
    let reply = bed.plain().post("/tokenize", &body, &[]).await?.ok()?.json()?;
    let ids = reply["tokens"].as_array().context("/tokenize: no tokens")?;
    let ids = ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect();
    Prompts::new(ids, block_tokens, SEED).context("/tokenize: too few distinct tokens")
}

/// The script: sessions with one of three system prompts each.
fn script(unit: u32, block_tokens: u32) -> Vec<Conversation> {
    let length = |mean: u32| Length { mean: mean.into(), sigma: 0.4, least: mean / 2, most: 2 * mean };
    let shape = Shape {
        weight: 1.0,
        prefixes: 3,
        skew: 0.0,
        prefix: Length::fixed(4 * unit),
        first: length(2 * unit),
        later: length(unit),
        output: Length::fixed(OUTPUT),
        turns: (TURNS, TURNS),
        pause_seconds: 0.0,
        most_context: u32::MAX,
    };
    Conversations::new(Generator::new(vec![shape], 1.0, block_tokens, SEED), REQUESTS).collect()
}

/// Sends one request of a session and reads its answer; also how long all of it took.
async fn send(
    bed: &Bed,
    prompts: &Prompts,
    said: &mut Said,
    arrival: &Arrival,
    policy: &str,
    session: &str,
) -> anyhow::Result<(Answer, Duration)> {
    let ask = ask(bed, prompts, said, arrival);
    let headers = [("x-baton-policy", policy), ("x-session-id", session)];
    let began = Instant::now();
    let answer = ask.send(&bed.coordinator(), &headers).await?;
    let took = began.elapsed();
    hear(said, &answer).await?;
    Ok((answer, took))
}

/// A request of a session.
fn ask(bed: &Bed, prompts: &Prompts, said: &mut Said, arrival: &Arrival) -> Ask {
    let own = arrival.session.unwrap_or(0) << 20 | u64::from(arrival.turn);
    let prompt = prompts.next(said, arrival, own).to_vec();
    Ask::completion(bed.model(), prompt, arrival.output_tokens).streamed()
}

/// Takes the answer into what was said, and pauses.
async fn hear(said: &mut Said, answer: &Answer) -> anyhow::Result<()> {
    let ids = answer.tokens.iter().map(|id| u32::try_from(*id)).collect::<Result<Vec<_>, _>>();
    said.answered(&ids.context("a token id beyond 32 bits")?);
    tokio::time::sleep(PAUSE).await;
    Ok(())
}

/// Empties the caches of both engines, and waits until the coordinator knows.
async fn forget(bed: &Bed) -> anyhow::Result<()> {
    bed.settled().await?;
    bed.empty_caches().await?;
    // vLLM tells of it with its next step, so it gets one to make, of less than a block.
    for engine in [Bed::PREFILL, Bed::DECODE] {
        Ask::completion(bed.model(), "Warm up.", 1).send(&bed.engine(engine), &[]).await?;
    }
    bed.until("the coordinator knows that caches are empty", async || {
        let owned: u64 = bed.fleet.operator().fleet().await?.iter().map(|engine| engine.owned_blocks).sum();
        Ok(if owned == 0 { Ok(()) } else { Err(format!("{owned} blocks are owned")) })
    })
    .await
}

/// A request of a new session of so many tokens, none of which another one begins with.
fn alone(name: u64, tokens: u32, block_tokens: u32) -> (Context, Arrival) {
    let mut context = Context::new(block_tokens);
    let session = (1 << 30) + name;
    let arrival = more(&mut context, session, 0, tokens);
    (context, arrival)
}

/// The request after it in its session, with so many tokens more.
fn more(context: &mut Context, session: u64, turn: u32, tokens: u32) -> Arrival {
    context.append(2 * session + (u64::from(turn) << 40), tokens);
    let prompt_tokens = context.tokens() as u32;
    context.append(2 * session + 1 + (u64::from(turn) << 40), OUTPUT);
    Arrival {
        when: When::At(0),
        session: Some(session),
        turn,
        prompt_tokens,
        new_tokens: tokens,
        output_tokens: OUTPUT,
        blocks: context.ids().into(),
    }
}

/// Measures the engines and handoffs between them: the fleet that is simulated.
async fn calibrate(bed: &mut Bed, prompts: &Prompts, unit: u32, block_tokens: u32) -> anyhow::Result<Fleet> {
    let lengths = [1, 2, 4, 6, 9].map(|units| units * unit);
    // Two turns for each length. What is cached before the second one is known: the first one's prompt and answer but for its last token.
    let turns: Vec<(u32, u32)> = lengths.into_iter().flat_map(|tokens| [(tokens, 0), (tokens, 1)]).collect();
    let known = |tokens: u32| (tokens + OUTPUT - 1) / block_tokens * block_tokens;
    let mut name = 0;
    let (mut ttfts, mut spoken, mut arrivals) = (Vec::new(), Vec::new(), Vec::new());
    let mut second_legs = Vec::new();
    for _ in 0..PASSES {
        arrivals.clear();
        for handed_off in [false, true] {
            let (mut context, mut said) = (Context::new(block_tokens), Said::default());
            for (place, (tokens, turn)) in turns.iter().copied().enumerate() {
                let arrival = match turn {
                    0 => {
                        name += 1;
                        said = Said::default();
                        let (began, first) = alone(name, tokens, block_tokens);
                        context = began;
                        first
                    }
                    _ => more(&mut context, (1 << 30) + name, 1, unit + tokens % 50),
                };
                if handed_off {
                    let time = second_leg(bed, prompts, &mut said, &arrival).await?;
                    quicker(&mut second_legs, place, time);
                } else {
                    // The second turn goes where the first one went.
                    let session = format!("sim-calibration-{name}");
                    let (answer, took) =
                        send(bed, prompts, &mut said, &arrival, "session_sticky", &session).await?;
                    quicker(&mut ttfts, place, answer.ttft);
                    quicker(&mut spoken, place, took - answer.ttft);
                    arrivals.push(arrival);
                }
            }
        }
    }
    let mut estimate = SpeedEstimate::default();
    let mut pulled = Vec::new();
    for (place, arrival) in arrivals.iter().enumerate() {
        let (tokens, turn) = turns[place];
        let cached = if turn == 0 { 0 } else { known(tokens) };
        estimate.observe_prefill(&prefill(arrival, cached, ttfts[place]));
        estimate.observe_decode(&decode(arrival, spoken[place]));
        pulled.push((f64::from(arrival.prompt_tokens - cached), second_legs[place].as_secs_f64()));
    }
    let learnt = estimate.speed();
    let (fixed, by_token) = line_through(&pulled);
    let kv_bytes = bed.block_bytes().await? as f64 / f64::from(block_tokens);
    let speed = Speed {
        a: 1e3 * learnt.request_seconds,
        b: 1e3 * learnt.token_seconds,
        c: 1e3 * learnt.attention_seconds,
        d: 1e3 * learnt.step_seconds,
        e: 1e3 * learnt.sequence_seconds,
        f: 1e3 * learnt.context_seconds,
        kv_kib: kv_bytes / 1024.0,
    };
    let metrics = bed.fleet.metrics(Part::Engine(Bed::PREFILL)).await?;
    let blocks = metrics.label("vllm:cache_config_info", "num_gpu_blocks").context("no num_gpu_blocks")?;
    // A second leg's fixed cost is a round trip before and one after the bytes, and the step that computes the prompt's last token.
    let last_token = speed.prefill_seconds(1, 0).max(speed.decode_seconds(0, 0));
    let local_gbit = if by_token > 0.0 { kv_bytes * 8e-9 / by_token } else { FASTEST_GBIT };
    Ok(Fleet {
        name: "the fleet under test".to_owned(),
        model: bed.model().to_owned(),
        engines: vec![Kind {
            gpu: "calibrated".to_owned(),
            count: 2,
            per_host: 2,
            role: Role::Both,
            kv_tokens: blocks.parse::<u64>().context("num_gpu_blocks")? * u64::from(block_tokens),
            max_num_seqs: 256,
            max_num_batched_tokens: 2048,
            chunked_prefill: true,
            host_kv_tokens: 0,
            host_gbit: FASTEST_GBIT,
            constants: Some(speed),
        }],
        links: Links {
            gbit: FASTEST_GBIT,
            choices: Vec::new(),
            efficiency: 1.0,
            transfer_gbit: None,
            spine_gbit: None,
            local_gbit: local_gbit.min(FASTEST_GBIT),
            rtt_us: 1e6 * ((fixed - last_token) / 2.0).max(0.0),
        },
        background: Vec::new(),
        outages: Vec::new(),
        cards: Vec::new(),
        control: Control { dispatch_us: 0.0, ..Control::default() },
        slo: None,
    })
}

/// Hands a request's prompt from one engine to the other; the time to the first token of the second leg, which pulls.
async fn second_leg(
    bed: &mut Bed,
    prompts: &Prompts,
    said: &mut Said,
    arrival: &Arrival,
) -> anyhow::Result<Duration> {
    let ask = ask(bed, prompts, said, arrival);
    let held = bed.hold(Bed::PREFILL, &ask, LEASE_MS).await?;
    let answer = bed.pull(Bed::DECODE, &ask, &held, bed.transfer_address(Bed::PREFILL)).await?;
    hear(said, &answer).await?;
    Ok(answer.ttft)
}

fn prefill(arrival: &Arrival, cached: u32, ttft: Duration) -> PrefillSample {
    PrefillSample {
        new: u64::from(arrival.prompt_tokens - cached),
        cached: cached.into(),
        seconds: ttft.as_secs_f64(),
        sequences: 0.0,
        context_tokens: 0.0,
    }
}

fn decode(arrival: &Arrival, spoken: Duration) -> DecodeSample {
    DecodeSample {
        tokens: u64::from(OUTPUT - 1),
        seconds: spoken.as_secs_f64(),
        stalled_seconds: 0.0,
        sequences: 1.0,
        context_tokens: f64::from(arrival.prompt_tokens) + f64::from(OUTPUT) / 2.0,
    }
}

/// The line of least squares, as its height at 0 and its slope; level where it would fall.
fn line_through(points: &[(f64, f64)]) -> (f64, f64) {
    let count = points.len().max(1) as f64;
    let mean = |of: &dyn Fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(&|point| point.0), mean(&|point| point.1));
    let spread = mean(&|point| (point.0 - x).powi(2));
    let together = mean(&|point| (point.0 - x) * (point.1 - y));
    let slope = if spread > 0.0 { (together / spread).max(0.0) } else { 0.0 };
    (y - slope * x, slope)
}

/// Sends the script to the coordinator.
async fn live(
    bed: &Bed,
    prompts: &Prompts,
    script: &[Conversation],
    policy: Policy,
    pass: usize,
    passes: &mut Passes,
) -> anyhow::Result<()> {
    forget(bed).await?;
    let before = bed.counters().await?;
    let (mut place, mut prompt_tokens) = (0, 0);
    for conversation in script {
        let mut said = Said::default();
        let session = format!("sim-{}-{pass}-{}", policy.as_str(), conversation.number);
        for turn in &conversation.turns {
            let (answer, _) = send(bed, prompts, &mut said, &turn.arrival, policy.as_str(), &session).await?;
            let mode = answer.header("x-baton-mode");
            ensure!(mode == policy.as_str(), "it was served {mode}");
            quicker(&mut passes.ttfts, place, answer.ttft);
            place += 1;
            prompt_tokens += answer.prompt_tokens;
        }
    }
    bed.settled().await?;
    let after = bed.counters().await?;
    let computed = |engine| {
        let local = [("source", "local_compute")];
        after.engine_labelled(&before, engine, "vllm:prompt_tokens_by_source_total", &local)
    };
    let computed = (computed(Bed::PREFILL) + computed(Bed::DECODE)) as u64;
    ensure!(computed > 0, "the engines count no computed tokens");
    passes.prompt_tokens += prompt_tokens;
    passes.hit_tokens += prompt_tokens.saturating_sub(computed);
    Ok(())
}

/// Runs the script in the simulator.
fn simulated(
    fleet: &Fleet,
    script: &[Conversation],
    block_tokens: u32,
    policy: Policy,
) -> anyhow::Result<Outcome> {
    let mut source = OneByOne {
        left: script
            .iter()
            .flat_map(|conversation| &conversation.turns)
            .map(|turn| turn.arrival.clone())
            .collect(),
        rows: Rows::default(),
    };
    let placer = Production::new(fleet, block_tokens, policy.as_str(), Speeds::Known)?;
    // A live request says it in its body.
    let mut placer = placer.with_max_tokens(OUTPUT.into());
    let report = sim::run(fleet, block_tokens, &mut source, &mut placer).report;
    ensure!(report.finished == REQUESTS, "{} of {REQUESTS} requests were simulated", report.finished);
    let computed: u64 = report.engines.iter().map(|engine| engine.prefill_tokens).sum();
    // An engine does not count the last token of a prompt that it pulled.
    let computed = computed - report.transfers;
    Ok(Outcome {
        mean_ttft: Duration::from_secs_f64(report.ttft_ms.mean / 1e3),
        prompt_tokens: report.prompt_tokens,
        hit_tokens: report.prompt_tokens.saturating_sub(computed),
    })
}

/// Requests one after the other, across sessions.
struct OneByOne {
    left: VecDeque<Arrival>,
    rows: Rows,
}

impl Source for OneByOne {
    fn open(&mut self) -> Option<Arrival> {
        // Only the first one waits for no other.
        if self.rows.good > 0 { None } else { self.follow(0) }
    }

    fn follow(&mut self, _session: u64) -> Option<Arrival> {
        let arrival = self.left.pop_front()?;
        let first = self.rows.good == 0;
        self.rows.good += 1;
        let when = if first { When::At(0) } else { When::After(nanos(PAUSE.as_secs_f64())) };
        Some(Arrival { when, ..arrival })
    }

    fn rows(&self) -> &Rows {
        &self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_has_sixty_requests_that_share_system_prompts() {
        let script = script(60, 32);
        assert_eq!(script.iter().map(|conversation| conversation.turns.len() as u64).sum::<u64>(), REQUESTS);
        let openings: std::collections::BTreeSet<u64> =
            script.iter().map(|conversation| conversation.turns[0].arrival.blocks[0]).collect();
        assert_eq!(openings.len(), 3);
    }

    #[test]
    fn of_each_place_the_quickest_time_counts() {
        let ms = Duration::from_millis;
        let mut times = Vec::new();
        for pass in [[4, 7, 5], [6, 3, 5]] {
            pass.into_iter().enumerate().for_each(|(place, time)| quicker(&mut times, place, ms(time)));
        }
        assert_eq!(times, [ms(4), ms(3), ms(5)]);
    }

    #[test]
    fn a_line_is_found_again_and_never_falls() {
        let (fixed, slope) = line_through(&[(1.0, 5.0), (2.0, 7.0), (4.0, 11.0)]);
        assert!((fixed - 3.0).abs() < 1e-9 && (slope - 2.0).abs() < 1e-9);
        assert_eq!(line_through(&[(1.0, 5.0), (2.0, 3.0)]), (4.0, 0.0));
        assert_eq!(line_through(&[(1.0, 5.0), (1.0, 3.0)]), (4.0, 0.0));
    }

    /// What would make the comparison idle: a simulator that says the same whatever the mode.
    #[test]
    fn the_simulated_modes_differ_and_sessions_hit() {
        let speed = Speed { a: 20.0, b: 2.7, c: 1e-4, d: 60.0, e: 0.1, f: 0.001, kv_kib: 45.0 };
        let fleet = Fleet {
            name: String::new(),
            model: "m".to_owned(),
            engines: vec![Kind {
                gpu: "calibrated".to_owned(),
                count: 2,
                per_host: 2,
                role: Role::Both,
                kv_tokens: 20_000,
                max_num_seqs: 256,
                max_num_batched_tokens: 2048,
                chunked_prefill: true,
                host_kv_tokens: 0,
                host_gbit: FASTEST_GBIT,
                constants: Some(speed),
            }],
            links: Links {
                gbit: 10.0,
                choices: Vec::new(),
                efficiency: 1.0,
                transfer_gbit: None,
                spine_gbit: None,
                local_gbit: 10.0,
                rtt_us: 5000.0,
            },
            background: Vec::new(),
            outages: Vec::new(),
            cards: Vec::new(),
            control: Control { dispatch_us: 0.0, ..Control::default() },
            slo: None,
        };
        let script = script(60, 32);
        let [colocated, handed_off] = MODES.map(|mode| simulated(&fleet, &script, 32, mode).unwrap());
        // A handoff adds a step for the last token, at the least.
        assert!(handed_off.mean_ttft > colocated.mean_ttft + Duration::from_millis(60));
        assert!(colocated.hit_tokens * 2 > colocated.prompt_tokens, "{}", colocated.hit_tokens);
        // Knowing how short the answers are, the decision computes no block that either engine has.
        assert_eq!(handed_off.hit_tokens, colocated.hit_tokens);
    }
}
