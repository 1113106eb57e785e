//! Modes side by side on one workload.

use serde::Serialize;

use super::capacity::{ATTAINMENT, Capacity};
use super::chart::{Axis, Bars, Chart, Scale};
use super::grid::Cell;
use super::mode::Mode;
use super::oracle::Bound;
use super::page::Page;
use super::run::Run;
use crate::fleet::Fleet;
use crate::sim::{Durations, Report};

/// One mode's run.
#[derive(Clone, Debug)]
pub struct Compared {
    /// The mode.
    pub mode: Mode,
    /// At the rate that all modes are compared at.
    pub run: Run,
}

/// How far a run is from what no policy can do better than.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Regret {
    /// Mean time to first token, less the bound's, milliseconds.
    pub ttft_ms: f64,
    /// Mean time to last token, less the bound's, milliseconds.
    pub e2e_ms: f64,
    /// Prompt tokens that a common, endless cache would have found besides, as a share of all.
    pub hit_rate: f64,
}

impl Regret {
    /// Of a run that served all of its requests, which are those that the bound is for; of one that did not, nothing can be said.
    pub fn of(report: &Report, bound: &Bound) -> Option<Self> {
        (report.finished == report.requests).then_some(Self {
            ttft_ms: report.ttft_ms.mean - bound.ttft_ms,
            e2e_ms: report.e2e_ms.mean - bound.e2e_ms,
            hit_rate: bound.hit_rate - report.hit_rate,
        })
    }
}

/// The head of [`row`]s.
pub const HEAD: [&str; 13] = [
    "mode",
    "in SLO",
    "good/s",
    "TTFT p50 ms",
    "p99",
    "mean",
    "over bound",
    "TPOT p50 ms",
    "p99",
    "hits",
    "GB moved",
    "handed off",
    "pulled",
];

/// A run as a row of a table.
pub fn row(name: &str, report: &Report, bound: &Bound) -> Vec<String> {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let share = |part: u64| percent(part as f64 / report.finished.max(1) as f64);
    vec![
        name.to_owned(),
        percent(report.attainment),
        format!("{:.2}", report.goodput_per_second),
        format!("{:.0}", report.ttft_ms.p50),
        format!("{:.0}", report.ttft_ms.p99),
        format!("{:.0}", report.ttft_ms.mean),
        Regret::of(report, bound).map_or_else(|| "–".to_owned(), |regret| format!("{:+.0}", regret.ttft_ms)),
        format!("{:.1}", report.tpot_ms.p50),
        format!("{:.1}", report.tpot_ms.p99),
        percent(report.hit_rate),
        format!("{:.1}", report.bytes_moved as f64 / 1e9),
        share(report.plans.disaggregated),
        share(report.plans.pull),
    ]
}

/// What went otherwise than it should in a run, if anything did.
pub fn troubles(name: &str, report: &Report) -> Option<String> {
    let said = [
        (report.waited, "waited for room"),
        (report.refused, "turned away"),
        (report.too_long, "too long for their engine"),
        (report.failed, "failed with an engine"),
        (report.retried, "sent to another engine after one had failed"),
        (report.lost_turns, "more did not come, since their session had ended"),
        (report.failed_transfers, "transfers failed"),
        (report.expired_holds, "held blocks freed that nobody fetched"),
    ];
    let said: Vec<String> =
        said.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    (!said.is_empty()).then(|| format!("{name}: of {} requests, {}", report.requests, said.join(", ")))
}

/// Points of a cumulative distribution, milliseconds.
fn distribution(durations: &Durations) -> Vec<(f64, f64)> {
    let histogram = durations.histogram();
    if histogram.is_empty() {
        return Vec::new();
    }
    let quantiles = (0..=100).map(|at| f64::from(at) / 100.0).chain([0.995, 0.999]);
    let mut quantiles: Vec<f64> = quantiles.collect();
    quantiles.sort_by(f64::total_cmp);
    quantiles.iter().map(|q| (histogram.value_at_quantile(*q) as f64 / 1e3, *q)).collect()
}

