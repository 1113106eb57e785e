//! Set-ups whose results others published, so that ours stand beside them.
//!
//! Each compares ways to run the same engines on the same requests: the base first, then what was published as better. Figures of ours
//! are simulated on the constants of [`crate::engine::speed`]; the published ones were measured on other hardware and traces, so shapes
//! can be compared, and not digits.

use serde::Serialize;

use super::capacity::{ATTAINMENT, PRECISION, capacity};
use super::mode::Mode;
use super::page::Page;
use super::run::{Bench, BenchError};
use super::workload::Workload;
use crate::fleet::{Fleet, Slo};
use crate::sim::Report;
use crate::trace::{Length, Shape};

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Measure {
    /// Requests per second within both SLOs at the highest rate at which 90 % of all are; more is better. The guess at it,
    /// in sessions per second.
    Goodput(f64),
    /// Mean time to first token of the turns after a session's first, at this rate; less is better.
    LaterTtft(f64),
}

/// A set-up.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// What is compared with what, on which requests.
    pub what: &'static str,
    /// Who published what.
    pub published: &'static str,
    measure: Measure,
    workload: Workload,
    /// Names, fleets and modes. The best of the first [`Scenario::bases`] is the base.
    ways: Vec<(String, Fleet, Mode)>,
    bases: usize,
}

/// What a way reaches.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Way {
    /// Its name.
    pub name: String,
    /// Requests per second, or milliseconds.
    pub value: f64,
    /// Over the base's.
    pub over_base: f64,
    /// Of all requests, the share handed off.
    pub handed_off: f64,
    /// Tokens found, of all tokens of prompts.
    pub hit_rate: f64,
    /// Of all requests, the share whose first token came too late at that rate.
    pub late: f64,
    /// And the share whose other tokens came too slowly: the larger of the two is what limits the rate.
    pub slow: f64,
    /// Mean share of their time that engines computed.
    pub utilisation: f64,
}

/// What a set-up comes to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// The set-up's name.
    pub name: &'static str,
    /// Its text.
    pub what: &'static str,
    /// Who published what.
    pub published: &'static str,
    /// What values are.
    pub unit: &'static str,
    /// What no policy can exceed, over the base's value.
    pub most_over_base: Option<f64>,
    /// All ways; the base has an `over_base` of 1.
    pub ways: Vec<Way>,
}

/// All set-ups, on so many engines of an H100 with an 8B model as `fleet` has.
pub fn all(fleet: &Fleet, block_tokens: u32, seed: u64) -> Vec<Scenario> {
    vec![
        naive(fleet, block_tokens, seed),
        tight(fleet, block_tokens, seed),
        append(fleet, block_tokens, seed),
    ]
}

fn with_slo(fleet: &Fleet, ttft_ms: f64, tpot_ms: f64) -> Fleet {
    Fleet { slo: Some(Slo { ttft_ms, tpot_ms }), ..fleet.clone() }
}

fn splits(fleet: &Fleet) -> Vec<Mode> {
    Mode::statics(fleet.len() as u32).into_iter().filter(|mode| *mode != Mode::COLOCATED).collect()
}

fn way(fleet: &Fleet, mode: Mode) -> (String, Fleet, Mode) {
    (mode.to_string(), fleet.clone(), mode)
}

fn naive(fleet: &Fleet, block_tokens: u32, seed: u64) -> Scenario {
    let shape = Shape {
        prefixes: 4,
        skew: 0.5,
        prefix: Length { mean: 6000.0, sigma: 0.3, least: 2000, most: 12_000 },
        first: Length { mean: 95_000.0, sigma: 0.15, least: 60_000, most: 125_000 },
        later: Length { mean: 1500.0, sigma: 0.8, least: 50, most: 10_000 },
        output: Length { mean: 250.0, sigma: 0.6, least: 20, most: 1500 },
        turns: (4, 10),
        pause_seconds: 5.0,
        most_context: 150_000,
        ..Shape::agent()
    };
    let fleet = with_slo(fleet, 12_000.0, 50.0);
    let bases = splits(&fleet);
    let named = |mode: &Mode| format!("naive@{mode}").parse().expect("a mode");
    let mut ways: Vec<(String, Fleet, Mode)> = bases.iter().map(|mode| way(&fleet, named(mode))).collect();
    ways.extend(bases.iter().map(|mode| way(&fleet, *mode)));
    ways.extend([Mode::COLOCATED, Mode::ADAPTIVE].map(|mode| way(&fleet, mode)));
    Scenario {
        name: "naive disaggregation, long agentic prompts",
        what: "Agent sessions of 4 to 10 calls on contexts over 100K tokens; the same engines as naive disaggregation (engines in turn, \
               no look at caches; the best of its splits is the base), as cache-aware splits, co-located and adaptive. First token within 12 s, 50 ms a token, 90 %.",
        published: "Together, cache-aware disaggregation: 35 to 40 % over naive disaggregation at equal GPUs, prompts over 100K",
        measure: Measure::Goodput(0.3),
        workload: Workload::generated("long agents", vec![shape], block_tokens, seed).with_requests(1000),
        bases: bases.len(),
        ways,
    }
}

