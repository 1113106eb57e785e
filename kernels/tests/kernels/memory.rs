//! KV memory on a GPU through pinned buffers; against a plain vector for each block.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_kernels::cuda::{CudaMemory, Device, DeviceBuffer, Paged};
use baton_kernels::{
    BlockLayout, BlockMemory, CacheShape, Filling, Guard, Halves, MemoryError, Order, Plan, Slice, Sliced,
};
use baton_proto::connector::{HeadSpan, Heads, Layout, Piece};
use baton_proto::wire::WireDtype;
use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::backend::device;

const BLOCKS: u32 = 12;

fn shape() -> CacheShape {
    CacheShape {
        layers: 3,
        tokens: 16,
        heads: 2,
        head_bytes: 128,
        halves: Halves::Apart,
        order: Order::Nhd,
        num_blocks: BLOCKS,
    }
}

/// Four buffers in each direction.
fn memory(device: &Arc<Device>) -> Arc<CudaMemory> {
    let shape = shape();
    let plan = shape.plan(0..2).unwrap();
    let pinned = 2 * 4 * plan.block_bytes().next_multiple_of(4096);
    let storages = (0..shape.layers)
        .map(|_| DeviceBuffer::zeroed(device, shape.storage_bytes() as usize).unwrap())
        .collect();
    CudaMemory::over(Paged::new(plan, storages).unwrap(), None, pinned).unwrap()
}

fn content(memory: &CudaMemory, seed: u32) -> Vec<u8> {
    (0..memory.block_bytes() as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13 ^ seed) as u8).collect()
}

fn write(memory: &CudaMemory, block: u32, bytes: &[u8]) {
    let mut offset = 0;
    // As datagrams come: never at a row's end.
    for part in bytes.chunks(1439) {
        memory.write(block, offset, part).unwrap();
        offset += part.len();
    }
}

fn read(memory: &Arc<CudaMemory>, block: u32) -> Vec<u8> {
    memory.clone().read(block, Arc::new(())).unwrap().concat()
}

#[test]
fn what_is_written_is_read_and_its_checksum_is_the_wires() {
    let Some(device) = device() else { return };
    let memory = memory(&device);
    let blocks: Vec<u32> = (0..BLOCKS).rev().collect();
    for block in &blocks {
        write(&memory, *block, &content(&memory, *block));
    }
    memory.flush(&blocks).unwrap();
    let expected: Vec<_> = blocks.iter().map(|block| xxh3_64(&content(&memory, *block))).collect();
    assert_eq!(memory.checksums(&blocks).unwrap().unwrap(), expected);
    for block in blocks {
        assert!(read(&memory, block) == content(&memory, block), "block {block}");
    }
}

#[test]
fn a_block_that_is_sent_again_begins_anew_and_one_that_breaks_off_frees_its_buffer() {
    let Some(device) = device() else { return };
    let memory = memory(&device);
    let (first, second) = (content(&memory, 1), content(&memory, 2));
    write(&memory, 3, &first);
    write(&memory, 3, &second);
    memory.flush(&[3]).unwrap();
    assert!(read(&memory, 3) == second);
    for _ in 0..3 {
        for block in 4..8 {
            memory.write(block, 0, &first[..100]).unwrap();
        }
        assert!(matches!(memory.write(8, 0, &first[..100]), Err(MemoryError::NoBuffer)));
        memory.flush(&[4, 5, 6, 7, 8]).unwrap();
    }
    assert!(matches!(
        memory.write(5, 10, &first[..5]),
        Err(MemoryError::Order { block: 5, offset: 10, filled: 0 })
    ));
    memory.flush(&[5]).unwrap();
}

#[test]
fn blocks_in_use_and_a_drained_pool_are_refused() {
    let Some(device) = device() else { return };
    let memory = memory(&device);
    let guard: Guard = Arc::new(());
    let alive = Arc::downgrade(&guard);
    let staged = memory.clone().stage(0, guard.clone()).unwrap();
    assert!(matches!(memory.write(0, 0, b"x"), Err(MemoryError::InUse(0))));
    let mut bytes = staged.take().unwrap();
    // The bytes are on the host now, and the block itself is free.
    memory.write(0, 0, b"x").unwrap();
    assert!(matches!(memory.clone().read(0, guard.clone()), Err(MemoryError::InUse(0))));
    memory.flush(&[0]).unwrap();

    let more: Vec<_> = (1..4).map(|block| memory.clone().stage(block, guard.clone()).unwrap()).collect();
    assert!(matches!(memory.clone().read(5, guard.clone()), Err(MemoryError::NoBuffer)));
    drop(more);
    drop(guard);
    assert!(alive.strong_count() > 0);
    let slice = bytes.pop().unwrap().slice(5..6);
    drop(bytes);
    assert!(alive.strong_count() > 0);
    drop(slice);
    assert_eq!(alive.strong_count(), 0);
    assert!(matches!(memory.write(BLOCKS, 0, b"x"), Err(MemoryError::Block { .. })));
    assert!(matches!(memory.write(0, usize::MAX, b"x"), Err(MemoryError::Range { .. })));
}

