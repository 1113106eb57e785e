//! Transfers of memories that are not read and written where they lie: bytes pass through few buffers, come ahead of
//! the network, and are in place only when they are flushed.

mod support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_kernels::{BlockMemory, EngineMemory, Guard, MemoryError, Sliced};
use baton_kv_transfer::{Endpoint, Limits, PullError};
use baton_proto::wire::{BlockForm, ErrorCode, WireDtype};
use bytes::Bytes;
use support::{Authority, Shape, TableSource, fill, id, noise, read, request};
use xxhash_rust::xxh3::xxh3_64;

const SHAPE: Shape = Shape { pieces: 4, piece_bytes: 64 << 10, blocks: 48 };
const LEASE: Duration = Duration::from_secs(60);

/// A memory behind buffers.
struct Buffered {
    inner: Arc<EngineMemory>,
    free: Arc<AtomicUsize>,
    most_taken: AtomicUsize,
    buffers: usize,
    pending: Mutex<BTreeMap<u32, Vec<u8>>>,
    /// A block whose bytes are lost on their way from the buffer.
    loses: Option<u32>,
    flushed: AtomicUsize,
}

impl Buffered {
    fn new(buffers: usize, loses: Option<u32>) -> Arc<Self> {
        Arc::new(Self {
            inner: SHAPE.memory(),
            free: Arc::new(AtomicUsize::new(buffers)),
            most_taken: AtomicUsize::new(0),
            buffers,
            pending: Mutex::default(),
            loses,
            flushed: AtomicUsize::new(0),
        })
    }
}

/// A buffer, given back on drop.
struct Buffer {
    bytes: Vec<u8>,
    free: Arc<AtomicUsize>,
    _guard: Guard,
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.free.fetch_add(1, Ordering::SeqCst);
    }
}

impl BlockMemory for Buffered {
    fn block_bytes(&self) -> usize {
        self.inner.block_bytes()
    }

    fn num_blocks(&self) -> u64 {
        self.inner.num_blocks()
    }

