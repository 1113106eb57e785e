//! Measures transfers between two processes over loopback: real mapped memory, mutual TLS, checksums verified.
//!
//! ```text
//! cargo run --release -p baton-kv-transfer --example transfer_bench -- [--rounds N] [--out FILE]
//! ```
//! Prints a line per size and, at the end, one JSON line. "cold" is a first pull that has to connect; the "warm" ones run
//! on a connection that [`Endpoint::warm`] opened, and bytes of both travel by QUIC. "direct" is the way between engines of
//! one host: from memory to memory. "by head" is as "warm" from an engine that has its heads token by token (NHD) to one
//! that has its tokens head by head (HND). "packed" is as "warm" with values as fp8 on the way; its bytes are those in memory,
//! of which about half travel. A block has SmolLM2's 60 pieces of 12 KiB.

#![allow(clippy::print_stdout, reason = "a program that prints its results")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use baton_kernels::{BlockLayout, BlockMemory, Guard, Sliced};
use baton_kv_transfer::tls::Identity;
use baton_kv_transfer::{Endpoint, Limits, Peer};
use baton_proto::wire::{BlockForm, WireDtype};
use hdrhistogram::Histogram;
use serde_json::json;

#[path = "../tests/support/mod.rs"]
mod support;

use support::{Authority, Shape, TableSource};

/// What a 135M model's blocks look like on CPU, and others with fewer, larger pieces.
const SHAPES: [(&str, Shape, &[u32]); 3] = [
    ("12KiB x 60", Shape { pieces: 60, piece_bytes: 12 << 10, blocks: 400 }, &[1, 4, 32, 94, 380]),
    ("64KiB x 32", Shape { pieces: 32, piece_bytes: 64 << 10, blocks: 130 }, &[1, 128]),
    ("1MiB x 2", Shape { pieces: 2, piece_bytes: 1 << 20, blocks: 130 }, &[1, 128]),
];

/// Added to the index of a shape that is held by heads.
const BY_HEADS: usize = 10;

/// How blocks get from one engine to the other.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    AsTheyLie,
    ByHead,
    Packed,
}

impl Way {
    /// How blocks lie at the puller.
    fn layout(self, shape: Shape) -> BlockLayout {
        match self {
            Self::AsTheyLie => shape.into(),
            Self::ByHead => shape.by_heads(false),
            Self::Packed => shape.by_heads(true),
        }
    }

    fn form(self) -> BlockForm {
        match self {
            Self::AsTheyLie => BlockForm::AsItLies,
            Self::ByHead => BlockForm::Common,
            Self::Packed => BlockForm::Packed,
        }
    }
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (mut rounds, mut out, mut serve) = (30u32, None, None);
    while let Some(arg) = args.next() {
        let value = args.next().with_context(|| format!("{arg}: give a value"))?;
        match arg.as_str() {
            "--rounds" => rounds = value.parse().context("--rounds: give a number")?,
            "--out" => out = Some(value),
            "--serve" => serve = Some(value),
            _ => anyhow::bail!("{arg}: use --rounds N or --out FILE"),
        }
    }
    match serve {
        Some(dir) => hold(&dir),
        None => pull(rounds.max(1), out),
    }
}

fn identity(dir: &str, name: &str) -> Result<Identity> {
    let path = |file: String| std::path::Path::new(dir).join(file);
    Ok(Identity::load(&path("ca.pem".into()), &path(format!("{name}.pem")), &path(format!("{name}.key")))?)
}

/// The holding process: one hold per line on stdin, "shape blocks number"; shape 10 and above by heads.
fn hold(dir: &str) -> Result<()> {
    let source = TableSource::new(1);
    let endpoint = support::endpoint(identity(dir, "holder")?, source.clone(), Limits::default());
    println!("{}", endpoint.local_addr());
    let memories: Vec<_> = SHAPES
        .iter()
        .map(|(_, shape, _)| {
            let memory = shape.memory();
            support::fill(&memory, 0..shape.blocks as u32, 7);
            memory
        })
        .collect();
    println!("filled");
    for line in std::io::stdin().lines() {
        let line = line?;
        let numbers: Vec<u64> = line.split(' ').map(str::parse).collect::<Result<_, _>>()?;
        let (shape, blocks, number) = (numbers[0] as usize, numbers[1] as u32, numbers[2]);
        let id = transfer_id(number);
        // From last to first: blocks of a request are not in order in memory.
        let ids = (0..blocks).rev().collect();
        let (index, by_heads) = (shape % BY_HEADS, shape >= BY_HEADS);
        let shape = SHAPES[index].1;
        let layout = if by_heads { shape.by_heads(true) } else { shape.into() };
        source.hold(id, &memories[index], layout, ids, Duration::from_secs(60));
        println!("held");
    }
    Ok(())
}