/// Layers of `[K, V][token][head][value]`, each in one piece: 16 tokens, 2 heads of 64 values of bf16.
fn of_heads() -> Layout {
    let layer = 2 * 16 * 2 * 128;
    let span =
        |i: u32| HeadSpan { start: i * layer, head_stride: 128, dims: vec![(16, 256), (2, 4096)], len: 128 };
    let piece = |storage| Piece { storage, offset: 0, stride: layer.into(), len: layer };
    Layout {
        facts: BTreeMap::from([("dtype".to_owned(), "bfloat16".to_owned())]),
        order: BTreeMap::new(),
        pieces: (0..3).map(piece).collect(),
        heads: Some(Heads { total: 2, count: 2, spans: (0..3).map(span).collect() }),
    }
}

/// A memory whose device packs nothing.
struct Unpacking(Arc<CudaMemory>);

impl BlockMemory for Unpacking {
    fn block_bytes(&self) -> usize {
        self.0.block_bytes()
    }

    fn num_blocks(&self) -> u64 {
        self.0.num_blocks()
    }

    fn read(self: Arc<Self>, block: u32, guard: Guard) -> Result<Vec<Bytes>, MemoryError> {
        self.0.clone().read(block, guard)
    }

    fn write(&self, block: u32, offset: usize, bytes: &[u8]) -> Result<(), MemoryError> {
        self.0.write(block, offset, bytes)
    }
}

#[test]
fn the_gpu_packs_blocks_as_the_cpu_does() {
    let Some(device) = device() else { return };
    let layout = of_heads();
    let lens = [u64::from(layout.pieces[0].len) * u64::from(BLOCKS); 3];
    let plan = Plan::of_layout(&layout, &lens, BLOCKS.into()).unwrap();
    let storages = lens.map(|len| DeviceBuffer::zeroed(&device, len as usize).unwrap()).into();
    let memory = CudaMemory::over(Paged::new(plan, storages).unwrap(), None, 16 << 20).unwrap();
    let plain = Arc::new(Unpacking(memory.clone()));
    let map = BlockLayout::of(&layout, 1).unwrap().heads.unwrap();
    let guard: Guard = Arc::new(());
    assert!(memory.clone().stage_packed(0, &map, guard.clone()).is_some(), "the GPU does not pack");
    let packed = |memory: Arc<dyn BlockMemory>, block| {
        let view = Sliced::whole(memory, map.clone(), WireDtype::Fp8).unwrap();
        view.read(block, guard.clone()).unwrap().concat()
    };
    let unpack = |memory: Arc<dyn BlockMemory>, block, bytes: &[u8]| {
        Filling::new(memory, map.clone(), WireDtype::Fp8).unwrap().write(block, 0, bytes).unwrap();
    };
    for block in 0..4 {
        // Any bytes: all kinds of NaN and infinities among them.
        write(&memory, block, &content(&memory, block));
        memory.flush(&[block]).unwrap();
        let bytes = packed(memory.clone(), block);
        assert!(bytes == packed(plain.clone(), block), "block {block}");
        unpack(memory.clone(), 4 + block, &bytes);
        unpack(plain.clone(), 8 + block, &bytes);
        memory.flush(&[4 + block, 8 + block]).unwrap();
        assert!(read(&memory, 4 + block) == read(&memory, 8 + block), "block {block}");
        assert!(packed(memory.clone(), 4 + block) == bytes, "block {block}");
    }
    let some =
        Sliced::new(vec![Slice { memory: memory.clone(), map: map.clone(), heads: 1..2 }], WireDtype::Fp8);
    let whole = packed(memory, 0);
    assert!(some.unwrap().read(0, guard.clone()).unwrap().concat() == whole[whole.len() / 2..]);
}
