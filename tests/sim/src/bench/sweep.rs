//! Which mode wins where: over prompt length, hit rate and link speed.
//!
//! At each point all prompts have one length, of which a part is one of a few texts that many share, as large as the hit rate, and the rest is
//! each one's own. For each mode the [capacity](super::capacity) is found. So that long prompts are possible at all, the SLO for the first token is the
//! fleet's, or [`PATIENCE`] times what the prompt's prefill takes alone where that is more.

use serde::Serialize;

use super::capacity::capacity;
use super::chart::{Field, Map, number};
use super::mode::Mode;
use super::oracle;
use super::page::Page;
use super::run::{Bench, BenchError};
use super::workload::Workload;
use crate::fleet::{Fleet, Slo};
use crate::trace::{Length, Shape};

/// See the module's text.
pub const PATIENCE: f64 = 4.0;
/// Capacities are found as close as this.
const PRECISION: f64 = 0.04;
/// Texts that prompts share, for each engine.
const TEXTS: u64 = 2;

/// What is gone through.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// Prompt lengths.
    pub tokens: Vec<u32>,
    /// Shares of a prompt that are one of the common texts.
    pub hits: Vec<f64>,
    /// Widths of hosts' cards.
    pub gbit: Vec<f64>,
    /// Tokens of output.
    pub output_tokens: u32,
    /// Requests of each run.
    pub requests: u64,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Of all workloads.
    pub seed: u64,
}

/// A point, and what each mode reaches there.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Tokens of a prompt.
    pub tokens: u32,
    /// The part of it that is common.
    pub hits: f64,
    /// Width of hosts' cards.
    pub gbit: f64,
    /// Requests per second within both SLOs at the capacity, by mode.
    pub goodput: Vec<(String, f64)>,
    /// The static mode that reaches most.
    pub best_static: String,
    /// Adaptive's goodput over co-location's, and over that of the best split.
    pub over_colocated: f64,
    /// See there.
    pub over_split: f64,
    /// The best split's over co-location's: above 1, splitting wins.
    pub split_over_colocated: f64,
    /// Of adaptive's requests, the share that was handed off.
    pub handed_off: f64,
    /// And the share that pulled a prefix.
    pub pulled: f64,
}

impl Sweep {
    /// All points.
    pub fn points(&self) -> Vec<(u32, f64, f64)> {
        let mut points = Vec::new();
        for gbit in &self.gbit {
            for tokens in &self.tokens {
                points.extend(self.hits.iter().map(|hits| (*tokens, *hits, *gbit)));
            }
        }
        points
    }

    fn workload(&self, engines: u64, tokens: u32, hits: f64) -> Workload {
        let common = (f64::from(tokens) * hits).round() as u32;
        let shape = Shape {
            prefixes: if common > 0 { TEXTS * engines } else { 0 },
            prefix: Length::fixed(common),
            ..Shape::single(Length::fixed(tokens - common), Length::fixed(self.output_tokens))
        };
        let name = format!("{tokens} tokens, {hits} hit");
        Workload::generated(&name, vec![shape], self.block_tokens, self.seed).with_requests(self.requests)
    }

