//! Hands KV from one process's GPU memory to another's, over loopback QUIC and then directly, and says where the time
//! goes.
//!
//! ```text
//! cargo run --release -p baton-kv-transfer --example gpu_transfer -- [--gib N]
//! ```
//! Both processes use GPU 0, so that the direct way is a copy on it, by CUDA IPC. They have a 70B model's layout (80 layers, K and V apart, 8 heads of 128 bf16 values, 16 tokens:
//! 160 pieces of 32 KiB make a block of 5 MiB). Ends in one JSON line.

#![allow(clippy::print_stdout, reason = "a program that prints its results")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use baton_kernels::cuda::{CudaMemory, DEFAULT_PINNED_BYTES, Device, DeviceBuffer, Paged};
use baton_kernels::{BlockMemory, Plan};
use baton_kv_transfer::checksum::Checksums;
use baton_kv_transfer::tls::Identity;
use baton_kv_transfer::{Endpoint, Limits, Peer, PullReport};
use serde_json::json;

#[path = "../tests/support/mod.rs"]
mod support;

use support::{Authority, Shape, TableSource, content, id};

/// Pulls are of so many blocks, 640 MiB, several at once as a loaded engine has them.
const PULL: u32 = 128;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => pull(8),
        ["--gib", gib] => pull(gib.parse().context("--gib: give a number")?),
        ["--serve", dir, blocks] => serve(dir, blocks.parse()?),
        other => bail!("{other:?}: use --gib N"),
    }
}

fn shape(blocks: u64) -> Shape {
    Shape { pieces: 160, piece_bytes: 32 << 10, blocks }
}

fn memory(shape: Shape) -> Result<Arc<CudaMemory>> {
    let device = Device::open(0)?;
    let len = u64::from(shape.piece_bytes) * shape.blocks;
    let plan = Plan::of_layout(&shape.layout(), &vec![len; shape.pieces as usize], shape.blocks)?;
    let storages = (0..shape.pieces).map(|_| DeviceBuffer::zeroed(&device, len as usize));
    let storages = storages.collect::<Result<Vec<_>, _>>()?;
    Ok(CudaMemory::over(Paged::new(plan, storages)?, None, DEFAULT_PINNED_BYTES)?)
}

fn identity(dir: &str, name: &str) -> Result<Identity> {
    let path = |file: String| std::path::Path::new(dir).join(file);
    Ok(Identity::load(&path("ca.pem".into()), &path(format!("{name}.pem")), &path(format!("{name}.key")))?)
}

/// Where the blocks of a pull lie on the holder: from last to first, as those of a request are in no order.
fn held(first: u32, count: u32) -> Vec<u32> {
    (first..first + count).rev().collect()
}

/// The holds of the second way are those of the first with this added to their numbers.
const SECOND: u8 = 100;

/// First block and number of blocks of each pull.
fn pulls(blocks: u32) -> impl Iterator<Item = (u8, u32, u32)> {
    (0..blocks.div_ceil(PULL)).map(move |i| (i as u8, i * PULL, PULL.min(blocks - i * PULL)))
}

fn serve(dir: &str, blocks: u32) -> Result<()> {
    let source = TableSource::new(1);
    let endpoint = support::endpoint(identity(dir, "holder")?, source.clone(), Limits::default());
    let shape = shape(blocks.into());
    let memory = memory(shape)?;
    let ids: Vec<u32> = (0..blocks).collect();
    for some in ids.chunks(16) {
        for block in some {
            memory.write(*block, 0, &content(memory.block_bytes(), *block, 7))?;
        }
        memory.flush(some)?;
    }
    // Checksums are made when a hold is taken.
    let dynamic: Arc<dyn BlockMemory> = memory.clone();
    let guard: baton_kernels::Guard = Arc::new(());
    let started = Instant::now();
    Checksums::pending(ids.len()).make(&dynamic, 0, &ids, &guard)?;
    let checksums = started.elapsed();
    for (number, first, count) in pulls(blocks) {
        for number in [number, SECOND + number] {
            source.hold(id(number), &memory, shape, held(first, count), Duration::from_secs(300));
        }
    }
    println!("{} {}", endpoint.local_addr(), checksums.as_secs_f64());
    // Until the other side is done.
    std::io::stdin().lines().next();
    Ok(())
}

struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        if let Some(mut stdin) = self.0.stdin.take() {
            let _ = stdin.write_all(b"\n");
        }
        let _ = self.0.wait();
    }
}

