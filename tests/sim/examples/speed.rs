//! Simulated requests per minute: 16 engines, a mix of chat, agents and documents.
//!
//! `cargo run --release -p baton-sim --example speed [REQUESTS] [SESSIONS_PER_SECOND] [BLOCK_TOKENS]`

use std::io::Write;
use std::time::Instant;

use baton_sim::Nanos;
use baton_sim::engine::events::KvEvents;
use baton_sim::fleet::Fleet;
use baton_sim::sim::{Placer, Plan, Request, run};
use baton_sim::trace::{First, Generator, Shape};

/// Half of the sessions stay on one engine each, the others are handed off; all events are asked for, and counted.
struct Sticky {
    engines: u64,
    blocks: u64,
}

impl Placer for Sticky {
    fn place(&mut self, _now: Nanos, request: &Request<'_>) -> Option<Plan> {
        let session = request.session.unwrap_or(request.number);
        let engine = (session % self.engines) as u32;
        Some(match session / self.engines % 2 {
            0 => Plan::Colocated { engine },
            _ => Plan::Disaggregated {
                prefill: engine,
                decode: ((u64::from(engine) + 1) % self.engines) as u32,
            },
        })
    }

    fn wants_kv_events(&self) -> bool {
        true
    }

    fn kv_events(&mut self, _now: Nanos, _engine: u32, events: &KvEvents) {
        self.blocks += events.iter().map(|(_, ids)| ids.len() as u64).sum::<u64>();
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<f64> = std::env::args().skip(1).map(|text| text.parse()).collect::<Result<_, _>>()?;
    let argument = |at: usize, default: f64| arguments.get(at).copied().unwrap_or(default);
    let (requests, rate, block_tokens) =
        (argument(0, 200_000.0) as u64, argument(1, 6.0), argument(2, 64.0) as u32);
    let fleet = Fleet::parse(include_str!("../../../benches/fleets/8b-h100x16.toml"))?;
    let mut source = First::new(Generator::new(Shape::mix(), rate, block_tokens, 1), requests);
    let mut placer = Sticky { engines: fleet.len() as u64, blocks: 0 };
    let start = Instant::now();
    let report = run(&fleet, block_tokens, &mut source, &mut placer).report;
    let seconds = start.elapsed().as_secs_f64();
    let steps: u64 = report.engines.iter().map(|engine| engine.steps).sum();
    let busy =
        report.engines.iter().map(|engine| engine.utilisation).sum::<f64>() / report.engines.len() as f64;
    writeln!(
        std::io::stdout(),
        "{requests} requests in {seconds:.2} s: {:.2} M a minute. {:.0} s of virtual time, {:.1} M steps, {:.1} M block events,\n\
         utilisation {busy:.2}, hit rate {:.3}, TTFT p50 {:.0} ms p99 {:.0} ms, mean prompt {:.0} tokens",
        requests as f64 * 60.0 / seconds / 1e6,
        report.seconds,
        steps as f64 / 1e6,
        placer.blocks as f64 / 1e6,
        report.hit_rate,
        report.ttft_ms.p50,
        report.ttft_ms.p99,
        report.prompt_tokens as f64 / report.finished as f64,
    )?;
    Ok(())
}
