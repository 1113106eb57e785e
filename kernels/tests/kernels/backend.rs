//! What the tests need of a backend.

use std::io::Write;
use std::sync::{Arc, OnceLock};

use baton_kernels::Plan;
use baton_kernels::cuda::{Checksummer, Device, DeviceBuffer, Packer, Paged};
use baton_kernels::reference::{self, fp8, xxh3};

/// Byte of staging buffers before anything was written to them.
pub(crate) const POISON: u8 = 0xA5;

/// Runs kernels on bytes.
pub(crate) trait Backend {
    /// What `blocks` gathered to a poisoned staging buffer of blocks `stride` apart make of it.
    fn gather(&self, plan: &Plan, storages: &[Vec<u8>], blocks: &[u32], stride: usize) -> Vec<u8>;
    /// What scattering makes of the storages.
    fn scatter(
        &self,
        plan: &Plan,
        storages: &[Vec<u8>],
        blocks: &[u32],
        staging: &[u8],
        stride: usize,
    ) -> Vec<Vec<u8>>;
    /// The checksum of each block of `len` bytes, `stride` apart.
    fn checksums(&self, data: &[u8], len: usize, stride: usize) -> Vec<u64>;
    /// Packs blocks of `len` values each.
    fn pack(&self, values: &[u16], len: usize, segment: usize) -> Vec<Vec<u8>>;
    /// The reverse.
    fn unpack(&self, packed: &[Vec<u8>], segment: usize) -> Vec<u16>;
}

/// As the CPU reference does it.
pub(crate) fn pack(values: &[u16], segment: usize) -> Vec<u8> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut packed = Vec::new();
    fp8::pack(&bytes, segment, &mut packed);
    packed
}

/// The same back.
pub(crate) fn unpack(packed: &[u8], segment: usize) -> Vec<u16> {
    let segments = packed.len() / fp8::packed_bytes(1, segment);
    let mut bytes = vec![0; segments * segment * 2];
    fp8::unpack(packed, segment, &mut bytes);
    halves(&bytes).collect()
}

/// The CPU reference.
struct Host;

impl Backend for Host {
    fn gather(&self, plan: &Plan, storages: &[Vec<u8>], blocks: &[u32], stride: usize) -> Vec<u8> {
        let mut staging = vec![POISON; blocks.len() * stride];
        let storages: Vec<&[u8]> = storages.iter().map(Vec::as_slice).collect();
        reference::gather(plan, &storages, blocks, &mut staging, stride);
        staging
    }

    fn scatter(
        &self,
        plan: &Plan,
        storages: &[Vec<u8>],
        blocks: &[u32],
        staging: &[u8],
        stride: usize,
    ) -> Vec<Vec<u8>> {
        let mut storages = storages.to_vec();
        let mut targets: Vec<&mut [u8]> = storages.iter_mut().map(Vec::as_mut_slice).collect();
        reference::scatter(plan, &mut targets, blocks, staging, stride);
        storages
    }

    fn checksums(&self, data: &[u8], len: usize, stride: usize) -> Vec<u64> {
        data.chunks(stride).map(|block| xxh3::checksum(&block[..len])).collect()
    }

    fn pack(&self, values: &[u16], len: usize, segment: usize) -> Vec<Vec<u8>> {
        values.chunks(len).map(|block| pack(block, segment)).collect()
    }

    fn unpack(&self, packed: &[Vec<u8>], segment: usize) -> Vec<u16> {
        packed.iter().flat_map(|block| unpack(block, segment)).collect()
    }
}

/// The kernels on a GPU.
struct Gpu(Arc<Device>);

impl Gpu {
    fn buffer(&self, bytes: &[u8]) -> DeviceBuffer {
        let mut buffer = DeviceBuffer::zeroed(&self.0, bytes.len()).unwrap();
        buffer.upload(0, bytes).unwrap();
        buffer
    }

    fn poisoned(&self, len: usize) -> DeviceBuffer {
        let mut buffer = DeviceBuffer::zeroed(&self.0, len).unwrap();
        buffer.fill(POISON).unwrap();
        buffer
    }