    fn read(self: Arc<Self>, block: u32, guard: Guard) -> Result<Vec<Bytes>, MemoryError> {
        let take = |free: usize| free.checked_sub(1);
        let Ok(before) = self.free.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take) else {
            return Err(MemoryError::NoBuffer);
        };
        self.most_taken.fetch_max(self.buffers + 1 - before, Ordering::SeqCst);
        let bytes = read(&self.inner, block);
        Ok(vec![Bytes::from_owner(Buffer { bytes, free: self.free.clone(), _guard: guard })])
    }

    fn ahead(&self) -> usize {
        3
    }

    fn write(&self, block: u32, offset: usize, bytes: &[u8]) -> Result<(), MemoryError> {
        let mut pending = self.pending.lock().unwrap();
        let held = pending.entry(block).or_default();
        held.truncate(offset);
        assert_eq!(held.len(), offset, "bytes of a block come in order");
        held.extend(bytes);
        Ok(())
    }

    fn flush(&self, blocks: &[u32]) -> Result<(), MemoryError> {
        let mut pending = self.pending.lock().unwrap();
        for block in blocks {
            match pending.remove(block) {
                Some(bytes) if bytes.len() == self.block_bytes() && self.loses != Some(*block) => {
                    self.inner.write(*block, 0, &bytes)?;
                    self.flushed.fetch_add(1, Ordering::SeqCst);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn checksums(&self, blocks: &[u32]) -> Option<Result<Vec<u64>, MemoryError>> {
        Some(Ok(blocks.iter().map(|block| xxh3_64(&read(&self.inner, *block))).collect()))
    }
}

struct Two {
    source: Arc<TableSource>,
    holder: Endpoint,
    puller: Endpoint,
}

impl Two {
    fn new(limits: Limits) -> Self {
        let authority = Authority::new();
        let source = TableSource::new(1);
        let holder = support::endpoint(authority.issue("holder"), source.clone(), limits.clone());
        let puller = support::endpoint(authority.issue("puller"), TableSource::new(1), limits);
        Self { source, holder, puller }
    }

    fn request(&self, number: u8, blocks: u32) -> baton_kv_transfer::PullRequest {
        request(support::peer("holder", &self.holder), id(number), 1, SHAPE, 0, blocks)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_share_fewer_buffers_than_they_want() {
    // Two pulls, each with blocks ahead, and a window larger than all of the buffers.
    let two = Two::new(Limits::default());
    let (theirs, ours) = (Buffered::new(3, None), Buffered::new(3, None));
    fill(&theirs.inner, 0..48, 5);
    let pulls: Vec<_> = (0..2u8)
        .map(|number| {
            let blocks: Vec<u32> = (0..24).map(|i| u32::from(number) * 24 + i).collect();
            two.source.hold(id(number), &theirs, SHAPE, blocks.clone(), LEASE);
            two.puller.pull(two.request(number, 24), ours.clone(), blocks)
        })
        .collect();
    for pull in pulls {
        let report = pull.await.unwrap();
        assert_eq!((report.failed, report.corrupt), (vec![], 0));
    }
    assert_eq!(ours.flushed.load(Ordering::SeqCst), 48);
    for block in 0..48 {
        assert!(read(&ours.inner, block) == read(&theirs.inner, block), "block {block}");
    }
    assert_eq!(theirs.most_taken.load(Ordering::SeqCst), 3);
    // Guards live in the buffers: with the holds released, all are back.
    for _ in 0..2 {
        two.source.released().await;
    }
    assert_eq!(theirs.free.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_block_that_does_not_reach_its_place_has_failed() {
    let two = Two::new(Limits::default());
    let (theirs, ours) = (Buffered::new(8, None), Buffered::new(8, Some(7)));
    fill(&theirs.inner, 0..4, 5);
    two.source.hold(id(1), &theirs, SHAPE, vec![0, 1, 2, 3], LEASE);
    let report = two.puller.pull(two.request(1, 4), ours.clone(), vec![9, 8, 7, 6]).await.unwrap();
    assert_eq!((report.failed, report.corrupt), (vec![2], 0));
    assert!(read(&ours.inner, 6) == read(&theirs.inner, 3));
}

#[tokio::test]
async fn heads_are_rearranged_on_their_way_through_the_buffers() {
    let two = Two::new(Limits::default());
    let (theirs, ours) = (Buffered::new(2, None), Buffered::new(2, Some(7)));
    fill(&theirs.inner, 0..12, 5);
    let (by_token, by_head) = (SHAPE.by_heads(true), SHAPE.by_heads(false));
    let blocks: Vec<u32> = (0..12).collect();
    two.source.hold(id(1), &theirs, by_token.clone(), blocks.clone(), LEASE);
    let mut request = two.request(1, 12);
    request.layout = by_head.clone();
    let report = two.puller.pull(request, ours.clone(), blocks.clone()).await.unwrap();
    assert_eq!((report.form, report.failed, report.corrupt), (BlockForm::Common, vec![7], 0));
    let (from, to) = (theirs.inner.clone(), ours.inner.clone());
    let from = Sliced::whole(from, by_token.heads.unwrap(), WireDtype::AsStored).unwrap();
    let to = Sliced::whole(to, by_head.heads.unwrap(), WireDtype::AsStored).unwrap();
    for block in blocks {
        let guard: Guard = Arc::new(());
        let heads = |of: &Arc<Sliced>| of.clone().read(block, guard.clone()).unwrap().concat();
        assert_eq!(heads(&from) == heads(&to), block != 7, "block {block}");
        assert_ne!(read(&theirs.inner, block), read(&ours.inner, block), "block {block}");
    }
    two.source.released().await;
    assert_eq!(theirs.free.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn packed_blocks_are_looked_at_where_they_lie() {
    let two = Two::new(Limits::default());
    let (theirs, ours) = (Buffered::new(2, None), Buffered::new(2, Some(7)));
    // Any bytes: all kinds of NaN and infinities among them.
    for block in 0..12 {
        theirs.inner.write(block, 0, &noise(SHAPE.block_bytes(), block, 5)).unwrap();
    }
    let blocks: Vec<u32> = (0..12).collect();
    two.source.hold(id(1), &theirs, SHAPE.by_heads(true), blocks.clone(), LEASE);
    let mut request = two.request(1, 12);
    (request.layout, request.dtype) = (SHAPE.by_heads(false), WireDtype::Fp8);
    let report = two.puller.pull(request, ours.clone(), blocks.clone()).await.unwrap();
    assert_eq!((report.form, report.failed, report.corrupt), (BlockForm::Packed, vec![7], 0));
    assert_eq!(report.bytes, 12 * SHAPE.by_heads(true).packed_bytes().unwrap() as u64);
    two.source.released().await;
    assert_eq!(theirs.free.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn nothing_is_on_its_way_when_a_pull_is_dropped_or_has_ended() {
    let two = Two::new(Limits::default());
    let (theirs, ours) = (Buffered::new(64, None), Buffered::new(64, None));
    fill(&theirs.inner, 0..48, 5);
    let blocks: Vec<u32> = (0..48).collect();
    for number in 1..20u8 {
        two.source.hold(id(number), &theirs, SHAPE, blocks.clone(), LEASE);
        let pull = two.puller.pull(two.request(number, 48), ours.clone(), blocks.clone());
        tokio::time::sleep(Duration::from_micros(u64::from(number) * 300)).await;
        drop(pull);
        assert!(ours.pending.lock().unwrap().is_empty());
        let flushed = ours.flushed.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert!(ours.pending.lock().unwrap().is_empty());
        assert_eq!(ours.flushed.load(Ordering::SeqCst), flushed);
    }
    two.source.hold(id(99), &theirs, SHAPE, blocks.clone(), LEASE);
    let mut request = two.request(99, 48);
    request.deadline = Duration::from_millis(1);
    let stopped = match two.puller.pull(request, ours.clone(), blocks).await {
        Ok(report) => {
            for block in (0..48).filter(|block| !report.failed.contains(&(*block as usize))) {
                assert!(read(&ours.inner, block) == read(&theirs.inner, block), "block {block}");
            }
            report.stopped
        }
        Err(error) => Some(error),
    };
    assert_eq!(stopped, Some(PullError::Stopped(ErrorCode::Deadline.into())));
    assert!(ours.pending.lock().unwrap().is_empty());
}
