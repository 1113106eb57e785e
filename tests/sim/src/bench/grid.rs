//! Adaptive beside the best static mode, on traces, fleets and links.

use serde::Serialize;

use super::capacity::{ATTAINMENT, Capacity, PRECISION, capacity};
use super::mode::Mode;
use super::oracle;
use super::page::Page;
use super::run::{Bench, BenchError};
use super::workload::Workload;
use crate::fleet::Fleet;
use crate::sim::Report;

/// Adaptive loses a cell where it reaches less than this part of the best static mode's goodput.
pub const LOST: f64 = 0.98;
/// It wins clearly above this.
pub const WON: f64 = 1.05;

/// A trace on a fleet with links of one width.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// The trace.
    pub workload: String,
    /// The fleet.
    pub fleet: String,
    /// Width of hosts' cards.
    pub gbit: f64,
    /// Requests per second within both SLOs at the capacity, by mode.
    pub goodput: Vec<(String, f64)>,
    /// The static mode that reaches most.
    pub best_static: String,
    /// Its goodput.
    pub static_goodput: f64,
    /// Adaptive's.
    pub adaptive_goodput: f64,
    /// Adaptive's over the best static mode's; 0 where neither mode keeps the SLOs at any rate.
    pub ratio: f64,
    /// Where adaptive loses: what it does at the static mode's highest rate.
    pub reason: Option<String>,
}

impl Cell {
    /// Whether adaptive reaches too little.
    pub fn lost(&self) -> bool {
        self.static_goodput > 0.0 && self.ratio < LOST
    }
}

/// How it went in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Score {
    /// Cells in which some mode keeps the SLOs.
    pub cells: usize,
    /// Those that adaptive loses.
    pub lost: usize,
    /// Those that it wins clearly.
    pub won: usize,
}

/// Counts.
pub fn score(cells: &[Cell]) -> Score {
    let possible = || cells.iter().filter(|cell| cell.static_goodput.max(cell.adaptive_goodput) > 0.0);
    Score {
        cells: possible().count(),
        lost: possible().filter(|cell| cell.lost()).count(),
        won: possible().filter(|cell| cell.static_goodput == 0.0 || cell.ratio > WON).count(),
    }
}

/// One search for a capacity.
struct Item<'a> {
    workload: &'a Workload,
    fleet: Fleet,
    mode: Mode,
    guess: f64,
    cell: usize,
}

/// What is gone through.
#[derive(Clone, Debug)]
pub struct Grid {
    /// Traces, each to run on all fleets.
    pub workloads: Vec<Workload>,
    /// Fleets; their `choices` of widths are gone through.
    pub fleets: Vec<Fleet>,
}

impl Grid {
    fn cells(&self) -> impl Iterator<Item = (&Workload, Fleet)> {
        let widths = |fleet: &Fleet| match fleet.links.choices.is_empty() {
            true => vec![fleet.links.gbit],
            false => fleet.links.choices.clone(),
        };
        let fleets: Vec<Fleet> = self
            .fleets
            .iter()
            .flat_map(|fleet| widths(fleet).into_iter().map(|gbit| fleet.with_gbit(gbit)))
            .collect();
        self.workloads
            .iter()
            .flat_map(move |workload| fleets.clone().into_iter().map(move |fleet| (workload, fleet)))
    }

    /// Searches for a capacity that [`Grid::run`] makes.
    pub fn len(&self) -> usize {
        self.cells().map(|(_, fleet)| Mode::usual(fleet.len() as u32).len()).sum()
    }

    /// Whether there is nothing to run.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Finds all capacities. Cells of which some mode is missing because the bench was stopped are left out.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn run(&self, bench: &Bench<'_>, done: &(dyn Fn() + Sync)) -> Result<Vec<Cell>, BenchError> {
        let mut items = Vec::new();
        let mut cells = Vec::new();
        for (cell, (workload, fleet)) in self.cells().enumerate() {
            let mut source = workload
                .open(1.0)
                .map_err(|error| BenchError::Workload { workload: workload.to_string(), error })?;
            let bound = oracle::bound(&fleet, workload.block_tokens(), &mut *source);
            let most = bound.most_goodput(ATTAINMENT);
            // At a rate of 1 the requests come within about the bound's time.
            let guess = 0.4 * most * bound.seconds / bound.requests.max(1) as f64;
            for mode in Mode::usual(fleet.len() as u32) {
                items.push(Item { workload, fleet: fleet.clone(), mode, guess, cell });
            }
            cells.push((workload, fleet));
        }
        let work = |item: &Item<'_>| {
            capacity(bench, &item.fleet, &item.mode, item.workload, item.guess, PRECISION)
                .map(|found| (item.cell, item.mode, found))
        };
        let found: Vec<Option<(usize, Mode, Capacity)>> = bench.all(&items, work, &|_| done())?;
        let mut table = Vec::new();
        for (at, (workload, fleet)) in cells.into_iter().enumerate() {
            let of_cell: Vec<&(usize, Mode, Capacity)> =
                found.iter().flatten().filter(|found| found.0 == at).collect();
            if of_cell.len() == Mode::usual(fleet.len() as u32).len() {
                table.push(cell(bench, workload, &fleet, &of_cell)?);
            }
        }
        Ok(table)
    }

    /// The table, and what it comes to.
    pub fn show(page: &mut Page, cells: &[Cell]) {
        let score = score(cells);
        page.section("Adaptive beside the best static mode");
        page.text(&format!(
            "Goodput at capacity: requests within both SLOs per second in which sessions begin, at the highest rate at which 90 % of all are. {} cells; adaptive is above {WON}x \
             the best static mode in {}, below {LOST}x in {}.",
            score.cells, score.won, score.lost
        ));
        let rows: Vec<Vec<String>> = cells.iter().map(row).collect();
        page.table(&HEAD, &rows);
    }
}