fn pull(gib: u64) -> Result<()> {
    let blocks = u32::try_from((gib << 30) / shape(1).block_bytes() as u64)?;
    ensure!((1..=PULL * u32::from(SECOND)).contains(&blocks), "--gib: use 1 to 60");
    let dir = tempfile::tempdir()?;
    let name = dir.path().to_str().context("temporary directory")?.to_owned();
    Authority::new().write(dir.path(), &["holder", "puller"])?;
    let child = Command::new(std::env::current_exe()?)
        .args(["--serve", &name, &blocks.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut holder = Holder(child);
    let mut line = String::new();
    BufReader::new(holder.0.stdout.take().context("stdout")?).read_line(&mut line)?;
    let (address, checksum_s) = line.trim().split_once(' ').context("the holder did not start")?;
    let peer = Peer { engine_id: "holder".parse()?, address: address.to_owned() };

    let shape = shape(blocks.into());
    let memory = memory(shape)?;
    let endpoint_of = |direct| -> Result<Endpoint> {
        let limits = Limits { max_deadline: Duration::from_secs(300), direct, ..Limits::default() };
        Ok(support::endpoint(identity(&name, "puller")?, TableSource::new(1), limits))
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let bytes = u64::from(blocks) * shape.block_bytes() as u64;
    // All pulls by one way: their reports, and how long they took.
    let all = |direct: bool| -> Result<(Vec<PullReport>, f64)> {
        let endpoint = endpoint_of(direct)?;
        runtime.block_on(endpoint.warm(&peer))?;
        let started = Instant::now();
        let outcomes = runtime.block_on(async {
            let running: Vec<_> = pulls(blocks)
                .map(|(number, first, count)| {
                    let number = if direct { SECOND + number } else { number };
                    let mut request = support::request(peer.clone(), id(number), 1, shape, 0, count);
                    request.deadline = Duration::from_secs(240);
                    // In another order, so that no block holds already what it should.
                    let ids = if direct { held(first, count) } else { (first..first + count).collect() };
                    endpoint.pull(request, memory.clone(), ids)
                })
                .collect();
            let mut outcomes = Vec::new();
            for pull in running {
                outcomes.push(pull.await);
            }
            outcomes
        });
        let elapsed = started.elapsed().as_secs_f64();
        let reports = outcomes.into_iter().collect::<Result<Vec<_>, _>>()?;
        for report in &reports {
            let whole = report.failed.is_empty() && report.corrupt == 0;
            ensure!(
                whole && report.direct == direct,
                "direct: {}, failed: {:?}",
                report.direct,
                report.failed
            );
        }
        Ok((reports, elapsed))
    };
    let (reports, elapsed) = all(false)?;
    let sent: Vec<u64> = reports.into_iter().flat_map(|report| report.checksums).collect();
    // What lies in this GPU's memory now, against what the holder said of its own.
    let ids: Vec<u32> = (0..blocks).collect();
    let started = Instant::now();
    let made = memory.checksums(&ids).context("this GPU makes no checksums")??;
    let verify = started.elapsed().as_secs_f64();
    ensure!(made == sent, "checksums differ");
    for (_, first, count) in pulls(blocks) {
        let is = memory.clone().read(first, Arc::new(()))?.concat();
        ensure!(is == content(is.len(), first + count - 1, 7), "block {first} does not hold what it should");
    }
    let (reports, direct) = all(true)?;
    for ((_, first, count), report) in pulls(blocks).zip(reports) {
        let made = memory.checksums(&held(first, count)).context("this GPU makes no checksums")??;
        ensure!(made == report.checksums, "checksums differ");
        let is = memory.clone().read(first, Arc::new(()))?.concat();
        ensure!(is == content(is.len(), first, 7), "block {first} does not hold what it should");
    }
    let rate = |seconds: f64| bytes as f64 / seconds / 1e9;
    println!(
        "{}",
        json!({
            "bench": "gpu_transfer", "bytes": bytes, "blocks": blocks, "block_bytes": shape.block_bytes(),
            "seconds": elapsed, "gb_per_s": rate(elapsed), "checksums_equal": true,
            "direct_seconds": direct, "direct_gb_per_s": rate(direct),
            "hold_checksum_gb_per_s": rate(checksum_s.parse()?), "verify_gb_per_s": rate(verify),
        })
    );
    Ok(())
}
