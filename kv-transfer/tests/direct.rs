//! Endpoints of one host: real sockets, mutual TLS, memories that both have mapped.

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_kernels::{BlockMemory, EngineMemory, Guard, MemoryError, PeerMemory, Shared};
use baton_kv_transfer::checksum::of_block;
use baton_kv_transfer::{HoldEnd, Limits, PullError};
use baton_proto::wire::{ErrorCode, WireError};
use bytes::Bytes;
use support::two::{LEASE, Two};
use support::{Shape, TableSource, fill, hash, id, read};

const SHAPE: Shape = Shape { pieces: 6, piece_bytes: 64 << 10, blocks: 64 };

fn two() -> Two {
    Two::new(SHAPE, Limits::default(), Limits::default())
}

#[tokio::test]
async fn blocks_are_copied_where_they_should_and_the_hold_ends() {
    let two = two();
    two.hold(1, vec![40, 3, 17, 8]);
    let pull = two.puller.pull(two.request(1, 1, 3), two.ours.clone(), vec![5, 60, 1]);
    let report = pull.await.unwrap();
    let bytes = 3 * SHAPE.block_bytes() as u64;
    assert_eq!((report.direct, report.bytes, report.failed.len(), report.corrupt), (true, bytes, 0, 0));
    for (from, to) in [(3, 5), (17, 60), (8, 1)] {
        assert!(read(&two.ours, to) == read(&two.theirs, from), "block {from} at {to}");
    }
    assert!(read(&two.ours, 0).iter().all(|byte| *byte == 0), "nothing else was written");
    let released = two.source.released().await;
    assert_eq!((released.transfer_id, released.end), (id(1), HoldEnd::Finished));
    let sent = two.source.report().await;
    assert_eq!((sent.result, sent.bytes), (Ok(()), bytes));
    assert_eq!(sent.checksums, report.checksums);
    let (stats, theirs) = (two.puller.stats(), two.holder.stats());
    assert_eq!((stats.received_bytes, stats.direct_bytes, theirs.sent_bytes), (bytes, bytes, bytes));
}

#[tokio::test]
async fn many_pulls_at_once() {
    let two = two();
    let pulls: Vec<_> = (0..16u8)
        .map(|number| {
            let blocks: Vec<u32> = (0..4).map(|i| u32::from(number) * 4 + i).collect();
            two.hold(number, blocks.clone());
            two.puller.pull(two.request(number, 0, 4), two.ours.clone(), blocks)
        })
        .collect();
    for pull in pulls {
        assert!(pull.await.unwrap().direct);
    }
    for block in 0..64 {
        assert!(read(&two.ours, block) == read(&two.theirs, block));
    }
    for _ in 0..16 {
        assert_eq!(two.source.released().await.end, HoldEnd::Finished);
    }
}

#[tokio::test]
async fn refusals_carry_their_code() {
    let two = two();
    two.hold(1, vec![0, 1]);
    let good = two.request(1, 0, 2);
    let mut stale = good.clone();
    stale.epoch.0 = 9;
    let mut other = good.clone();
    other.last_hash = hash(7);
    let mut layout = good.clone();
    layout.layout = Shape { pieces: 5, ..SHAPE }.fingerprint().into();
    for (request, error) in [
        (two.request(2, 0, 2), WireError::from(ErrorCode::UnknownTransfer)),
        (stale, WireError::new(ErrorCode::StaleEpoch, 1)),
        (other, WireError::new(ErrorCode::ContentMismatch, 2)),
        (layout, WireError::new(ErrorCode::LayoutMismatch, SHAPE.block_bytes() as u64)),
        (two.request(1, 1, 2), WireError::new(ErrorCode::Range, 2)),
    ] {
        let result = two.puller.pull(request, two.ours.clone(), vec![0, 1]).await;
        assert_eq!(result, Err(PullError::Refused(error)));
    }
    // The memory is known by now, and the checks are made all the same.
    assert!(two.puller.pull(good.clone(), two.ours.clone(), vec![0, 1]).await.unwrap().direct);
    two.source.released().await;
    let again = two.puller.pull(good, two.ours.clone(), vec![0, 1]).await;
    assert_eq!(again, Err(PullError::Refused(ErrorCode::Released.into())));
}

#[tokio::test]
async fn either_side_can_do_without() {
    let off = || Limits { direct: false, ..Limits::default() };
    for two in [Two::new(SHAPE, off(), Limits::default()), Two::new(SHAPE, Limits::default(), off())] {
        two.hold(1, vec![0, 1]);
        let report = two.pull(1, vec![0, 1]).await.unwrap();
        assert_eq!((report.direct, two.puller.stats().direct_bytes), (false, 0));
        assert!(read(&two.ours, 1) == read(&two.theirs, 1));
    }
}