fn transfer_id(number: u64) -> baton_proto::TransferId {
    baton_proto::TransferId::from_bytes(u128::from(number).to_be_bytes())
}

/// The holding process, from the other side.
struct Holder {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    peer: Peer,
    holds: u64,
}

impl Holder {
    fn start(dir: &str) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--serve", dir])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take();
        let mut stdout = BufReader::new(child.stdout.take().context("stdout")?);
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        let peer = Peer { engine_id: "holder".parse()?, address: line.trim().to_owned() };
        let mut holder = Self { child, stdin, stdout, peer, holds: 0 };
        holder.expect("filled")?;
        Ok(holder)
    }

    fn expect(&mut self, word: &str) -> Result<()> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        ensure!(line.trim() == word, "the holder says {line:?}, not {word}");
        Ok(())
    }

    fn hold(&mut self, shape: usize, blocks: u32) -> Result<baton_proto::TransferId> {
        self.holds += 1;
        writeln!(self.stdin.as_mut().context("stdin")?, "{shape} {blocks} {}", self.holds)?;
        self.expect("held")?;
        Ok(transfer_id(self.holds))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.child.wait();
    }
}

fn pull(rounds: u32, out: Option<String>) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir_name = dir.path().to_str().context("temporary directory")?.to_owned();
    Authority::new().write(dir.path(), &["holder", "puller"])?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut holder = Holder::start(&dir_name)?;
    let puller_of = |direct| -> Result<Endpoint> {
        let limits = Limits { direct, ..Limits::default() };
        Ok(support::endpoint(identity(&dir_name, "puller")?, TableSource::new(1), limits))
    };
    let puller = || puller_of(false);

    let mut results = Vec::new();
    let anew = || puller().map(|new| (new, false));
    let cold = measure(&runtime, &mut holder, 0, Way::AsTheyLie, 94, rounds.min(5), anew)?;
    print_line("cold, 12KiB x 60", &cold);
    results.push(cold.json("cold", "12KiB x 60"));
    let kept = puller()?;
    let path = runtime.block_on(kept.warm(&holder.peer))?;
    println!("path: mtu {}, rtt {:?}", path.mtu, path.rtt);
    let near = puller_of(true)?;
    runtime.block_on(near.warm(&holder.peer))?;
    // On connections of their own: what the one before it has learnt of its path is part of the figures.
    let (apart, packing) = (puller()?, puller()?);
    runtime.block_on(apart.warm(&holder.peer))?;
    runtime.block_on(packing.warm(&holder.peer))?;
    let ways = [
        ("warm", Way::AsTheyLie, &kept),
        ("direct", Way::AsTheyLie, &near),
        ("by head", Way::ByHead, &apart),
        ("packed", Way::Packed, &packing),
    ];
    for (index, (name, _, sizes)) in SHAPES.iter().enumerate() {
        for blocks in *sizes {
            let rounds = if *blocks < 10 { rounds * 4 } else { rounds };
            for (kind, way, endpoint) in ways {
                let own = || Ok((endpoint.clone(), true));
                let went = measure(&runtime, &mut holder, index, way, *blocks, rounds, own)?;
                print_line(&format!("{kind}, {name}"), &went);
                results.push(went.json(kind, name));
            }
        }
    }
    let stats = near.stats();
    ensure!(stats.direct_bytes == stats.received_bytes && kept.stats().direct_bytes == 0, "{stats:?}");
    let line = json!({"bench": "transfer", "verify": true, "results": results}).to_string();
    println!("{line}");
    if let Some(out) = out {
        std::fs::write(out, line + "\n")?;
    }
    Ok(())
}

struct Measured {
    blocks: u32,
    bytes: u64,
    millis: Histogram<u64>,
    /// CPU time of both processes for each GB.
    cpu_s_per_gb: f64,
}

/// CPU time that a process has used, in seconds.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(')').next().context("stat")?.split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    Ok(ticks / rustix::param::clock_ticks_per_second() as f64)
}

impl Measured {
    fn ms(&self, quantile: f64) -> f64 {
        self.millis.value_at_quantile(quantile) as f64 / 1000.0
    }

    fn gb_per_s(&self, quantile: f64) -> f64 {
        self.bytes as f64 / 1e6 / self.ms(quantile)
    }

