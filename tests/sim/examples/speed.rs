//! Simulated requests per minute: 16 engines, a mix of chat, agents and documents.
//!
//! `cargo run --release -p baton-sim --example speed [REQUESTS] [SESSIONS_PER_SECOND] [BLOCK_TOKENS] [POLICY]`
//!
//! With the coordinator's decision under a policy of that name; `sticky` is a placer that decides nothing, for the simulator alone.

use std::io::Write;
use std::time::Instant;

use baton_sim::decision::{Production, Speeds};
use baton_sim::fleet::Fleet;
use baton_sim::sim::{Answer, Overlap, Placer, Plan, Request, run};
use baton_sim::trace::{First, Generator, Shape};
use baton_sim::{Nanos, SECOND};

/// Half of the sessions stay on one engine each, the others are handed off; all events are asked for.
struct Sticky {
    engines: u64,
}

impl Placer for Sticky {
    fn place(&mut self, _now: Nanos, request: &Request<'_>) -> Answer {
        let session = request.session.unwrap_or(request.number);
        let engine = (session % self.engines) as u32;
        let decode = ((u64::from(engine) + 1) % self.engines) as u32;
        match session / self.engines % 2 {
            0 => Answer::Goes(Plan::Colocated { engine }),
            _ => Answer::Overlaps(
                Plan::Disaggregated { prefill: engine, decode },
                Overlap { after: 0, more_time: SECOND },
            ),
        }
    }

    fn wants_kv_events(&self) -> bool {
        true
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |at: usize, default: &'static str| arguments.get(at).map_or(default, String::as_str);
    let (requests, rate) = (argument(0, "200000").parse()?, argument(1, "2").parse()?);
    let (block_tokens, policy) = (argument(2, "64").parse()?, argument(3, "adaptive"));
    let fleet = Fleet::parse(include_str!("../../../benches/fleets/8b-h100x16.toml"))?;
    let mut source = First::new(Generator::new(Shape::mix(), rate, block_tokens, 1), requests);
    let mut sticky = Sticky { engines: fleet.len() as u64 };
    let mut production = match policy {
        "sticky" => None,
        policy => Some(Production::new(&fleet, block_tokens, policy, Speeds::Learned)?),
    };
    let placer: &mut dyn Placer = match &mut production {
        Some(production) => production,
        None => &mut sticky,
    };
    let start = Instant::now();
    let report = run(&fleet, block_tokens, &mut source, placer).report;
    let seconds = start.elapsed().as_secs_f64();
    let steps: u64 = report.engines.iter().map(|engine| engine.steps).sum();
    let busy =
        report.engines.iter().map(|engine| engine.utilisation).sum::<f64>() / report.engines.len() as f64;
    writeln!(
        std::io::stdout(),
        "{requests} requests in {seconds:.2} s: {:.2} M a minute. {:.0} s of virtual time, {:.1} M steps,\n\
         utilisation {busy:.2}, hit rate {:.3}, TTFT p50 {:.0} ms p99 {:.0} ms, mean prompt {:.0} tokens",
        requests as f64 * 60.0 / seconds / 1e6,
        report.seconds,
        steps as f64 / 1e6,
        report.hit_rate,
        report.ttft_ms.p50,
        report.ttft_ms.p99,
        report.prompt_tokens as f64 / report.finished as f64,
    )?;
    Ok(())
}