/// What stands above the runs of a workload.
pub fn describe(page: &mut Page, fleet: &Fleet, what: &str, bound: &Bound) {
    page.section(&format!("{what} on {}", fleet.name));
    if let Some(slo) = fleet.slo {
        page.text(&format!(
            "{} engines, {} Gbit/s. SLOs: first token within {} ms, {} ms a token (mean over the output); goodput counts requests that keep both. {} requests.",
            fleet.len(),
            fleet.links.gbit,
            slo.ttft_ms,
            slo.tpot_ms,
            bound.requests
        ));
    }
}

/// Runs of one rate: table and plots.
pub fn show(page: &mut Page, rate: &str, runs: &[Compared], bound: &Bound) {
    page.part(&format!("All modes at {rate}"));
    let rows: Vec<Vec<String>> =
        runs.iter().map(|compared| row(&compared.mode.to_string(), &compared.run.report, bound)).collect();
    page.table(&HEAD, &rows);
    for compared in runs {
        troubles(&compared.mode.to_string(), &compared.run.report).iter().for_each(|said| page.note(said));
    }
    page.note(&format!(
        "Bound: no policy has a mean TTFT below {:.0} ms, a mean time to last token below {:.0} ms, or a hit rate above {:.1} % on this workload (see the section on the oracle).",
        bound.ttft_ms,
        bound.e2e_ms,
        100.0 * bound.hit_rate
    ));
    let chart = |title: &str, label: &str, of: &dyn Fn(&Run) -> Vec<(f64, f64)>| {
        let series = runs.iter().map(|compared| (compared.mode.to_string(), of(&compared.run))).collect();
        let (x, y) = (Axis::new(label, Scale::Log), Axis::share("share of all, at most so long"));
        Chart { title: title.to_owned(), x, y, series, marks: false }.svg()
    };
    let bars = |title: &str, label: &str, parts: &[&str], of: &dyn Fn(&Report) -> Vec<f64>| {
        let bars =
            runs.iter().map(|compared| (compared.mode.to_string(), of(&compared.run.report))).collect();
        let parts = parts.iter().map(|part| (*part).to_owned()).collect();
        Bars { title: title.to_owned(), label: label.to_owned(), parts, bars }.svg()
    };
    let usage = runs.iter().map(|compared| {
        let points = compared.run.report.timeline.iter();
        (compared.mode.to_string(), points.map(|point| (point.seconds, point.utilisation)).collect())
    });
    let usage = Chart {
        title: "Utilisation over time".to_owned(),
        x: Axis::new("seconds", Scale::Linear),
        y: Axis::share("share of their time that engines compute"),
        series: usage.collect(),
        marks: false,
    };
    page.figures(&[
        chart("TTFT", "ms to the first token", &|run| distribution(&run.distributions.ttft)),
        chart("ITL", "ms between two tokens", &|run| distribution(&run.distributions.itl)),
        bars("Hit rate", "% of prompt tokens", &[], &|report| vec![100.0 * report.hit_rate]),
        bars("Bytes moved", "GB", &[], &|report| vec![report.bytes_moved as f64 / 1e9]),
        bars("How requests were served", "% of requests", &["one engine", "pull", "handoff"], &|report| {
            let share = |part: u64| 100.0 * part as f64 / report.finished.max(1) as f64;
            vec![share(report.plans.colocated), share(report.plans.pull), share(report.plans.disaggregated)]
        }),
        usage.svg(),
    ]);
}

/// Capacities: table and plots of goodput and attainment against the rate. `offered`: requests per second at a rate of 1.
pub fn show_capacities(page: &mut Page, unit: &str, found: &[(Mode, Capacity)], bound: &Bound) {
    let most = bound.most_goodput(ATTAINMENT);
    page.part(&format!("Highest rate at which {:.0} % of requests are within both SLOs", 100.0 * ATTAINMENT));
    let rows: Vec<Vec<String>> = found
        .iter()
        .map(|(mode, capacity)| {
            // The bound counts the time until the last request ends.
            let over_time = capacity.run.as_ref().map_or(0.0, |run| run.report.goodput_per_second);
            vec![
                mode.to_string(),
                format!("{:.3}", capacity.rate),
                format!("{:.2}", capacity.goodput()),
                format!("{:.1} %", 100.0 * (1.0 - over_time / most)),
            ]
        })
        .collect();
    let rate = format!("rate, {unit}");
    page.table(&["mode", &rate, "goodput, requests/s", "below the bound"], &rows);
    page.note(&format!(
        "Bound: no policy that keeps the SLOs for {:.0} % serves more than {most:.2} requests/s within them, over the time until the last one ends.",
        100.0 * ATTAINMENT
    ));
}