#[tokio::test]
async fn memory_that_changed_under_its_hold_is_asked_for_by_quic_and_fails_its_blocks_only() {
    let two = two();
    two.hold(1, vec![0, 1, 2]);
    two.theirs.write(1, 9000, b"not what was held").unwrap();
    let report = two.pull(1, vec![0, 1, 2]).await.unwrap();
    assert_eq!((report.direct, report.failed, report.corrupt), (false, vec![1], 2));
    assert!(read(&two.ours, 2) == read(&two.theirs, 2));
    // The direct way has a rest.
    two.hold(2, vec![5]);
    assert!(!two.pull(2, vec![5]).await.unwrap().direct);
}

#[tokio::test]
async fn a_pull_waits_for_checksums_and_the_hold_for_the_pull() {
    let two = two();
    let memory: Arc<dyn BlockMemory> = two.theirs.clone();
    let (checksums, guard) = two.hold_unchecked(1, vec![7, 8]);
    let making = tokio::task::spawn_blocking(move || {
        std::thread::sleep(Duration::from_millis(50));
        checksums.make(&memory, 0, &[7, 8], &guard).unwrap();
    });
    assert!(two.pull(1, vec![0, 1]).await.unwrap().direct);
    making.await.unwrap();
    two.source.released().await;
}

#[tokio::test]
async fn a_release_stops_the_pull_under_way() {
    let two = two();
    // Without its checksums the pull gets no further than the acceptance.
    drop(two.hold_unchecked(1, vec![7]));
    let release = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(two.source.table.lock().unwrap().release(id(1)));
        two.source.released().await
    };
    let (result, released) = tokio::join!(two.pull(1, vec![0]), release);
    assert_eq!(result, Err(PullError::Refused(ErrorCode::Released.into())));
    assert_eq!(released.end, HoldEnd::Released);
}

#[tokio::test]
async fn cancelled_and_dropped_pulls_write_nothing_more_and_give_the_hold_up() {
    let two = two();
    two.hold(100, vec![0]);
    assert!(two.pull(100, vec![0]).await.unwrap().direct);
    two.end_pulls_early(Duration::from_micros(300)).await;
    let blocks: Vec<u32> = (0..64).collect();
    two.hold(20, blocks.clone());
    assert!(two.pull(20, blocks).await.unwrap().direct);
    while two.source.released().await.transfer_id != id(20) {}
}

#[tokio::test]
async fn too_many_pulls_are_refused_as_busy() {
    let two = Two::new(SHAPE, Limits { max_served: 0, ..Limits::default() }, Limits::default());
    two.hold(1, vec![0]);
    // By the other way too.
    assert_eq!(two.pull(1, vec![0]).await, Err(PullError::Refused(ErrorCode::Busy.into())));
}

#[tokio::test]
async fn the_next_life_of_an_engine_has_other_memory() {
    let two = two();
    two.hold(1, vec![0]);
    assert!(two.pull(1, vec![9]).await.unwrap().direct);
    two.source.released().await;
    two.source.table.lock().unwrap().drop_epoch(baton_proto::Epoch(2));
    let next = SHAPE.memory();
    fill(&next, 0..64, 6);
    two.source.hold(id(2), &next, SHAPE, vec![0], LEASE);
    let mut request = two.request(2, 0, 1);
    request.epoch.0 = 2;
    assert!(two.puller.pull(request, two.ours.clone(), vec![9]).await.unwrap().direct);
    assert!(read(&two.ours, 9) == read(&next, 0));
    // And so has that of the engine that pulls.
    let ours = SHAPE.memory();
    two.source.hold(id(3), &next, SHAPE, vec![1], LEASE);
    let mut request = two.request(3, 0, 1);
    request.epoch.0 = 2;
    assert!(two.puller.pull(request, ours.clone(), vec![2]).await.unwrap().direct);
    assert!(read(&ours, 2) == read(&next, 1));
}

/// A memory whose copies are under way until they are flushed, as a GPU's are.
struct Device {
    inner: Arc<EngineMemory>,
    peer: Mutex<Option<Arc<PeerMemory>>>,
    under_way: Mutex<Vec<(u32, u32)>>,
    /// Blocks that the holder had given back while copies of them were under way.
    holds: Arc<TableSource>,
    flushed: AtomicUsize,
    /// A block that is torn on its way.
    tears: Option<u32>,
    /// Whether it makes checksums.
    makes: bool,
}

