//! The highest rate at which the SLOs are kept.
//!
//! By bisection on the rate's logarithm: from a guess, rates are doubled or halved until one keeps the SLOs and twice it does not, then the interval
//! is halved until its ends differ by at most [`PRECISION`]. All rates are of one seed, so a request is the same at all of them. A
//! rate that misses is given up as soon as it has missed too often. What is in a closed loop is measured in a [steady state](Workload::steady).
//! A rate may miss by chance and a higher one not: plans come at other times, and in a closed loop one request that is turned away takes all later ones of its session with it. So
//! [`BEYOND`] rates above the highest one that was found are tried, too, and as many above any of these that keeps the SLOs.

use serde::Serialize;

use super::mode::Mode;
use super::run::{Bench, BenchError, Run};
use super::workload::Workload;
use crate::fleet::Fleet;

/// Share of requests that must be served within both SLOs.
pub const ATTAINMENT: f64 = 0.9;
/// How close the highest rate that keeps them is to one that does not.
pub const PRECISION: f64 = 0.01;
/// Rates that are tried above the highest one that was found, in steps of the precision.
pub const BEYOND: u32 = 8;
/// Rates are tried down to the guess over this, and up to as many times the guess.
const WIDEST: f64 = 64.0;

/// A rate that was tried.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Probe {
    /// The rate, in the workload's unit.
    pub rate: f64,
    /// Whether it keeps the SLOs.
    pub kept: bool,
    /// Share of requests within both; of a rate that misses, not known.
    pub attainment: Option<f64>,
    /// Requests within both, per second.
    pub goodput_per_second: Option<f64>,
}

/// The highest rate, and what it took to find it.
#[derive(Clone, Debug)]
pub struct Capacity {
    /// The highest rate that keeps the SLOs; 0 where none does.
    pub rate: f64,
    /// The run at that rate.
    pub run: Option<Run>,
    /// All rates that were tried, in order.
    pub probes: Vec<Probe>,
    /// What a rate of 1 offers ([`Workload::offered_per_second`]).
    offered_per_second: f64,
}

impl Capacity {
    /// Requests within both SLOs at that rate, per second of the time in which sessions begin: what is offered at that rate, times the share within. In
    /// a steady state as many requests come per second.
    pub fn goodput(&self) -> f64 {
        self.run.as_ref().map_or(0.0, |run| self.rate * self.offered_per_second * run.report.attainment)
    }
}

/// When more than so many requests miss, the rate is given up. In a steady state about as many are measured in a lap as the workload has, so
/// a quarter more may miss before nothing can mend it.
fn may_miss(fleet: &Fleet, workload: &Workload, rate: f64) -> u64 {
    let laps = fleet.slo.and_then(|slo| workload.laps(rate, &slo));
    let part = laps.map_or(1.0, |laps| 1.25 * laps as f64);
    let most = |requests: u64| (requests as f64 * (1.0 - ATTAINMENT) * part).floor() as u64;
    workload.requests().map_or(u64::MAX, most)
}

/// Finds it, from a guess at the rate. `precision`: [`PRECISION`], or coarser.
///
/// # Errors
/// See [`BenchError`].
pub fn capacity(
    bench: &Bench<'_>,
    fleet: &Fleet,
    mode: &Mode,
    workload: &Workload,
    guess: f64,
    precision: f64,
) -> Result<Capacity, BenchError> {
    let workload = &workload
        .clone()
        .recorded()
        .map_err(|error| BenchError::Workload { workload: workload.to_string(), error })?;
    let offered_per_second = workload.offered_per_second().unwrap_or(0.0);
    let mut found = Capacity { rate: 0.0, run: None, probes: Vec::new(), offered_per_second };
    let mut keeps = |rate: f64| -> Result<bool, BenchError> {
        let run = bench.run_within(fleet, mode, workload, rate, may_miss(fleet, workload, rate))?;
        // A run that was given up has requests under way.
        let kept = run.report.unfinished == 0 && run.report.attainment >= ATTAINMENT;
        found.probes.push(Probe {
            rate,
            kept,
            attainment: kept.then_some(run.report.attainment),
            goodput_per_second: kept.then_some(run.report.goodput_per_second),
        });
        if kept && rate > found.rate {
            (found.rate, found.run) = (rate, Some(run));
        }
        Ok(kept)
    };
    let (mut low, mut high) = (guess, guess);
    if keeps(guess)? {
        loop {
            high *= 2.0;
            if high > guess * WIDEST || !keeps(high)? {
                break;
            }
            low = high;
        }
    } else {
        loop {
            low /= 2.0;
            if low < guess / WIDEST {
                return Ok(found);
            }
            if keeps(low)? {
                break;
            }
            high = low;
        }
    }
    while high / low > 1.0 + precision {
        let middle = (low * high).sqrt();
        if keeps(middle)? { low = middle } else { high = middle }
    }
    let mut missed = 0;
    while missed < BEYOND && low < guess * WIDEST {
        low *= 1.0 + precision;
        missed = if keeps(low)? { 0 } else { missed + 1 };
    }
    Ok(found)
}