/// Runs over several rates: goodput and attainment against the rate.
pub fn show_rates(page: &mut Page, unit: &str, runs: &[(Mode, Vec<(f64, Report)>)]) {
    let chart = |title: &str, y: Axis, of: fn(&Report) -> f64| {
        let series = runs
            .iter()
            .map(|(mode, reports)| {
                (mode.to_string(), reports.iter().map(|(rate, report)| (*rate, of(report))).collect())
            })
            .collect();
        let x = Axis::new(&format!("rate, {unit}"), Scale::Linear);
        Chart { title: title.to_owned(), x, y, series, marks: true }.svg()
    };
    let goodput = Axis::new("requests/s within both SLOs", Scale::Linear);
    page.part("Goodput against the rate");
    page.figures(&[
        chart("Goodput", goodput, |report| report.goodput_per_second),
        chart("Attainment", Axis::share("share of requests within both SLOs"), |report| report.attainment),
    ]);
}

/// How far the modes of a grid's cell stay below what no policy can do better than, at their capacities.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CellRegret {
    /// The trace.
    pub workload: String,
    /// The fleet.
    pub fleet: String,
    /// Width of hosts' cards.
    pub gbit: f64,
    /// No policy that keeps the SLOs for [`ATTAINMENT`] serves more requests per second within them.
    pub most_goodput: f64,
    /// By mode, what its goodput lacks of that, as a share.
    pub below: Vec<(String, f64)>,
    best_static: String,
}

impl CellRegret {
    /// The head of [`CellRegret::row`]s.
    pub const HEAD: [&str; 8] = [
        "trace",
        "<fleet",
        "Gbit/s",
        "bound, requests/s",
        "co-located below it",
        "<best static",
        "below it",
        "adaptive below it",
    ];

    /// Of a cell whose trace and fleet have this bound.
    pub fn of(cell: &Cell, bound: &Bound) -> Self {
        let most = bound.most_goodput(ATTAINMENT);
        let below = |(mode, goodput): &(String, f64)| (mode.clone(), 1.0 - goodput / most);
        Self {
            workload: cell.workload.clone(),
            fleet: cell.fleet.clone(),
            gbit: cell.gbit,
            most_goodput: most,
            below: cell.goodput.iter().map(below).collect(),
            best_static: cell.best_static.clone(),
        }
    }

    /// As a row of a table.
    pub fn row(&self) -> Vec<String> {
        let of = |name: &str| {
            let found = self.below.iter().find(|(mode, _)| mode == name);
            found.map_or_else(|| "–".to_owned(), |(_, below)| format!("{:.1} %", 100.0 * below))
        };
        vec![
            self.workload.clone(),
            self.fleet.clone(),
            format!("{}", self.gbit),
            format!("{:.2}", self.most_goodput),
            of(&Mode::COLOCATED.to_string()),
            self.best_static.clone(),
            of(&self.best_static),
            of(&Mode::ADAPTIVE.to_string()),
        ]
    }
}

/// What the bounds are, and how far from them the cells of a grid are.
pub fn show_oracle(page: &mut Page, regrets: &[CellRegret]) {
    page.section("The oracle");
    if !regrets.is_empty() {
        page.text(
            "Goodput at capacity of each mode below the bound, which is the same for links of any width:",
        );
        page.table(&CellRegret::HEAD, &regrets.iter().map(CellRegret::row).collect::<Vec<_>>());
    }
    page.text(
        "Bounds come from a clairvoyant with one endless cache for all: a block is found as soon as any request that has it arrived, transfers take no time, nobody \
         waits for anybody, and each step costs the least that any engine takes for it. Each distinct block is computed at least once by somebody, at a cost that does not depend on \
         who does it, so the mean TTFT and the mean time to the last token cannot be lower, nor the hit rate higher. For goodput, every request takes engines some least time in whatever \
         company (its new tokens, its attention, its share of what each step takes, in the fullest batch that the SLO for its tokens allows); where 90 % of requests are served, the least of these times, summed, are worked off by no more \
         than all engines all of the time. The bounds hold for every policy; they are not tight.",
    );
}
