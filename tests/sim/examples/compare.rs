//! Policies on one trace, side by side.
//!
//! `cargo run --release -p baton-sim --example compare FLEET [TRACE|mix|chat|agent|documents] [RATE] [GBIT] [REQUESTS] [SPLIT]`
//!
//! TRACE is a file in Mooncake's form; RATE is a factor on its times, and sessions per second of generated ones.

use std::io::Write;
use std::path::Path;

use baton_coordinator_core::placement::POLICIES;
use baton_sim::decision::{Production, Speeds};
use baton_sim::fleet::Fleet;
use baton_sim::sim::run;
use baton_sim::trace::{First, Generator, Mooncake, Scaled, Shape, Source};

const BLOCK_TOKENS: u32 = 512;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |at: usize, default: &'static str| arguments.get(at).map_or(default, String::as_str);
    let fleet = Fleet::read(Path::new(argument(0, "benches/fleets/8b-h100x8.toml")))?;
    let gbit: f64 = argument(3, "100").parse()?;
    let colocated = fleet.with_gbit(gbit);
    let split = match argument(5, "") {
        "" => None,
        text => Some(colocated.with_split(text.parse()?)?),
    };
    let (trace, rate, requests) =
        (argument(1, "mix"), argument(2, "1").parse()?, argument(4, "20000").parse()?);
    let open = || -> Result<Box<dyn Source>, std::io::Error> {
        let shapes = match trace {
            "mix" => Shape::mix(),
            "chat" => vec![Shape::chat()],
            "agent" => vec![Shape::agent()],
            "documents" => vec![Shape::documents()],
            path => return Ok(Box::new(Scaled::new(Mooncake::open(Path::new(path), BLOCK_TOKENS)?, rate))),
        };
        Ok(Box::new(Generator::new(shapes, rate, BLOCK_TOKENS, 1)))
    };
    let mut out = std::io::stdout();
    writeln!(
        out,
        "{:<17} {:>7} {:>8} {:>9} {:>9} {:>9} {:>9} {:>6} {:>8} {:>6} {:>6}",
        "policy",
        "in SLO",
        "good/s",
        "TTFT p50",
        "TTFT p99",
        "TPOT p50",
        "TPOT p99",
        "hits",
        "GB moved",
        "handed",
        "pulled"
    )?;
    for policy in POLICIES.map(|policy| policy.name()) {
        let fleet = split.as_ref().filter(|_| policy == "disaggregated").unwrap_or(&colocated);
        let mut source = First::new(open()?, requests);
        let mut placer = Production::new(fleet, BLOCK_TOKENS, policy, Speeds::Learned)?;
        let report = run(fleet, BLOCK_TOKENS, &mut source, &mut placer).report;
        let share = |part: u64| 100.0 * part as f64 / report.finished.max(1) as f64;
        writeln!(
            out,
            "{policy:<17} {:>6.1}% {:>8.2} {:>9.0} {:>9.0} {:>9.1} {:>9.1} {:>5.1}% {:>8.1} {:>5.1}% {:>5.1}%",
            100.0 * report.attainment,
            report.goodput_per_second,
            report.ttft_ms.p50,
            report.ttft_ms.p99,
            report.tpot_ms.p50,
            report.tpot_ms.p99,
            100.0 * report.hit_rate,
            report.bytes_moved as f64 / 1e9,
            share(report.plans.disaggregated),
            share(report.plans.pull),
        )?;
    }
    Ok(())
}
