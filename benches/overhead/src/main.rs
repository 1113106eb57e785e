//! What the coordinator adds to TTFT: tokenising, placing and proxying.
//!
//! One mock engine that computes in no time, asked directly and through the coordinator in turn, one request at a
//! time over kept connections. No prompt is asked twice, so that neither way profits from the other's caches. Prompts
//! are 8 KB of words, in two kinds:
//!
//! - `fresh`: each prompt is new from its first word on;
//! - `turns`: conversations that grow by 1 KB a turn up to 8 KB, as chats and agents send them; the last turns are
//!   timed. Each way has conversations of its own.
//!
//! The line holds where the difference of the medians is at most 1.5 ms for fresh prompts, the harder kind.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use baton_fleet::{Client, EngineKind, Fleet, FleetSpec, Part};
use clap::Parser;
use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// Allowed difference of the medians.
const ALLOWED_MS: f64 = 1.5;

const WORDS: &str = "river window quiet engine copper morning letter garden bridge winter stone candle market \
    forest signal paper harbor thunder little orange silver people mountain shadow number kitchen travel doctor \
    the of and with without before between under across because simple bright early heavy open second carried";

/// Measures what tokenising and proxying add to TTFT at 8 KB prompts.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Prompts of each kind.
    #[arg(long, default_value_t = 300)]
    prompts: usize,
    /// Bytes of a prompt.
    #[arg(long, default_value_t = 8192)]
    bytes: usize,
    /// End in one JSON line.
    #[arg(long)]
    json: bool,
}

/// TTFTs both ways, in microseconds.
struct Pair {
    direct: Histogram<u64>,
    proxied: Histogram<u64>,
}

impl Pair {
    fn new() -> anyhow::Result<Self> {
        Ok(Self { direct: Histogram::new(3)?, proxied: Histogram::new(3)? })
    }

    fn of(&mut self, way: usize) -> &mut Histogram<u64> {
        if way == 0 { &mut self.direct } else { &mut self.proxied }
    }

    fn added_ms(&self, quantile: f64) -> f64 {
        ms(self.proxied.value_at_quantile(quantile)) - ms(self.direct.value_at_quantile(quantile))
    }
}

#[tokio::main]
#[allow(clippy::print_stdout, reason = "the figures are what this program is for")]
async fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    let mut spec = FleetSpec::mock(1);
    for engine in &mut spec.engines {
        if let EngineKind::Mock(mock) = &mut engine.kind {
            mock.prefill_ms = Some([0.0; 3]);
            mock.decode_ms = Some([0.0; 3]);
            mock.blocks = 16_384;
        }
    }
    // Per-request log lines would be part of what is measured.
    spec.log = "warn".into();
    let fleet = Fleet::start(spec).await?;
    let (fresh, turns) = (fresh(&fleet, &options).await?, turns(&fleet, &options).await?);
    fleet.shutdown().await?;

    println!("{} prompts of {} bytes, one at a time; TTFT in ms", options.prompts, options.bytes);
    println!(
        "{:<8} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "", "direct p50", "proxy p50", "added p50", "direct p99", "proxy p99"
    );
    let mut line = serde_json::Map::new();
    for (name, pair) in [("fresh", &fresh), ("turns", &turns)] {
        let at = |histogram: &Histogram<u64>, quantile| ms(histogram.value_at_quantile(quantile));
        println!(
            "{name:<8} {:>10.2} {:>10.2} {:>10.2} {:>10.2} {:>10.2}",
            at(&pair.direct, 0.5),
            at(&pair.proxied, 0.5),
            pair.added_ms(0.5),
            at(&pair.direct, 0.99),
            at(&pair.proxied, 0.99),
        );
        line.insert(format!("{name}_direct_p50_ms"), round(at(&pair.direct, 0.5)));
        line.insert(format!("{name}_proxied_p50_ms"), round(at(&pair.proxied, 0.5)));
        line.insert(format!("{name}_added_p50_ms"), round(pair.added_ms(0.5)));
    }
    let ok = fresh.added_ms(0.5) <= ALLOWED_MS;
    println!("{} at most {ALLOWED_MS} ms added at the median", if ok { "ok  " } else { "FAIL" });
    if options.json {
        line.insert("allowed_ms".into(), ALLOWED_MS.into());
        line.insert("ok".into(), ok.into());
        println!("{}", json!({"proxy_overhead": line}));
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn fresh(fleet: &Fleet, options: &Options) -> anyhow::Result<Pair> {
    const WARM_UP: usize = 30;
    let ways = [fleet.client_of(Part::Engine(0)), fleet.client()];
    let mut words = Words { state: 1 };
    let mut pair = Pair::new()?;
    for i in 0..options.prompts + WARM_UP {
        for way in order(i) {
            let prompt = words.text(options.bytes);
            let body = json!({"model": fleet.model(), "prompt": prompt, "max_tokens": 1, "stream": true});
            let ttft = ttft(&ways[way], "/v1/completions", &body).await?;
            if i >= WARM_UP {
                pair.of(way).record(ttft.as_micros() as u64)?;
            }
        }
    }
    Ok(pair)
}

async fn turns(fleet: &Fleet, options: &Options) -> anyhow::Result<Pair> {
    const TURN: usize = 1024;
    let ways = [fleet.client_of(Part::Engine(0)), fleet.client()];
    let mut words = Words { state: 2 };
    let mut pair = Pair::new()?;
    let turns = options.bytes.div_ceil(TURN);
    // The last quarter of a conversation's turns is near the wanted length, and timed.
    let untimed = turns - turns.div_ceil(4);
    let mut timed = 0;
    while timed < options.prompts {
        let mut conversations: [Vec<Value>; 2] = [Vec::new(), Vec::new()];
        for turn in 0..turns {
            for way in order(turn) {
                let messages = &mut conversations[way];
                messages.push(json!({"role": "user", "content": words.text(TURN / 2)}));
                let body =
                    json!({"model": fleet.model(), "messages": messages, "max_tokens": 1, "stream": true});
                let ttft = ttft(&ways[way], "/v1/chat/completions", &body).await?;
                if turn >= untimed {
                    pair.of(way).record(ttft.as_micros() as u64)?;
                }
                messages.push(json!({"role": "assistant", "content": words.text(TURN / 2)}));
            }
            timed += usize::from(turn >= untimed);
        }
    }
    Ok(pair)
}

/// Which way comes first alternates.
fn order(i: usize) -> [usize; 2] {
    if i.is_multiple_of(2) { [0, 1] } else { [1, 0] }
}

async fn ttft(client: &Client, path: &str, body: &Value) -> anyhow::Result<Duration> {
    client.stream(path, body, &[]).await?.ttft().with_context(|| format!("{}: no token", client.base()))
}

fn ms(micros: u64) -> f64 {
    micros as f64 / 1e3
}

fn round(ms: f64) -> Value {
    ((ms * 1000.0).round() / 1000.0).into()
}

/// Words in an order that repeats in every run.
struct Words {
    state: u64,
}

impl Words {
    fn number(&mut self) -> u64 {
        // splitmix64
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn text(&mut self, bytes: usize) -> String {
        let all: Vec<&str> = WORDS.split_whitespace().collect();
        let mut text = format!("{:08}", self.number() % 100_000_000);
        while text.len() < bytes {
            text.push(' ');
            text.push_str(all[self.number() as usize % all.len()]);
        }
        text.truncate(bytes);
        text
    }
}