/// The head of [`row`]s.
pub const HEAD: [&str; 9] = [
    "trace",
    "<fleet",
    "Gbit/s",
    "co-located",
    "<best static",
    "its goodput",
    "adaptive",
    "ratio",
    "<reason, where adaptive loses",
];

/// A cell as a row of a table.
pub fn row(cell: &Cell) -> Vec<String> {
    let colocated = cell.goodput.iter().find(|(mode, _)| *mode == Mode::COLOCATED.to_string());
    let figure = |value: f64| format!("{value:.2}");
    vec![
        cell.workload.clone(),
        cell.fleet.clone(),
        format!("{}", cell.gbit),
        colocated.map_or_else(String::new, |(_, goodput)| figure(*goodput)),
        cell.best_static.clone(),
        figure(cell.static_goodput),
        figure(cell.adaptive_goodput),
        if cell.static_goodput > 0.0 { format!("{:.3}", cell.ratio) } else { "–".to_owned() },
        match (&cell.reason, cell.static_goodput.max(cell.adaptive_goodput) > 0.0) {
            (Some(reason), _) => reason.clone(),
            (None, true) => String::new(),
            (None, false) => "no mode keeps the SLOs for 90 % at any rate".to_owned(),
        },
    ]
}

fn cell(
    bench: &Bench<'_>,
    workload: &Workload,
    fleet: &Fleet,
    found: &[&(usize, Mode, Capacity)],
) -> Result<Cell, BenchError> {
    let mut cell = Cell {
        workload: workload.to_string(),
        fleet: fleet.name.clone(),
        gbit: fleet.links.gbit,
        goodput: found.iter().map(|(_, mode, found)| (mode.to_string(), found.goodput())).collect(),
        best_static: "none".to_owned(),
        static_goodput: 0.0,
        adaptive_goodput: 0.0,
        ratio: 0.0,
        reason: None,
    };
    let mut best: Option<(&Mode, &Capacity)> = None;
    for (_, mode, capacity) in found {
        if mode.is_static() && capacity.goodput() > cell.static_goodput {
            (cell.best_static, cell.static_goodput) = (mode.to_string(), capacity.goodput());
            best = Some((mode, capacity));
        } else if *mode == Mode::ADAPTIVE {
            cell.adaptive_goodput = capacity.goodput();
        }
    }
    if cell.static_goodput > 0.0 {
        cell.ratio = cell.adaptive_goodput / cell.static_goodput;
    }
    if let (true, Some((_, Capacity { rate, run: Some(run), .. }))) = (cell.lost(), best) {
        cell.reason = match bench.run(fleet, &Mode::ADAPTIVE, workload, *rate) {
            Ok(adaptive) => Some(reason(&adaptive.report, &run.report)),
            Err(BenchError::Stopped) => None,
            Err(error) => return Err(error),
        };
    }
    Ok(cell)
}

/// What tells the two apart at the same rate.
fn reason(adaptive: &Report, fixed: &Report) -> String {
    let share = |part: u64, report: &Report| 100.0 * part as f64 / report.requests.max(1) as f64;
    let computed =
        |report: &Report| report.engines.iter().map(|engine| engine.prefill_tokens).sum::<u64>() as f64;
    format!(
        "at the static mode's rate adaptive is late with {:.1} % of first tokens (static {:.1} %) and slow with {:.1} % (static {:.1} %); hit rate {:.1} % (static {:.1} %), \
         prompt tokens computed {:+.0} %; handed off {:.0} %, pulled {:.0} %",
        share(adaptive.late_first_token, adaptive),
        share(fixed.late_first_token, fixed),
        share(adaptive.slow_tokens, adaptive),
        share(fixed.slow_tokens, fixed),
        100.0 * adaptive.hit_rate,
        100.0 * fixed.hit_rate,
        100.0 * (computed(adaptive) / computed(fixed).max(1.0) - 1.0),
        share(adaptive.plans.disaggregated, adaptive),
        share(adaptive.plans.pull, adaptive),
    )
}
