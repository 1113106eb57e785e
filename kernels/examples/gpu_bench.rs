//! Measures the kernels and the pinned pool on a GPU, and checks memory that another process shares.
//!
//! ```text
//! cargo run --release -p baton-kernels --example gpu_bench
//! ```
//! Prints a line for each measurement and, at the end, one JSON line. Rates are of payload: a copy on the GPU moves each
//! byte twice. Every figure is the best of several rounds, beside the ceiling that plain copies reach on the same GPU.

#![allow(clippy::print_stdout, reason = "a program that prints its results")]

use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Instant;

use baton_kernels::cuda::{
    Checksummer, CudaMemory, CudaStorage, DEFAULT_PINNED_BYTES, Device, DeviceBuffer, IpcHandle, Packer,
    Paged, PinnedPool,
};
use baton_kernels::reference::xxh3;
use baton_kernels::{BlockMemory, CacheShape, Halves, MemoryError, Order, Plan};
use baton_proto::connector::{Layout, Piece};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const MIB: usize = 1 << 20;
const ROUNDS: usize = 5;

/// 70B-like: 80 layers, K and V apart, 8 heads of 128 bf16 values; 32 tokens make pieces of 64 KiB and blocks of 10 MiB.
/// 400 blocks are 4 GiB.
const SHAPE: CacheShape = CacheShape {
    layers: 80,
    tokens: 32,
    heads: 8,
    head_bytes: 256,
    halves: Halves::Apart,
    order: Order::Nhd,
    num_blocks: 400,
};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => bench(),
        ["--shared-by", uuid, handle] => shared_by(uuid, handle),
        other => Err(format!("{other:?}: use no argument").into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gpu_bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Best rate of some rounds, in GB/s.
fn rate(bytes: usize, mut round: impl FnMut() -> Outcome<()>) -> Outcome<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..=ROUNDS {
        let started = Instant::now();
        round()?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(bytes as f64 / best / 1e9)
}

/// What was measured, in order.
#[derive(Default)]
struct Results(Vec<(&'static str, f64)>);

impl Results {
    fn add(&mut self, name: &'static str, value: f64) -> f64 {
        println!("{name:<32} {value:>9.2}");
        self.0.push((name, value));
        value
    }

    fn json(&self, device: &str) -> String {
        let values: Vec<String> =
            self.0.iter().map(|(name, value)| format!("\"{name}\":{value:.3}")).collect();
        let device: String = device.chars().filter(|c| !c.is_control() && !"\"\\".contains(*c)).collect();
        format!("{{\"bench\":\"gpu\",\"device\":\"{device}\",{}}}", values.join(","))
    }
}

fn bench() -> Outcome<()> {
    let device = Device::open(0)?;
    println!("{}, near CPUs {:?}", device.name()?, device.near_cpus());
    if let Some(why) = device.fallback() {
        return Err(format!("its driver takes no kernels: {why}").into());
    }
    let mut results = Results::default();
    paged(&device, &mut results)?;
    pinned(&device, &mut results)?;
    pool(&device, &mut results)?;
    shared(&device)?;
    println!("memory of another process: read, written, checked and copied from");
    println!("{}", results.json(&device.name()?));
    Ok(())
}

/// Block ids in an order that is none.
fn shuffled(count: u32) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..count).collect();
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    for i in (1..ids.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ids.swap(i, (state >> 33) as usize % (i + 1));
    }
    ids
}

fn whole_blocks(device: &Arc<Device>) -> Outcome<Paged> {
    let len = SHAPE.storage_bytes();
    let storages = (0..SHAPE.layers).map(|_| DeviceBuffer::zeroed(device, len as usize));
    let storages = storages.collect::<Result<Vec<_>, _>>()?;
    let half = len / 2;
    let stride = half / u64::from(SHAPE.num_blocks);
    let piece = |storage: u32, half_index: u64| Piece {
        storage,
        offset: half_index * half,
        stride,
        len: stride as u32,
    };
    let pieces = (0..SHAPE.layers).flat_map(|layer| [piece(layer, 0), piece(layer, 1)]).collect();
    let layout = Layout { pieces, ..Layout::default() };
    let plan = Plan::of_layout(&layout, &vec![len; SHAPE.layers as usize], u64::from(SHAPE.num_blocks))?;
    Ok(Paged::new(plan, storages)?)
}

fn paged(device: &Arc<Device>, results: &mut Results) -> Outcome<()> {
    let mut whole = whole_blocks(device)?;
    let ids = shuffled(SHAPE.num_blocks);
    let stride = whole.plan().block_bytes();
    let bytes = stride * ids.len();
    let (mut staging, other) = (DeviceBuffer::zeroed(device, bytes)?, DeviceBuffer::zeroed(device, bytes)?);

    let ceiling = results.add("device_copy_gb_s", rate(bytes, || Ok(staging.copy_from(&other)?))?);
    drop(other);
    let gather =
        results.add("gather_64k_gb_s", rate(bytes, || Ok(whole.gather(&ids, &mut staging, stride)?))?);
    let scatter =
        results.add("scatter_64k_gb_s", rate(bytes, || Ok(whole.scatter(&ids, &staging, stride)?))?);
    results.add("gather_of_ceiling", gather / ceiling);
    results.add("scatter_of_ceiling", scatter / ceiling);

    let mut checksummer = Checksummer::new(device, stride, ids.len())?;
    let checksums = || checksummer.make(&staging, ids.len(), stride).map(drop).map_err(Into::into);
    results.add("checksum_gb_s", rate(bytes, checksums)?);

    // Half of the heads, as for a puller of twice the parallelism: rows of 256 bytes.
    let (plan, storages) = (SHAPE.plan(0..SHAPE.heads / 2)?, take_storages(device)?);
    let mut half = Paged::new(plan, storages)?;
    let stride = half.plan().block_bytes();
    let bytes = stride * ids.len();
    results.add("gather_half_heads_gb_s", rate(bytes, || Ok(half.gather(&ids, &mut staging, stride)?))?);
    results.add("scatter_half_heads_gb_s", rate(bytes, || Ok(half.scatter(&ids, &staging, stride)?))?);
    drop(half);

    let segment = (SHAPE.tokens * SHAPE.head_bytes / 2) as usize;
    let packer = Packer::new(device, stride / 2, segment)?;
    let mut packed = DeviceBuffer::zeroed(device, packer.packed_bytes() * ids.len())?;
    results.add("fp8_pack_gb_s", rate(bytes, || Ok(packer.pack(&staging, ids.len(), &mut packed)?))?);
    results.add("fp8_unpack_gb_s", rate(bytes, || Ok(packer.unpack(&packed, ids.len(), &mut staging)?))?);
    Ok(())
}

fn take_storages(device: &Arc<Device>) -> Outcome<Vec<DeviceBuffer>> {
    let len = SHAPE.storage_bytes() as usize;
    Ok((0..SHAPE.layers).map(|_| DeviceBuffer::zeroed(device, len)).collect::<Result<_, _>>()?)
}

/// Copies of one large pinned buffer: the ceiling.
fn pinned(device: &Arc<Device>, results: &mut Results) -> Outcome<()> {
    let bytes = 512 * MIB;
    let pool = PinnedPool::new(Some(device), bytes, bytes)?;
    let mut host = pool.take().ok_or("no buffer")?;
    let mut on_device = DeviceBuffer::zeroed(device, bytes)?;
    results.add("d2h_ceiling_gb_s", rate(bytes, || Ok(on_device.download_pinned(&mut host)?))?);
    results.add("h2d_ceiling_gb_s", rate(bytes, || Ok(on_device.upload_pinned(&host)?))?);
    Ok(())
}

/// Blocks through the pool, as a transfer reads and writes them, without a network.
fn pool(device: &Arc<Device>, results: &mut Results) -> Outcome<()> {
    let memory = CudaMemory::over(whole_blocks(device)?, None, DEFAULT_PINNED_BYTES)?;
    let ids = shuffled(SHAPE.num_blocks);
    let bytes = memory.block_bytes() * ids.len();
    let content: Vec<u8> =
        (0..memory.block_bytes() as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();

    // Incoming bytes are copied to the pinned buffers by the threads that receive them: four, as pulls at once.
    let write = |ids: &[u32]| -> Result<(), MemoryError> {
        ids.iter().try_for_each(|block| memory.write(*block, 0, &content))?;
        memory.flush(ids)
    };
    let writes = rate(bytes, || {
        std::thread::scope(|scope| {
            let threads: Vec<_> = ids.chunks(100).map(|some| scope.spawn(move || write(some))).collect();
            let joined = threads.into_iter().map(|thread| thread.join().map_err(|_| "a writer panicked"));
            joined.collect::<Result<Result<(), MemoryError>, _>>()??;
            Ok(())
        })
    })?;
    let ahead = memory.ahead();
    let reads = rate(bytes, || {
        let mut under_way = std::collections::VecDeque::new();
        for block in &ids {
            under_way.push_back(memory.clone().stage(*block, Arc::new(()))?);
            if under_way.len() > ahead {
                under_way.pop_front().ok_or("nothing staged")?.take()?;
            }
        }
        under_way.into_iter().try_for_each(|staged| staged.take().map(drop))?;
        Ok(())
    })?;
    let ceiling =
        |name| results.0.iter().find(|(known, _)| *known == name).map_or(f64::NAN, |(_, value)| *value);
    let (d2h, h2d) = (ceiling("d2h_ceiling_gb_s"), ceiling("h2d_ceiling_gb_s"));
    results.add("d2h_pool_gb_s", reads);
    results.add("d2h_pool_of_ceiling", reads / d2h);
    results.add("h2d_pool_gb_s", writes);
    results.add("h2d_pool_of_ceiling", writes / h2d);

    let read = memory.clone().read(ids[0], Arc::new(()))?.concat();
    let checksums = memory.checksums(&ids).ok_or("no checksums on this GPU")??;
    if read != content || checksums.iter().any(|checksum| *checksum != xxh3::checksum(&content)) {
        return Err("what was written is not what is read".into());
    }
    Ok(())
}

/// One storage of 16 blocks of 64 KiB, for the check of sharing.
fn shared_layout() -> (Layout, u64) {
    let piece = |offset| Piece { storage: 0, offset, stride: 65_536, len: 32_768 };
    (Layout { pieces: vec![piece(32_768), piece(0)], ..Layout::default() }, 16)
}

/// Shares memory with a child, which copies block 1 to block 2, and to a memory of its own.
fn shared(device: &Arc<Device>) -> Outcome<()> {
    let mut buffer = DeviceBuffer::zeroed(device, 16 * 65_536)?;
    let content: Vec<u8> = (0..65_536u32).map(|at| (at.wrapping_mul(40_503) >> 9) as u8).collect();
    buffer.upload(65_536, &content)?;
    let status = Command::new(std::env::current_exe()?)
        .args(["--shared-by", &hex(&device.uuid()?), &hex(&buffer.export()?)])
        .status()?;
    let mut copied = vec![0; 65_536];
    buffer.download(2 * 65_536, &mut copied)?;
    if !status.success() || copied != content {
        return Err("memory shared with another process was not copied as it should".into());
    }
    Ok(())
}

fn shared_by(uuid: &str, handle: &str) -> Outcome<()> {
    let uuid: [u8; 16] = unhex(uuid)?;
    let handle: IpcHandle = unhex(handle)?;
    let (layout, blocks) = shared_layout();
    let storage = CudaStorage { handle, len: blocks * 65_536 };
    let memory = CudaMemory::open(uuid, &[storage], None, &layout, blocks, 8 * MIB)?;
    let block = memory.clone().read(1, Arc::new(()))?.concat();
    let checksums = memory.checksums(&[1]).ok_or("no checksums on this GPU")??;
    if checksums != [xxh3::checksum(&block)] {
        return Err("the checksum of a shared block is not that of its bytes".into());
    }
    memory.write(2, 0, &block)?;
    memory.flush(&[2])?;
    // As an agent copies from an engine that is not its own.
    let len = blocks * 65_536;
    let own = DeviceBuffer::zeroed(memory.device(), len as usize)?;
    let paged = Paged::new(Plan::of_layout(&layout, &[len], blocks)?, vec![own])?;
    let ours = CudaMemory::over(paged, None, 8 * MIB)?;
    let peer = ours.open_peer(memory.share().ok_or("the memory cannot be shared")?)?;
    ours.copy(3, &peer, 1, &mut |_| {})?;
    ours.flush(&[3])?;
    if ours.clone().read(3, Arc::new(()))?.concat() != block {
        return Err("a block copied on the GPU is not the peer's".into());
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> Outcome<[u8; N]> {
    let digits = text.as_bytes().chunks(2);
    let bytes = digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap_or_default(), 16));
    Ok(bytes.collect::<Result<Vec<_>, _>>()?.try_into().map_err(|_| "not that many bytes")?)
}
