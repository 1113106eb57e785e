//! `baton bench report`: everything in one HTML file.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use baton_sim::bench::{Mode, Workload, capacity, compare, grid, scenarios, sweep};
use baton_sim::fleet::Fleet;
use serde_json::json;

use super::commands::{bound_of, capacities, regrets, runs, say_bad_rows};
use super::load::{self, Place, Shown, Trace};
use super::{Output, progress, slo, table};

/// Rates at which modes are compared, as parts of the best static mode's highest; the first one in full.
const RATES: [f64; 5] = [1.0, 0.6, 0.8, 1.2, 1.5];

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    trace: Trace,
    #[command(flatten)]
    place: Place,
    /// Where the report goes
    #[arg(long, value_name = "FILE", default_value = "target/bench/report.html")]
    html: PathBuf,
    /// Print results as JSON instead of tables
    #[arg(long)]
    json: bool,
    /// Threads; results do not depend on it [default: one for each core]
    #[arg(long)]
    threads: Option<usize>,
}

pub(super) fn run(arguments: &Arguments, stop: &AtomicBool) -> anyhow::Result<()> {
    let Arguments { trace, place, html, json, threads } = arguments;
    let shown = Shown { json: *json, html: Some(html.clone()), threads: *threads };
    let workload = trace.workload()?.recorded().with_context(|| trace.trace.clone())?;
    let fleet = place.fleet()?;
    slo(&fleet)?;
    let mut output = Output::new(&shown, trace.seed, stop);
    let bench = output.bench(place.speeds());
    let modes = load::modes(&[], &fleet)?;
    let mut page = output.page("Baton: co-located, disaggregated, adaptive");

    // The trace: capacities, then all modes around the best static one's.
    let bound = bound_of(&fleet, &workload, 1.0)?;
    let guess = 0.4 * bound.most_goodput(capacity::ATTAINMENT) / workload.offered_per_second().unwrap_or(1.0);
    compare::describe(&mut page, &fleet, &workload.to_string(), &bound);
    let found = capacities(&bench, &fleet, &modes, &workload, guess)?;
    compare::show_capacities(&mut page, workload.rate_unit(), &found, &bound);
    let statics = found.iter().filter(|(mode, _)| mode.is_static()).map(|(_, found)| found.rate);
    let best = statics.fold(0.0, f64::max);
    let row = |(mode, found): &(Mode, capacity::Capacity)| {
        vec![mode.to_string(), format!("{:.3}", found.rate), format!("{:.2}", found.goodput())]
    };
    output.say(table(&["mode", "highest rate", "goodput/s"], found.iter().map(row).collect()));
    let capacities: Vec<_> = found
        .iter()
        .map(|(mode, found)| {
            json!({"policy": mode.to_string(), "rate": found.rate, "goodput_per_second": found.goodput(), "probes": found.probes})
        })
        .collect();
    output.put("capacity", capacities)?;
    if best > 0.0 {
        let rates = RATES.map(|part| part * best);
        let (first, all) = runs(&bench, &fleet, &modes, &workload, &rates)?;
        let bound = bound_of(&fleet, &workload, rates[0])?;
        first.first().into_iter().for_each(|compared| say_bad_rows(&compared.run.report.rows));
        let at = format!("a rate of {best:.3} {}, the best static mode's highest", workload.rate_unit());
        compare::show(&mut page, &at, &first, &bound);
        compare::show_rates(&mut page, workload.rate_unit(), &all);
        let row = |compared: &compare::Compared| {
            compare::row(&compared.mode.to_string(), &compared.run.report, &bound)
        };
        output.say(format!("\nat {at}:"));
        output.say(table(&compare::HEAD, first.iter().map(row).collect()));
    }

    let (cells, regrets) = cells(&output, place, &fleet, trace.seed)?;
    grid::Grid::show(&mut page, &cells);
    output.say(table(&grid::HEAD, cells.iter().map(grid::row).collect()));
    output.put("grid", &cells)?;
    output.put("regret", &regrets)?;

    let map = sweep::Sweep {
        tokens: vec![1000, 4000, 16_000, 64_000],
        hits: vec![0.0, 0.5, 0.9],
        gbit: vec![10.0, 100.0],
        output_tokens: 200,
        requests: 600,
        block_tokens: 64,
        seed: trace.seed,
    };
    let bar = progress(map.points().len() as u64, "sweep");
    let points = map.run(&bench, &fleet, &modes, &|| bar.inc(1))?;
    bar.finish_and_clear();
    map.show(&mut page, &fleet, &points);
    output.put("sweep", &points)?;

    let all =
        scenarios::all(&Place { fleet: None, gbit: None, known_speeds: false }.fleet()?, 64, trace.seed);
    let bar = progress(all.iter().map(|scenario| scenario.ways() as u64).sum(), "set-ups");
    let mut outcomes = Vec::new();
    for scenario in &all {
        outcomes.extend(scenario.run(&bench, &|| bar.inc(1))?);
    }
    bar.finish_and_clear();
    scenarios::show(&mut page, &outcomes);
    for outcome in &outcomes {
        output.say(format!("\n{}: {}", outcome.name, outcome.unit));
        let row = |way: &scenarios::Way| {
            vec![way.name.clone(), format!("{:.2}", way.value), format!("{:.2}x", way.over_base)]
        };
        output.say(table(&["way", "value", "over the base"], outcome.ways.iter().map(row).collect()));
    }
    output.put("set_ups", &outcomes)?;
    compare::show_oracle(&mut page, &regrets);
    output.finish(page)
}

/// Cells of a grid, and how far each is from its bound.
type Cells = (Vec<grid::Cell>, Vec<compare::CellRegret>);

/// The grid in a short form: generated sessions, the narrowest and the widest links but one.
fn cells(output: &Output<'_>, place: &Place, fleet: &Fleet, seed: u64) -> anyhow::Result<Cells> {
    let generated = |name: &&str| Workload::named(name, 64, seed)?.with_requests(1500).recorded().ok();
    let mut fleet = fleet.clone();
    fleet.links.choices = vec![10.0, 100.0];
    let grid = grid::Grid {
        workloads: ["chat", "agent", "documents"].iter().filter_map(generated).collect(),
        fleets: vec![fleet],
    };
    let bar = progress(grid.len() as u64, "grid");
    let cells = grid.run(&output.bench(place.speeds()), &|| bar.inc(1))?;
    bar.finish_and_clear();
    let regrets = regrets(&cells, &grid)?;
    Ok((cells, regrets))
}