    fn json(&self, kind: &str, shape: &str) -> serde_json::Value {
        json!({
            "kind": kind, "shape": shape, "blocks": self.blocks, "bytes": self.bytes,
            "p50_ms": self.ms(0.5), "p90_ms": self.ms(0.9), "min_ms": self.ms(0.0),
            "gb_per_s_p50": self.gb_per_s(0.5), "gb_per_s_best": self.gb_per_s(0.0),
            "cpu_s_per_gb": self.cpu_s_per_gb,
        })
    }
}

fn print_line(name: &str, measured: &Measured) {
    println!(
        "{name:<20} {:>4} blocks {:>8.2} MB  p50 {:>8.3} ms  p90 {:>8.3} ms  min {:>8.3} ms  {:>5.2} GB/s p50, {:.2} best, {:.2} CPU-s/GB",
        measured.blocks,
        measured.bytes as f64 / 1e6,
        measured.ms(0.5),
        measured.ms(0.9),
        measured.ms(0.0),
        measured.gb_per_s(0.5),
        measured.gb_per_s(0.0),
        measured.cpu_s_per_gb,
    );
}

/// Block 0 as it comes where it travels packed.
fn packed(memory: Arc<dyn BlockMemory>, layout: &BlockLayout) -> Result<Vec<u8>> {
    let guard: Guard = Arc::new(());
    Ok(Sliced::as_it_came(memory, layout.heads.as_ref(), BlockForm::Packed)?.read(0, guard)?.concat())
}

/// A block that lies head by head, as it lies token by token.
fn by_token(block: &[u8], piece_bytes: usize) -> Vec<u8> {
    let heads = piece_bytes / (16 * 256);
    let row = |piece: usize, token, head| &block[piece * piece_bytes + (head * 16 + token) * 256..][..256];
    let rows = (0..block.len() / piece_bytes)
        .flat_map(|piece| (0..16).flat_map(move |token| (0..heads).map(move |head| (piece, token, head))));
    rows.flat_map(|(piece, token, head)| row(piece, token, head).to_vec()).collect()
}

fn measure(
    runtime: &tokio::runtime::Runtime,
    holder: &mut Holder,
    index: usize,
    way: Way,
    blocks: u32,
    rounds: u32,
    endpoint: impl Fn() -> Result<(Endpoint, bool)>,
) -> Result<Measured> {
    let shape = SHAPES[index].1;
    let (layout, form) = (way.layout(shape), way.form());
    let held_by_heads = if way == Way::AsTheyLie { 0 } else { BY_HEADS };
    let memory = shape.memory();
    let mut millis = Histogram::new(3)?;
    let bytes = u64::from(blocks) * shape.block_bytes() as u64;
    let both = |holder: &Holder| -> Result<f64> {
        Ok(cpu_seconds(std::process::id())? + cpu_seconds(holder.child.id())?)
    };
    let travelling = match form.dtype() {
        WireDtype::AsStored => bytes,
        WireDtype::Fp8 => u64::from(blocks) * layout.packed_bytes()? as u64,
    };
    let mut cpu = 0.0;
    for round in 0..rounds {
        let id = holder.hold(index + held_by_heads, blocks)?;
        let (endpoint, warm) = endpoint()?;
        let mut request = support::request(holder.peer.clone(), id, 1, shape, 0, blocks);
        (request.layout, request.dtype) = (layout.clone(), form.dtype());
        let (started, cpu_before) = (Instant::now(), both(holder)?);
        let report = runtime.block_on(endpoint.pull(request, memory.clone(), (0..blocks).collect()))?;
        let elapsed = started.elapsed();
        cpu += both(holder)? - cpu_before;
        let right = report.bytes == travelling && (report.direct || report.form == form);
        ensure!(right && report.failed.is_empty(), "{report:?}");
        // The first one warms up caches and the congestion window.
        if round > 0 || !warm {
            millis.record(elapsed.as_micros() as u64)?;
        }
    }
    let expected = support::content(memory.block_bytes(), blocks - 1, 7);
    let is = support::read(&memory, 0);
    let right = match way {
        Way::AsTheyLie => is == expected,
        Way::ByHead => by_token(&is, shape.piece_bytes as usize) == expected,
        Way::Packed => {
            let held = shape.memory();
            held.write(0, 0, &expected)?;
            packed(memory, &layout)? == packed(held, &layout)?
        }
    };
    ensure!(right, "block 0 does not hold what it should");
    let cpu_s_per_gb = cpu / (bytes as f64 * f64::from(rounds) / 1e9);
    Ok(Measured { blocks, bytes, millis, cpu_s_per_gb })
}