fn tight(fleet: &Fleet, block_tokens: u32, seed: u64) -> Scenario {
    let shape = Shape::single(
        Length { mean: 4000.0, sigma: 0.4, least: 500, most: 12_000 },
        Length { mean: 100.0, sigma: 0.5, least: 20, most: 400 },
    );
    // At 100 Gbit/s the one card between prefill and decode engines is the limit, whatever the split.
    let fleet = with_slo(fleet, 400.0, 10.0).with_gbit(400.0);
    let with_chunks = |tokens: u32, chunked_prefill: bool| {
        let mut changed = fleet.clone();
        for kind in &mut changed.engines {
            (kind.max_num_batched_tokens, kind.chunked_prefill) = (tokens, chunked_prefill);
        }
        changed
    };
    let (whole, chunked) = (with_chunks(16_384, false), with_chunks(2048, true));
    let least_loaded: Mode = "least_loaded".parse().expect("a mode");
    let mut ways = vec![
        ("co-located, no chunks, least loaded".to_owned(), whole, least_loaded),
        ("co-located, chunks of 2,048, least loaded".to_owned(), chunked, least_loaded),
        way(&fleet, Mode::COLOCATED),
    ];
    ways.extend(splits(&fleet).into_iter().map(|mode| way(&fleet, mode)));
    ways.push(way(&fleet, Mode::ADAPTIVE));
    Scenario {
        name: "tight joint SLO, without and with chunked prefill",
        what: "Single requests of 4,000 tokens in and 100 out on average, nothing in common, 400 Gbit/s. First token within 400 ms, 10 ms a token, 90 %. The base is \
               co-location without chunked prefill; co-location with it stands beside.",
        published: "DistServe: 4.48x goodput over engines without chunked prefill at a tight joint SLO and 90 % attainment; against chunked prefill 1.1x to 1.6x is to be expected",
        measure: Measure::Goodput(10.0),
        workload: Workload::generated("single requests", vec![shape], block_tokens, seed).with_requests(4000),
        ways,
        bases: 1,
    }
}

fn append(fleet: &Fleet, block_tokens: u32, seed: u64) -> Scenario {
    let shape = Shape {
        prefixes: 8,
        prefix: Length { mean: 600.0, sigma: 0.4, least: 100, most: 2000 },
        first: Length { mean: 6000.0, sigma: 0.5, least: 500, most: 20_000 },
        later: Length { mean: 150.0, sigma: 0.8, least: 10, most: 1000 },
        output: Length { mean: 300.0, sigma: 0.6, least: 20, most: 1500 },
        turns: (4, 8),
        pause_seconds: 10.0,
        most_context: 40_000,
        ..Shape::chat()
    };
    let half = fleet.len() as u32 / 2;
    let split = Mode::split(half, fleet.len() as u32 - half);
    let fleet = fleet.with_gbit(25.0);
    let appends = format!("adaptive@{split}").parse().expect("a mode");
    Scenario {
        name: "append-prefill",
        what: "Conversations of 4 to 8 turns on 6,000 tokens, 25 Gbit/s. Half of the engines prefill, half decode. The base hands every turn off; adaptive on the same split may \
               compute a later turn's new tokens where the conversation decodes. Mean time to first token of later turns.",
        published: "PPD: 68 % lower time to first token of later turns",
        measure: Measure::LaterTtft(1.0),
        workload: Workload::generated("conversations", vec![shape], block_tokens, seed).with_requests(4000),
        ways: vec![way(&fleet, split), way(&fleet, appends), way(&fleet, Mode::ADAPTIVE)],
        bases: 1,
    }
}

/// A part of a run's requests, as a share.
fn part(report: &Report, requests: u64) -> f64 {
    requests as f64 / report.requests.max(1) as f64
}

impl Scenario {
    /// Ways to run it.
    pub fn ways(&self) -> usize {
        self.ways.len()
    }