    /// Goes through all points; those that were done when the bench was stopped are kept.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn run(
        &self,
        bench: &Bench<'_>,
        fleet: &Fleet,
        modes: &[Mode],
        done: &(dyn Fn() + Sync),
    ) -> Result<Vec<Point>, BenchError> {
        let points = self.points();
        let work = |point: &(u32, f64, f64)| self.point(bench, fleet, modes, *point);
        Ok(bench.all(&points, work, &|_| done())?.into_iter().flatten().collect())
    }

    fn point(
        &self,
        bench: &Bench<'_>,
        fleet: &Fleet,
        modes: &[Mode],
        (tokens, hits, gbit): (u32, f64, f64),
    ) -> Result<Point, BenchError> {
        let mut fleet = fleet.with_gbit(gbit);
        let alone = fleet.members()[0].speed.prefill_seconds(u64::from(tokens), 0) * 1e3;
        if let Some(slo) = fleet.slo {
            fleet.slo = Some(Slo { ttft_ms: slo.ttft_ms.max(PATIENCE * alone), ..slo });
        }
        let workload = self.workload(fleet.len() as u64, tokens, hits);
        let mut source = workload
            .open(1.0)
            .map_err(|error| BenchError::Workload { workload: workload.to_string(), error })?;
        let most = oracle::bound(&fleet, self.block_tokens, &mut *source).most_goodput(1.0);
        let mut point = Point {
            tokens,
            hits,
            gbit,
            goodput: Vec::new(),
            best_static: String::new(),
            over_colocated: 0.0,
            over_split: 0.0,
            split_over_colocated: 0.0,
            handed_off: 0.0,
            pulled: 0.0,
        };
        let (mut colocated, mut split, mut adaptive) = (0.0f64, 0.0f64, 0.0);
        for mode in modes {
            let found = capacity(bench, &fleet, mode, &workload, most / 2.0, PRECISION)?;
            let goodput = found.goodput();
            if mode.is_static() && goodput > colocated.max(split) {
                point.best_static = mode.to_string();
            }
            match mode {
                mode if *mode == Mode::COLOCATED => colocated = goodput,
                mode if mode.is_static() => split = split.max(goodput),
                mode if *mode == Mode::ADAPTIVE => {
                    adaptive = goodput;
                    if let Some(run) = &found.run {
                        let share = |part: u64| part as f64 / run.report.finished.max(1) as f64;
                        point.handed_off = share(run.report.plans.disaggregated);
                        point.pulled = share(run.report.plans.pull);
                    }
                }
                _ => {}
            }
            point.goodput.push((mode.to_string(), goodput));
        }
        let over = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        point.over_colocated = over(adaptive, colocated);
        point.over_split = over(adaptive, split);
        point.split_over_colocated = over(split, colocated);
        Ok(point)
    }

    /// Maps of where the decision flips, one for each width.
    pub fn show(&self, page: &mut Page, fleet: &Fleet, points: &[Point]) {
        page.section("Where the decision flips");
        page.text(&format!(
            "Fleet: {}. At each point all prompts have one length, a part of it (the hit rate) is one of {} texts that prompts share; {} tokens of output. \
             Capacity: the highest rate at which 90 % of {} requests are within both SLOs; the SLO for the first token is the fleet's or {} times the \
             prompt's prefill alone, whichever is longer.",
            fleet.name,
            TEXTS * fleet.len() as u64,
            self.output_tokens,
            self.requests,
            PATIENCE
        ));
        page.note(
            "Blue: a static split carries more than co-location; orange: co-location carries more. The first line is that ratio, \
             the second the share of requests that adaptive handed off (h) or served with a pulled prefix (p).",
        );
        let map = |gbit: f64, title: String, field: &dyn Fn(&Point) -> Field| Map {
            title,
            labels: ["prompt tokens".to_owned(), "hit rate".to_owned()],
            rows: self.tokens.iter().map(|tokens| tokens.to_string()).collect(),
            columns: self.hits.iter().map(|hits| format!("{:.0} %", 100.0 * hits)).collect(),
            fields: self
                .tokens
                .iter()
                .map(|tokens| {
                    let of = |hits: &f64| {
                        let at =
                            |point: &&Point| (point.tokens, point.hits, point.gbit) == (*tokens, *hits, gbit);
                        points.iter().find(at).map(field)
                    };
                    self.hits.iter().map(of).collect()
                })
                .collect(),
        };
        let flip = |point: &Point| Field {
            value: point.split_over_colocated.ln() / 1.5f64.ln(),
            text: [
                format!("{}x", number(point.split_over_colocated)),
                format!("h {:.0} % p {:.0} %", 100.0 * point.handed_off, 100.0 * point.pulled),
            ],
        };
        let gain = |point: &Point| {
            let best = point.over_colocated.min(point.over_split);
            let best = if best > 0.0 { best } else { point.over_colocated.max(point.over_split) };
            Field {
                value: best.ln() / 1.5f64.ln(),
                text: [format!("{}x", number(best)), point.best_static.clone()],
            }
        };
        let maps = |title: &str, field: &dyn Fn(&Point) -> Field| -> Vec<String> {
            let one = |gbit: &f64| map(*gbit, format!("{title}, {gbit} Gbit/s"), field).svg();
            self.gbit.iter().map(one).collect()
        };
        page.figures(&maps("Best split over co-located", &flip));
        page.note("Adaptive over the best static mode, which the second line names:");
        page.figures(&maps("Adaptive over best static", &gain));
    }
}
