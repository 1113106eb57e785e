//! The benches one by one.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use baton_sim::bench::compare::{self, CellRegret, Compared, Regret};
use baton_sim::bench::{Bench, Mode, Workload, capacity as search, grid as grids, oracle, sweep as sweeps};
use baton_sim::fleet::Fleet;
use baton_sim::sim::Report;
use baton_sim::trace::Rows;
use serde_json::{Value, json};

use super::load::{self, Place, Shown, Trace};
use super::{Output, progress, slo, table};

#[derive(Debug, clap::Args)]
pub(crate) struct Replay {
    #[command(flatten)]
    trace: Trace,
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    shown: Shown,
    /// A policy, a static split like 3P5D, or a policy on a split like threshold@3P5D
    #[arg(long, default_value = "adaptive")]
    policy: Mode,
    /// Factor on a trace's rate; of generated sessions, how many begin per second
    #[arg(long, default_value = "1", value_parser = load::rate)]
    rate: f64,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Compare {
    #[command(flatten)]
    trace: Trace,
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    shown: Shown,
    /// Policies and splits, as for replay, as often as wanted [default: colocated, five splits, adaptive]
    #[arg(long, value_delimiter = ',')]
    policy: Vec<Mode>,
    /// Rates, as for replay; with several, goodput is also plotted against the rate
    #[arg(long, default_value = "1", value_parser = load::rate, value_delimiter = ',')]
    rate: Vec<f64>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Capacity {
    #[command(flatten)]
    trace: Trace,
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    shown: Shown,
    /// Policies and splits, as for compare
    #[arg(long, value_delimiter = ',')]
    policy: Vec<Mode>,
    /// Where the search begins, as replay's rate
    #[arg(long, default_value = "1", value_parser = load::rate)]
    rate: f64,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Sweep {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    shown: Shown,
    /// Prompt lengths
    #[arg(long, value_delimiter = ',', default_value = "1000,4000,16000,64000")]
    tokens: Vec<u32>,
    /// Hit rates, as shares of the prompt
    #[arg(long, value_delimiter = ',', default_value = "0,0.5,0.9")]
    hits: Vec<f64>,
    /// Link speeds, Gbit/s [default: the fleet's choices]
    #[arg(long, value_delimiter = ',')]
    links: Vec<f64>,
    /// Tokens of output
    #[arg(long, default_value_t = 200)]
    output_tokens: u32,
    /// Requests of each run
    #[arg(long, default_value_t = 1000)]
    requests: u64,
    /// Policies and splits, as for compare
    #[arg(long, value_delimiter = ',')]
    policy: Vec<Mode>,
    /// Seed of everything that is random
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Grid {
    /// Traces, each PATH=FORMAT, PATH=FORMAT=COPIES, or the name of generated sessions
    #[arg(long, value_delimiter = ',', default_value = "mix,agent,documents")]
    trace: Vec<String>,
    /// Files that describe fleets [default: 8 H100 with an 8B model]
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    fleet: Vec<PathBuf>,
    /// Link speeds, Gbit/s [default: each fleet's choices]
    #[arg(long, value_delimiter = ',')]
    links: Vec<f64>,
    /// At most so many requests of each trace
    #[arg(long, default_value_t = 4000)]
    requests: u64,
    /// Seed of everything that is random
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    shown: Shown,
    /// The decision knows the engines' speed from the start
    #[arg(long)]
    known_speeds: bool,
}

/// A report without its timeline, which plots show.
fn brief(report: &Report) -> anyhow::Result<Value> {
    let mut value = serde_json::to_value(report)?;
    if let Some(object) = value.as_object_mut() {
        object.remove("timeline");
    }
    Ok(value)
}

/// Rows that were left out, for the terminal.
pub(super) fn say_bad_rows(rows: &Rows) {
    if rows.bad > 0 {
        eprintln!("{} malformed rows were left out:", rows.bad);
        rows.first_bad.iter().for_each(|row| eprintln!("  {row}"));
    }
}

pub(super) fn bound_of(fleet: &Fleet, workload: &Workload, rate: f64) -> anyhow::Result<oracle::Bound> {
    workload.bound(fleet, rate).with_context(|| workload.to_string())
}

pub(super) fn replay(arguments: &Replay, stop: &AtomicBool) -> anyhow::Result<()> {
    let Replay { trace, place, shown, policy, rate } = arguments;
    let (workload, fleet) = (trace.workload()?, place.fleet()?);
    load::modes(&[*policy], &fleet)?;
    let mut output = Output::new(shown, trace.seed, stop);
    let bar = progress(workload.requests().unwrap_or(0), "requests");
    let count = |requests| bar.inc(requests);
    let bench = Bench { progress: &count, ..output.bench(place.speeds()) };
    let run = bench.replay(&fleet, policy, &workload, *rate)?;
    bar.finish_and_clear();
    say_bad_rows(&run.report.rows);
    let bound = bound_of(&fleet, &workload, *rate)?;
    output.say(table(&compare::HEAD, vec![compare::row(&policy.to_string(), &run.report, &bound)]));
    compare::troubles(&policy.to_string(), &run.report).iter().for_each(|said| output.say(said));
    output.put("fleet", &fleet.name)?;
    output.put("trace", workload.to_string())?;
    output.put("rate", rate)?;
    output.put("policy", policy.to_string())?;
    output.put("bound", &bound)?;
    output.put("regret", Regret::of(&run.report, &bound))?;
    output.put("report", &run.report)?;
    let mut page = output.page("Baton: one run");
    compare::describe(&mut page, &fleet, &workload.to_string(), &bound);
    let unit = format!("a rate of {rate} {}", workload.rate_unit());
    compare::show(&mut page, &unit, &[Compared { mode: *policy, run }], &bound);
    compare::show_oracle(&mut page, &[]);
    output.finish(page)
}

/// A mode, and what it did at each rate, in their order.
pub(super) type AtRates = (Mode, Vec<(f64, Report)>);

/// Runs all modes at all rates; those of the first rate in full.
pub(super) fn runs(
    bench: &Bench<'_>,
    fleet: &Fleet,
    modes: &[Mode],
    workload: &Workload,
    rates: &[f64],
) -> anyhow::Result<(Vec<Compared>, Vec<AtRates>)> {
    let items: Vec<(Mode, f64)> =
        rates.iter().flat_map(|rate| modes.iter().map(move |mode| (*mode, *rate))).collect();
    let bar = progress(items.len() as u64, "runs");
    let work = |(mode, rate): &(Mode, f64)| bench.run(fleet, mode, workload, *rate);
    let found = bench.all(&items, work, &|_| bar.inc(1))?;
    bar.finish_and_clear();
    let mut first = Vec::new();
    let mut all: Vec<AtRates> = modes.iter().map(|mode| (*mode, Vec::new())).collect();
    for (at, (run, (mode, rate))) in found.into_iter().zip(&items).enumerate() {
        let Some(run) = run else { continue };
        all[at % modes.len()].1.push((*rate, run.report.clone()));
        if at < modes.len() {
            first.push(Compared { mode: *mode, run });
        }
    }
    all.iter_mut().for_each(|(_, reports)| reports.sort_by(|a, b| a.0.total_cmp(&b.0)));
    Ok((first, all))
}

pub(super) fn compare(arguments: &Compare, stop: &AtomicBool) -> anyhow::Result<()> {
    let Compare { trace, place, shown, policy, rate: rates } = arguments;
    let (workload, fleet) =
        (trace.workload()?.recorded().with_context(|| trace.trace.clone())?, place.fleet()?);
    let modes = load::modes(policy, &fleet)?;
    let mut output = Output::new(shown, trace.seed, stop);
    let (first, all) = runs(&output.bench(place.speeds()), &fleet, &modes, &workload, rates)?;
    first.first().into_iter().for_each(|compared| say_bad_rows(&compared.run.report.rows));
    output.put("fleet", &fleet.name)?;
    output.put("trace", workload.to_string())?;
    let mut results = Vec::new();
    for rate in rates {
        let bound = bound_of(&fleet, &workload, *rate)?;
        let (mut rows, mut troubles) = (Vec::new(), Vec::new());
        for (mode, reports) in &all {
            let Some((_, report)) = reports.iter().find(|entry| entry.0 == *rate) else { continue };
            rows.push(compare::row(&mode.to_string(), report, &bound));
            troubles.extend(compare::troubles(&mode.to_string(), report));
            results.push(json!({
                "rate": rate, "policy": mode.to_string(), "regret": Regret::of(report, &bound), "report": brief(report)?
            }));
        }
        output.say(format!("rate {rate} {}, {} requests", workload.rate_unit(), bound.requests));
        output.say(table(&compare::HEAD, rows));
        troubles.iter().for_each(|said| output.say(said));
        output.say(format!(
            "bound: mean TTFT {:.0} ms, mean time to last token {:.0} ms, hit rate {:.1} %\n",
            bound.ttft_ms,
            bound.e2e_ms,
            100.0 * bound.hit_rate
        ));
    }
    output.put("results", results)?;
    let bound = bound_of(&fleet, &workload, rates[0])?;
    output.put("bound", &bound)?;
    let mut page = output.page("Baton: modes side by side");
    compare::describe(&mut page, &fleet, &workload.to_string(), &bound);
    compare::show(&mut page, &format!("a rate of {} {}", rates[0], workload.rate_unit()), &first, &bound);
    if rates.len() > 1 {
        compare::show_rates(&mut page, workload.rate_unit(), &all);
    }
    compare::show_oracle(&mut page, &[]);
    output.finish(page)
}

/// Capacities of all modes.
pub(super) fn capacities(
    bench: &Bench<'_>,
    fleet: &Fleet,
    modes: &[Mode],
    workload: &Workload,
    guess: f64,
) -> anyhow::Result<Vec<(Mode, search::Capacity)>> {
    let bar = progress(modes.len() as u64, "capacities");
    let work = |mode: &Mode| search::capacity(bench, fleet, mode, workload, guess, search::PRECISION);
    let found = bench.all(modes, work, &|_| bar.inc(1))?;
    bar.finish_and_clear();
    Ok(modes.iter().zip(found).filter_map(|(mode, found)| Some((*mode, found?))).collect())
}

pub(super) fn capacity(arguments: &Capacity, stop: &AtomicBool) -> anyhow::Result<()> {
    let Capacity { trace, place, shown, policy, rate } = arguments;
    let (workload, fleet) =
        (trace.workload()?.recorded().with_context(|| trace.trace.clone())?, place.fleet()?);
    let modes = load::modes(policy, &fleet)?;
    let mut output = Output::new(shown, trace.seed, stop);
    output.put("slo", slo(&fleet)?)?;
    let found = capacities(&output.bench(place.speeds()), &fleet, &modes, &workload, *rate)?;
    let bound = bound_of(&fleet, &workload, *rate)?;
    let most = bound.most_goodput(search::ATTAINMENT);
    let over_time =
        |found: &search::Capacity| found.run.as_ref().map_or(0.0, |run| run.report.goodput_per_second);
    let row = |(mode, found): &(Mode, search::Capacity)| {
        vec![
            mode.to_string(),
            format!("{:.3}", found.rate),
            format!("{:.2}", found.goodput()),
            format!("{:.1} %", 100.0 * (1.0 - over_time(found) / most)),
            found
                .run
                .as_ref()
                .map_or_else(String::new, |run| format!("{:.1} %", 100.0 * run.report.hit_rate)),
            found.probes.len().to_string(),
        ]
    };
    let unit = format!("rate, {}", workload.rate_unit());
    output.say(table(
        &["mode", &unit, "goodput/s", "below the bound", "hits", "rates tried"],
        found.iter().map(row).collect(),
    ));
    output.put("fleet", &fleet.name)?;
    output.put("trace", workload.to_string())?;
    output.put("most_goodput_per_second", most)?;
    let result = |(mode, found): &(Mode, search::Capacity)| -> anyhow::Result<Value> {
        let report = found.run.as_ref().map(|run| brief(&run.report)).transpose()?;
        Ok(json!({
            "policy": mode.to_string(), "rate": found.rate, "goodput_per_second": found.goodput(), "probes": found.probes, "report": report
        }))
    };
    output.put("results", found.iter().map(result).collect::<anyhow::Result<Vec<_>>>()?)?;
    let mut page = output.page("Baton: capacity");
    compare::describe(&mut page, &fleet, &workload.to_string(), &bound);
    compare::show_capacities(&mut page, workload.rate_unit(), &found, &bound);
    compare::show_oracle(&mut page, &[]);
    output.finish(page)
}

pub(super) fn sweep(arguments: &Sweep, stop: &AtomicBool) -> anyhow::Result<()> {
    let fleet = arguments.place.fleet()?;
    slo(&fleet)?;
    let modes = load::modes(&arguments.policy, &fleet)?;
    let gbit = match arguments.links.is_empty() {
        true => fleet.links.choices.clone(),
        false => arguments.links.clone(),
    };
    let sweep = sweeps::Sweep {
        tokens: arguments.tokens.clone(),
        hits: arguments.hits.clone(),
        gbit,
        output_tokens: arguments.output_tokens,
        requests: arguments.requests,
        block_tokens: 64,
        seed: arguments.seed,
    };
    let mut output = Output::new(&arguments.shown, arguments.seed, stop);
    let bar = progress(sweep.points().len() as u64, "points");
    let points = sweep.run(&output.bench(arguments.place.speeds()), &fleet, &modes, &|| bar.inc(1))?;
    bar.finish_and_clear();
    let row = |point: &sweeps::Point| {
        vec![
            point.tokens.to_string(),
            format!("{:.0} %", 100.0 * point.hits),
            point.gbit.to_string(),
            point.best_static.clone(),
            format!("{:.2}x", point.split_over_colocated),
            format!("{:.2}x", point.over_colocated),
            format!("{:.2}x", point.over_split),
            format!("{:.0} %", 100.0 * point.handed_off),
            format!("{:.0} %", 100.0 * point.pulled),
        ]
    };
    let head = [
        "tokens",
        "hit rate",
        "Gbit/s",
        "best static",
        "split/co-located",
        "adaptive/co-located",
        "adaptive/split",
        "handed off",
        "pulled",
    ];
    output.say(table(&head, points.iter().map(row).collect()));
    output.put("fleet", &fleet.name)?;
    output.put("results", &points)?;
    let mut page = output.page("Baton: which mode wins where");
    sweep.show(&mut page, &fleet, &points);
    output.finish(page)
}

/// How far each cell is from its bound.
pub(super) fn regrets(cells: &[grids::Cell], grid: &grids::Grid) -> anyhow::Result<Vec<CellRegret>> {
    let mut regrets = Vec::new();
    for cell in cells {
        let workload = grid.workloads.iter().find(|workload| workload.to_string() == cell.workload);
        let fleet = grid.fleets.iter().find(|fleet| fleet.name == cell.fleet);
        if let (Some(workload), Some(fleet)) = (workload, fleet) {
            regrets.push(CellRegret::of(cell, &bound_of(fleet, workload, 1.0)?));
        }
    }
    Ok(regrets)
}

impl Grid {
    fn workload(&self, text: &str) -> anyhow::Result<Workload> {
        let mut parts = text.split('=');
        let (trace, format, copies) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
        let trace = Trace {
            trace: trace.to_owned(),
            format: format.map(str::parse).transpose()?,
            requests: Some(self.requests),
            copies: copies.map_or(Ok(1), str::parse).with_context(|| format!("--trace {text}: copies"))?,
            seed: self.seed,
            block_tokens: None,
        };
        let workload = trace.workload().with_context(|| format!("--trace {text}"))?;
        workload.recorded().with_context(|| format!("--trace {text}"))
    }
}

pub(super) fn grid(arguments: &Grid, stop: &AtomicBool) -> anyhow::Result<()> {
    let workloads = arguments.trace.iter().map(|text| arguments.workload(text)).collect::<Result<_, _>>()?;
    let files = match arguments.fleet.is_empty() {
        true => vec![None],
        false => arguments.fleet.iter().cloned().map(Some).collect(),
    };
    let fleet = |file: Option<PathBuf>| -> anyhow::Result<Fleet> {
        let mut fleet = Place { fleet: file, gbit: None, known_speeds: false }.fleet()?;
        slo(&fleet)?;
        if !arguments.links.is_empty() {
            fleet.links.choices.clone_from(&arguments.links);
        }
        Ok(fleet)
    };
    let fleets = files.into_iter().map(fleet).collect::<anyhow::Result<_>>()?;
    let grid = grids::Grid { workloads, fleets };
    let mut output = Output::new(&arguments.shown, arguments.seed, stop);
    let speeds = Place { fleet: None, gbit: None, known_speeds: arguments.known_speeds }.speeds();
    let bar = progress(grid.len() as u64, "capacities");
    let cells = grid.run(&output.bench(speeds), &|| bar.inc(1))?;
    bar.finish_and_clear();
    output.say(table(&grids::HEAD, cells.iter().map(grids::row).collect()));
    let score = grids::score(&cells);
    output.say(format!(
        "{} cells; adaptive above {}x the best static mode in {}, below {}x in {}",
        score.cells,
        grids::WON,
        score.won,
        grids::LOST,
        score.lost
    ));
    let regrets = regrets(&cells, &grid)?;
    output.say(table(&CellRegret::HEAD, regrets.iter().map(CellRegret::row).collect()));
    output.put("score", score)?;
    output.put("regret", &regrets)?;
    output.put("results", &cells)?;
    let mut page = output.page("Baton: adaptive beside the best static mode");
    grids::Grid::show(&mut page, &cells);
    compare::show_oracle(&mut page, &regrets);
    output.finish(page)
}