    fn paged(&self, plan: &Plan, storages: &[Vec<u8>]) -> Paged {
        Paged::new(plan.clone(), storages.iter().map(|storage| self.buffer(storage)).collect()).unwrap()
    }
}

fn bytes(buffer: &DeviceBuffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.len()];
    buffer.download(0, &mut bytes).unwrap();
    bytes
}

fn halves(bytes: &[u8]) -> impl Iterator<Item = u16> + '_ {
    bytes.as_chunks::<2>().0.iter().map(|pair| u16::from_ne_bytes(*pair))
}

impl Backend for Gpu {
    fn gather(&self, plan: &Plan, storages: &[Vec<u8>], blocks: &[u32], stride: usize) -> Vec<u8> {
        let mut staging = self.poisoned(blocks.len() * stride);
        self.paged(plan, storages).gather(blocks, &mut staging, stride).unwrap();
        bytes(&staging)
    }

    fn scatter(
        &self,
        plan: &Plan,
        storages: &[Vec<u8>],
        blocks: &[u32],
        staging: &[u8],
        stride: usize,
    ) -> Vec<Vec<u8>> {
        let mut paged = self.paged(plan, storages);
        paged.scatter(blocks, &self.buffer(staging), stride).unwrap();
        paged.storages_mut().iter().map(bytes).collect()
    }

    fn checksums(&self, data: &[u8], len: usize, stride: usize) -> Vec<u64> {
        if len < xxh3::SHORTEST {
            return Host.checksums(data, len, stride);
        }
        let blocks = data.len() / stride;
        let mut checksummer = Checksummer::new(&self.0, len, blocks).unwrap();
        checksummer.make(&self.buffer(data), blocks, stride).unwrap()
    }

    fn pack(&self, values: &[u16], len: usize, segment: usize) -> Vec<Vec<u8>> {
        let packer = Packer::new(&self.0, len, segment).unwrap();
        let raw: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        let count = values.len() / len;
        let mut packed = self.poisoned(count * packer.packed_bytes());
        packer.pack(&self.buffer(&raw), count, &mut packed).unwrap();
        bytes(&packed).chunks(packer.packed_bytes()).map(<[u8]>::to_vec).collect()
    }

    fn unpack(&self, packed: &[Vec<u8>], segment: usize) -> Vec<u16> {
        let len = packed[0].len() / (segment + 4) * segment;
        let packer = Packer::new(&self.0, len, segment).unwrap();
        let mut values = self.poisoned(packed.len() * len * 2);
        packer.unpack(&self.buffer(&packed.concat()), packed.len(), &mut values).unwrap();
        halves(&bytes(&values)).collect()
    }
}

/// The first GPU, with its kernels. `None`, and a printed reason, where there is none: but where
/// BATON_REQUIRE_GPU is set, that is an error.
pub(crate) fn gpu() -> Option<impl Backend> {
    device().map(Gpu)
}

/// As [`gpu`].
pub(crate) fn device() -> Option<Arc<Device>> {
    static DEVICE: OnceLock<Option<Arc<Device>>> = OnceLock::new();
    let open = || {
        let usable = |device: Arc<Device>| match device.fallback() {
            Some(why) => Err(why.clone()),
            None => Ok(device),
        };
        match Device::open(0).and_then(usable) {
            Ok(device) => Some(device),
            Err(why) if std::env::var_os("BATON_REQUIRE_GPU").is_none() => {
                // Past the test harness, which keeps the words of tests that pass to itself.
                let _ = writeln!(std::io::stderr(), "skipped on the device: {why}");
                None
            }
            Err(why) => panic!("BATON_REQUIRE_GPU is set: {why}"),
        }
    };
    DEVICE.get_or_init(open).clone()
}

/// Makes a test of a function over a backend, once for each backend.
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod host {
            $(#[test] fn $name() { super::$name(&crate::backend::host()); })*
        }

        mod device {
            $(#[test] fn $name() {
                if let Some(gpu) = crate::backend::gpu() {
                    super::$name(&gpu);
                }
            })*
        }
    };
}
pub(crate) use on_both;

pub(crate) fn host() -> impl Backend {
    Host
}