impl Device {
    fn new(two: &Two, tears: Option<u32>, makes: bool) -> Arc<Self> {
        Arc::new(Self {
            inner: two.ours.clone(),
            peer: Mutex::default(),
            under_way: Mutex::default(),
            holds: two.source.clone(),
            flushed: AtomicUsize::new(0),
            tears,
            makes,
        })
    }
}

impl BlockMemory for Device {
    fn block_bytes(&self) -> usize {
        self.inner.block_bytes()
    }

    fn num_blocks(&self) -> u64 {
        self.inner.num_blocks()
    }

    fn read(self: Arc<Self>, block: u32, guard: Guard) -> Result<Vec<Bytes>, MemoryError> {
        self.inner.clone().read(block, guard)
    }

    fn write(&self, block: u32, offset: usize, bytes: &[u8]) -> Result<(), MemoryError> {
        self.inner.write(block, offset, bytes)
    }

    fn ahead(&self) -> usize {
        1
    }

    fn open_peer(&self, shared: Shared) -> Result<PeerMemory, MemoryError> {
        *self.peer.lock().unwrap() = Some(Arc::new(self.inner.open_peer(shared)?));
        // The same, for who asked.
        self.inner.open_peer(self.inner.share().unwrap())
    }

    fn copy(
        &self,
        block: u32,
        _: &PeerMemory,
        from: u32,
        _: &mut dyn FnMut(&[u8]),
    ) -> Result<(), MemoryError> {
        self.under_way.lock().unwrap().push((block, from));
        Ok(())
    }

    fn flush(&self, _: &[u32]) -> Result<(), MemoryError> {
        let under_way = std::mem::take(&mut *self.under_way.lock().unwrap());
        if under_way.is_empty() {
            return Ok(());
        }
        self.holds.poll(std::time::Instant::now());
        assert_eq!(self.holds.table.lock().unwrap().len(), 1, "released below a copy");
        let peer = self.peer.lock().unwrap().clone().unwrap();
        for (block, from) in under_way {
            self.inner.copy(block, &peer, from, &mut |_| {})?;
            if self.tears == Some(block) {
                self.inner.write(block, 70, b"torn")?;
            }
        }
        self.flushed.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn checksums(&self, blocks: &[u32]) -> Option<Result<Vec<u64>, MemoryError>> {
        let memory: Arc<dyn BlockMemory> = self.inner.clone();
        let guard: Guard = Arc::new(());
        self.makes.then(|| blocks.iter().map(|block| of_block(&memory, *block, &guard)).collect())
    }
}

#[tokio::test]
async fn copies_of_a_device_are_over_and_looked_at_before_the_holder_hears_of_the_end() {
    for makes in [true, false] {
        let two = two();
        let device = Device::new(&two, None, makes);
        two.hold(1, vec![4, 5, 6]);
        let pull = two.puller.pull(two.request(1, 0, 3), device.clone(), vec![1, 2, 3]);
        let report = pull.await.unwrap();
        assert!(report.direct && report.failed.is_empty());
        assert_eq!(device.flushed.load(Ordering::SeqCst), 1);
        assert!(read(&two.ours, 3) == read(&two.theirs, 6));
        assert_eq!(two.source.released().await.end, HoldEnd::Finished);
    }
}

#[tokio::test]
async fn a_torn_copy_of_a_device_is_found_and_mended_by_quic() {
    for makes in [true, false] {
        let two = two();
        let device = Device::new(&two, Some(2), makes);
        two.hold(1, vec![4, 5, 6]);
        let pull = two.puller.pull(two.request(1, 0, 3), device.clone(), vec![1, 2, 3]);
        let report = pull.await.unwrap();
        assert!(!report.direct && report.failed.is_empty());
        assert!(read(&two.ours, 2) == read(&two.theirs, 5));
    }
}

#[tokio::test]
async fn a_cancelled_copy_of_a_device_ends_before_the_holder_hears_of_it() {
    let two = two();
    let device = Device::new(&two, None, true);
    let memory: Arc<dyn BlockMemory> = two.theirs.clone();
    let (checksums, guard) = two.hold_unchecked(1, vec![7, 8]);
    // The first block's copy gets under way, and the second never is ready.
    checksums.set(0, of_block(&memory, 7, &guard).unwrap());
    drop(guard);
    let pull = two.puller.pull(two.request(1, 0, 2), device.clone(), vec![0, 1]);
    while device.under_way.lock().unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    pull.canceller().cancel();
    assert_eq!(pull.await, Err(PullError::Stopped(ErrorCode::Cancelled.into())));
    assert_eq!(device.flushed.load(Ordering::SeqCst), 1);
    assert_eq!(two.source.released().await.end, HoldEnd::Finished);
}
