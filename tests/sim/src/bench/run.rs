//! One mode, one workload, one rate; and many of them at once.

use std::ops::ControlFlow;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::mode::{Mode, ModeError};
use super::workload::Workload;
use crate::decision::Speeds;
use crate::fleet::Fleet;
use crate::sim::{self, Distributions, Durations, Report, Window};
use crate::trace::Source;

/// Requests after which a run looks whether it is to stop.
const PATIENCE: u64 = 64;

/// Why a run could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The fleet cannot run in the mode.
    #[error("{mode}: {error}")]
    Mode {
        /// Which.
        mode: Mode,
        /// Why.
        error: ModeError,
    },
    /// The workload's file cannot be read.
    #[error("{workload}: {error}")]
    Workload {
        /// Which.
        workload: String,
        /// Why.
        error: std::io::Error,
    },
    /// Somebody asked to stop.
    #[error("stopped")]
    Stopped,
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Run {
    /// In figures.
    pub report: Report,
    /// In full.
    pub distributions: Distributions,
    /// Time to first token of the turns after a session's first.
    pub later_ttft: Durations,
}

/// How runs are made: what they have in common.
pub struct Bench<'a> {
    /// How the decision knows how fast engines are.
    pub speeds: Speeds,
    /// Threads that runs are spread over, at least 1.
    pub threads: usize,
    /// Set by whoever wants the bench to end early. What was done then is kept.
    pub stop: &'a AtomicBool,
    /// Called now and then from within a run, with how many more requests have ended.
    pub progress: &'a (dyn Fn(u64) + Sync),
}

impl Bench<'_> {
    /// Runs a workload to its end, or in a [steady state](Workload::steady) where it has one and the fleet has SLOs.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn run(&self, fleet: &Fleet, mode: &Mode, workload: &Workload, rate: f64) -> Result<Run, BenchError> {
        self.run_within(fleet, mode, workload, rate, u64::MAX)
    }

    /// Runs a workload once from its beginning to its end, or until the bench is stopped: the run so far then.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn replay(
        &self,
        fleet: &Fleet,
        mode: &Mode,
        workload: &Workload,
        rate: f64,
    ) -> Result<Run, BenchError> {
        let source = Self::whole(workload, rate)?;
        self.simulate(fleet, mode, workload.block_tokens(), source, u64::MAX)
    }

    /// As [`Bench::run`], or until more than so many requests have missed the SLOs.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn run_within(
        &self,
        fleet: &Fleet,
        mode: &Mode,
        workload: &Workload,
        rate: f64,
        most_missed: u64,
    ) -> Result<Run, BenchError> {
        let source = match fleet.slo.and_then(|slo| workload.steady(rate, &slo)) {
            Some(steady) => steady,
            None => Self::whole(workload, rate)?,
        };
        let run = self.simulate(fleet, mode, workload.block_tokens(), source, most_missed)?;
        if self.stopped() { Err(BenchError::Stopped) } else { Ok(run) }
    }

    fn whole(workload: &Workload, rate: f64) -> Result<(Box<dyn Source>, Window), BenchError> {
        let unreadable = |error| BenchError::Workload { workload: workload.to_string(), error };
        Ok((workload.open(rate).map_err(unreadable)?, Window::ALL))
    }

    fn simulate(
        &self,
        fleet: &Fleet,
        mode: &Mode,
        block_tokens: u32,
        (mut source, window): (Box<dyn Source>, Window),
        most_missed: u64,
    ) -> Result<Run, BenchError> {
        let of_mode = |error| BenchError::Mode { mode: *mode, error };
        let shaped = mode.fleet(fleet).map_err(of_mode)?;
        let mut placer = mode.placer(&shaped, block_tokens, self.speeds).map_err(of_mode)?;
        let (mut later_ttft, mut missed, mut seen) = (Durations::default(), 0, 0u64);
        let results =
            sim::run_observed(&shaped, block_tokens, &mut *source, &mut *placer, window, &mut |outcome| {
                if let Some(outcome) = outcome.filter(|outcome| outcome.turn > 0) {
                    later_ttft.record(outcome.ttft);
                }
                seen += 1;
                let within = |slo| outcome.is_some_and(|outcome| outcome.within(&slo));
                missed += u64::from(fleet.slo.is_some_and(|slo| !within(slo)));
                let looks = seen.is_multiple_of(PATIENCE);
                if looks {
                    (self.progress)(PATIENCE);
                }
                match missed > most_missed || (looks && self.stopped()) {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            });
        Ok(Run { report: results.report, distributions: results.distributions, later_ttft })
    }

    /// Whether the bench is to end.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Does all of these, over [`Bench::threads`] threads, and gives the results in their order. `done` is called after each. What was not done
    /// because the bench was stopped is `None`.
    ///
    /// # Errors
    /// The first in order, but [`BenchError::Stopped`].
    pub fn all<T: Sync, R: Send>(
        &self,
        items: &[T],
        work: impl Fn(&T) -> Result<R, BenchError> + Sync,
        done: &(dyn Fn(&T) + Sync),
    ) -> Result<Vec<Option<R>>, BenchError> {
        let next = AtomicUsize::new(0);
        let results: Vec<Mutex<Option<Result<R, BenchError>>>> =
            items.iter().map(|_| Mutex::new(None)).collect();
        let worker = || {
            while let Some(at) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|at| *at < items.len()) {
                if self.stopped() {
                    return;
                }
                let result = work(&items[at]);
                if result.is_ok() {
                    done(&items[at]);
                }
                *results[at].lock().expect("no holder panics") = Some(result);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.threads.min(items.len()) {
                scope.spawn(worker);
            }
            worker();
        });
        let taken = results.into_iter().map(|result| result.into_inner().expect("no holder panics"));
        taken
            .map(|result| match result {
                None | Some(Err(BenchError::Stopped)) => Ok(None),
                Some(result) => result.map(Some),
            })
            .collect()
    }
}