    /// Runs all ways; `None` where the bench was stopped before all were done.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn run(&self, bench: &Bench<'_>, done: &(dyn Fn() + Sync)) -> Result<Option<Outcome>, BenchError> {
        let workload = self
            .workload
            .clone()
            .recorded()
            .map_err(|error| BenchError::Workload { workload: self.workload.to_string(), error })?;
        let work = |(name, fleet, mode): &(String, Fleet, Mode)| {
            let (value, run) = match self.measure {
                Measure::Goodput(guess) => {
                    let found = capacity(bench, fleet, mode, &workload, guess, PRECISION)?;
                    (found.goodput(), found.run)
                }
                Measure::LaterTtft(rate) => {
                    let run = bench.run(fleet, mode, &workload, rate)?;
                    (run.later_ttft.mean_seconds() * 1e3, Some(run))
                }
            };
            let report = run.map(|run| run.report);
            let of = |figure: fn(&Report) -> f64| report.as_ref().map_or(0.0, figure);
            Ok::<Way, BenchError>(Way {
                name: name.clone(),
                value,
                over_base: 0.0,
                handed_off: of(|report| part(report, report.plans.disaggregated)),
                hit_rate: of(|report| report.hit_rate),
                late: of(|report| part(report, report.late_first_token)),
                slow: of(|report| part(report, report.slow_tokens)),
                utilisation: of(|report| {
                    let all = report.engines.iter().map(|engine| engine.utilisation);
                    all.sum::<f64>() / report.engines.len() as f64
                }),
            })
        };
        let found: Option<Vec<Way>> = bench.all(&self.ways, work, &|_| done())?.into_iter().collect();
        let Some(mut ways) = found else { return Ok(None) };
        let bases = ways[..self.bases].iter().map(|way| way.value);
        let (base, unit) = match self.measure {
            Measure::Goodput(_) => (bases.fold(0.0, f64::max), "requests/s within both SLOs"),
            Measure::LaterTtft(_) => (bases.fold(f64::INFINITY, f64::min), "ms, later turns"),
        };
        for way in &mut ways {
            way.over_base = if base > 0.0 { way.value / base } else { 0.0 };
        }
        let most_over_base = match (self.measure, self.ways.last()) {
            (Measure::Goodput(_), Some((_, fleet, _))) if base > 0.0 => {
                let bound = workload
                    .bound(fleet, 1.0)
                    .map_err(|error| BenchError::Workload { workload: workload.to_string(), error })?;
                Some(bound.most_goodput(ATTAINMENT) / base)
            }
            _ => None,
        };
        let (name, what, published) = (self.name, self.what, self.published);
        Ok(Some(Outcome { name, what, published, unit, most_over_base, ways }))
    }
}

impl Outcome {
    /// What limits the base and the best way, and how much there was to gain.
    pub fn limits(&self) -> String {
        let limit = |way: &Way| {
            let missed = format!("{:.1} % late, {:.1} % slow", 100.0 * way.late, 100.0 * way.slow);
            format!("{} ({missed}, {:.0} % busy)", way.name, 100.0 * way.utilisation)
        };
        let is_less_better = self.most_over_base.is_none();
        let rank = |way: &&Way| if is_less_better { -way.over_base } else { way.over_base };
        let base = self.ways.iter().find(|way| way.over_base == 1.0);
        let best = self.ways.iter().max_by(|a, b| rank(a).total_cmp(&rank(b)));
        let (Some(base), Some(best)) = (base, best) else { return String::new() };
        let most = self.most_over_base.map_or_else(String::new, |most| {
            format!(" On these requests no policy can come above {most:.2}x (the oracle's bound).")
        });
        format!(
            "Here: the base is {}, the best {} at {:.2}x.{most}",
            limit(base),
            limit(best),
            best.over_base
        )
    }
}

/// The section of the report.
pub fn show(page: &mut Page, outcomes: &[Outcome]) {
    page.section("Set-ups that others published");
    page.text(
        "Simulated on modelled constants; the published figures were measured on other hardware and traces.",
    );
    for outcome in outcomes {
        page.part(outcome.name);
        page.text(outcome.what);
        page.note(&format!("Published: {}", outcome.published));
        let rows: Vec<Vec<String>> = outcome
            .ways
            .iter()
            .map(|way| {
                vec![
                    way.name.clone(),
                    format!("{:.2}", way.value),
                    format!("{:.2}x", way.over_base),
                    format!("{:.1} %", 100.0 * way.hit_rate),
                    format!("{:.0} %", 100.0 * way.handed_off),
                    format!("{:.1} %", 100.0 * way.late),
                    format!("{:.1} %", 100.0 * way.slow),
                    format!("{:.0} %", 100.0 * way.utilisation),
                ]
            })
            .collect();
        page.table(
            &["way", outcome.unit, "over the base", "hit rate", "handed off", "late", "slow", "busy"],
            &rows,
        );
        page.text(&outcome.limits());
        page.note("Late: first tokens that missed their SLO there; slow: requests whose other tokens did; busy: the share of their time that engines computed.");
    }
}
