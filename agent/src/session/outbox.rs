//! What is still to be told about the engine's cache: changes become numbered batches, of which recent ones are
//! kept so that a session can go on where the one before it broke off. Where they do not reach back far
//! enough, or too many have piled up, all that the engine owns is sent instead.
//!
//! # Bounds
//! Kept batches hold at most [`KEPT_BYTES`] of hashes, and as much again of parents and their frames where no block follows
//! another. A snapshot under way holds 16 bytes for each block and place that was owned when it began, and for each run of
//! them.

use std::collections::{BTreeMap, VecDeque};

use baton_proto::Epoch;
use baton_proto::block_hash::BlockHash;
use baton_proto::control::v1;
use bytes::{BufMut, BytesMut};

use crate::ownership::{Block, Change, Place};

/// Hashes in one batch: 128 KiB.
pub const BATCH: usize = 8192;
/// Hashes of all kept batches, in bytes; an event without hashes counts as one.
pub const KEPT_BYTES: usize = 16 << 20;

/// What became of a run of blocks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Stored(Place),
    Removed(Place),
    Cleared,
}

/// Blocks of which one thing became; where they were stored, each follows the one before.
struct Run {
    kind: Kind,
    parent: Option<BlockHash>,
    last: Option<BlockHash>,
    hashes: BytesMut,
}

/// Events that are not a batch yet.
#[derive(Default)]
struct Open {
    runs: Vec<Run>,
    hashes: usize,
}

impl Open {
    fn push(&mut self, kind: Kind, block: Option<Block>) {
        self.hashes += 1;
        let parent = block.and_then(|block| block.parent);
        let goes_on = |run: &Run| {
            let follows = run.last.is_some() && parent == run.last;
            run.kind == kind && (follows || !matches!(kind, Kind::Stored(_)))
        };
        if !self.runs.last().is_some_and(goes_on) {
            self.runs.push(Run { kind, parent, last: None, hashes: BytesMut::new() });
        }
        if let (Some(run), Some(block)) = (self.runs.last_mut(), block) {
            run.last = Some(block.hash);
            run.hashes.put_slice(block.hash.as_bytes());
        }
    }

    fn take(&mut self) -> (Vec<v1::KvEvent>, usize) {
        use v1::kv_event::Event;
        let hashes = std::mem::take(&mut self.hashes);
        let events = std::mem::take(&mut self.runs).into_iter().map(|run| {
            let hashes = run.hashes.freeze();
            let parent = || run.parent.map(|parent| parent.as_bytes().to_vec().into()).unwrap_or_default();
            let event = match run.kind {
                Kind::Stored(Place { group, tier }) => Event::Stored(v1::BlocksStored {
                    hashes,
                    tier: tier.into(),
                    parent: parent(),
                    group: group.into(),
                }),
                Kind::Removed(Place { group, tier }) => {
                    Event::Removed(v1::BlocksRemoved { hashes, tier: tier.into(), group: group.into() })
                }
                Kind::Cleared => Event::Cleared(v1::Cleared {}),
            };
            v1::KvEvent { event: Some(event) }
        });
        (events.collect(), hashes)
    }
}

struct Kept {
    batch: v1::EventBatch,
    hashes: usize,
}

/// See the module.
pub struct Outbox {
    epoch: Epoch,
    /// Number of the next batch that is made.
    next: u64,
    /// The next batch to send; `None` without a session that wants any.
    cursor: Option<u64>,
    /// All is to be sent, before any other batch.
    snapshot_due: bool,
    /// A snapshot under way. Its batches come before those kept.
    snapshot: VecDeque<v1::EventBatch>,
    open: Open,
    kept: VecDeque<Kept>,
    kept_hashes: usize,
    max_kept: usize,
    max_batch: usize,
}

impl Outbox {
    /// Of an epoch in which nothing was sent.
    pub fn new(epoch: Epoch) -> Self {
        Self {
            epoch,
            next: 1,
            cursor: None,
            snapshot_due: true,
            snapshot: VecDeque::new(),
            open: Open::default(),
            kept: VecDeque::new(),
            kept_hashes: 0,
            max_kept: KEPT_BYTES / BlockHash::LEN,
            max_batch: BATCH,
        }
    }

    /// The epoch of all batches.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Number of the newest batch made; 0 before the first.
    pub fn last_seq(&self) -> u64 {
        self.next - 1
    }

    /// Takes in a change.
    pub fn push(&mut self, change: Change) {
        if change == Change::Cleared {
            // Whatever was not sent yet is void.
            self.open = Open::default();
        }
        match change {
            Change::Stored(block, place) => self.open.push(Kind::Stored(place), Some(block)),
            Change::Removed(hash, place) => {
                self.open.push(Kind::Removed(place), Some(Block { hash, parent: None }));
            }
            Change::Cleared => self.open.push(Kind::Cleared, None),
        }
        if self.open.hashes >= self.max_batch {
            self.flush();
        }
    }

    /// Whether changes wait for [`Self::flush`].
    pub fn is_open(&self) -> bool {
        self.open.hashes > 0
    }

    /// Makes a batch of the changes that wait.
    pub fn flush(&mut self) {
        if !self.is_open() {
            return;
        }
        let (events, hashes) = self.open.take();
        let batch = v1::EventBatch { epoch: self.epoch.0, seq: self.next, events };
        self.next += 1;
        self.kept.push_back(Kept { batch, hashes });
        self.kept_hashes += hashes;
        while self.kept_hashes > self.max_kept {
            let Some(oldest) = self.kept.pop_front() else { break };
            self.kept_hashes -= oldest.hashes;
            if self.cursor.is_some_and(|cursor| cursor <= oldest.batch.seq) {
                self.demand_snapshot();
            }
        }
    }

    /// The session ended.
    pub fn suspend(&mut self) {
        self.cursor = None;
        if !self.snapshot.is_empty() {
            self.snapshot.clear();
            self.snapshot_due = true;
        }
    }

    /// A session wants batch `wanted` next; 0: all that the engine owns.
    pub fn resume(&mut self, wanted: u64) {
        self.suspend();
        let oldest = self.kept.front().map_or(self.next, |kept| kept.batch.seq);
        if !(oldest..=self.next).contains(&wanted) {
            self.demand_snapshot();
        }
        self.cursor = Some(if wanted == 0 { self.next } else { wanted });
    }

    /// All that the engine owns is to be sent, as the next batch.
    pub fn demand_snapshot(&mut self) {
        self.snapshot.clear();
        self.snapshot_due = true;
    }

    /// Whether [`Self::take`] has a batch.
    pub fn has_batch(&self) -> bool {
        self.cursor.is_some_and(|cursor| self.snapshot_due || cursor < self.next)
    }

    /// The next batch to send. `owned` is all that the engine owns; `on_snapshot` is called when it is used.
    pub fn take<I: Iterator<Item = (Block, Place)>>(
        &mut self,
        owned: impl FnOnce() -> I,
        on_snapshot: impl FnOnce(),
    ) -> Option<v1::EventBatch> {
        let cursor = self.cursor?;
        if std::mem::take(&mut self.snapshot_due) {
            on_snapshot();
            self.begin_snapshot(cursor, owned());
        }
        let batch = match self.snapshot.pop_front() {
            Some(batch) => batch,
            None => {
                let oldest = self.kept.front()?.batch.seq;
                self.kept.get(usize::try_from(cursor.checked_sub(oldest)?).ok()?)?.batch.clone()
            }
        };
        self.cursor = Some(batch.seq + 1);
        Some(batch)
    }

    /// What was to be sent from `cursor` on is part of the snapshot, and its numbers are free again.
    fn begin_snapshot(&mut self, cursor: u64, owned: impl Iterator<Item = (Block, Place)>) {
        self.next = cursor;
        self.kept.clear();
        self.kept_hashes = 0;
        let mut by_place: BTreeMap<Place, Vec<Block>> = BTreeMap::new();
        for (block, place) in owned {
            by_place.entry(place).or_default().push(block);
        }
        let mut open = Open::default();
        open.push(Kind::Cleared, None);
        for (place, blocks) in by_place {
            for block in blocks {
                if open.hashes >= self.max_batch {
                    self.snapshot_batch(&mut open);
                }
                open.push(Kind::Stored(place), Some(block));
            }
        }
        self.snapshot_batch(&mut open);
        self.open = Open::default();
    }

    fn snapshot_batch(&mut self, open: &mut Open) {
        let (events, _) = open.take();
        self.snapshot.push_back(v1::EventBatch { epoch: self.epoch.0, seq: self.next, events });
        self.next += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use baton_proto::control::unpack_hashes;
    use proptest::prelude::*;

    use super::*;

    fn hash(i: u64) -> BlockHash {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&i.to_le_bytes());
        BlockHash::from_bytes(bytes)
    }

    /// Blocks in threes, each of which follows the one before.
    fn block(i: u64) -> Block {
        Block { hash: hash(i), parent: (!i.is_multiple_of(3)).then(|| hash(i - 1)) }
    }

    fn stored(i: u64) -> Change {
        Change::Stored(block(i), Place::GPU)
    }

    /// A coordinator: applies batches as the control plane's contract says.
    #[derive(Default)]
    struct Receiver {
        applied: u64,
        owned: BTreeSet<(BlockHash, u32, i32)>,
        batches: usize,
    }

    impl Receiver {
        fn wants(&self) -> u64 {
            if self.applied == 0 { 0 } else { self.applied + 1 }
        }

        /// False for a gap.
        fn apply(&mut self, batch: v1::EventBatch) -> bool {
            use v1::kv_event::Event;
            self.batches += 1;
            if batch.seq <= self.applied {
                return true;
            }
            let whole = matches!(batch.events[0].event, Some(Event::Cleared(_)));
            if batch.seq != self.applied + 1 && !(whole && self.applied == 0) {
                return false;
            }
            self.applied = batch.seq;
            for event in batch.events {
                match event.event.unwrap() {
                    Event::Cleared(_) => self.owned.clear(),
                    Event::Stored(run) => {
                        let mut parent = unpack_hashes(&run.parent).unwrap().next();
                        for hash in unpack_hashes(&run.hashes).unwrap() {
                            let number = u64::from_le_bytes(hash.as_bytes()[..8].try_into().unwrap());
                            assert_eq!(parent, block(number).parent, "a run that is none");
                            parent = Some(hash);
                            self.owned.insert((hash, run.group, run.tier));
                        }
                    }
                    Event::Removed(run) => {
                        for hash in unpack_hashes(&run.hashes).unwrap() {
                            self.owned.remove(&(hash, run.group, run.tier));
                        }
                    }
                }
            }
            true
        }
    }

    fn drain(outbox: &mut Outbox, owned: &[u64]) -> Vec<v1::EventBatch> {
        let owned = || owned.iter().map(|i| (block(*i), Place::GPU));
        std::iter::from_fn(|| outbox.take(owned, || ())).collect()
    }

    #[test]
    fn an_epoch_begins_with_a_snapshot_and_goes_on_with_changes() {
        let mut outbox = Outbox::new(Epoch(5));
        assert!(!outbox.has_batch());
        outbox.push(stored(1));
        outbox.resume(0);
        let first = drain(&mut outbox, &[1]);
        assert_eq!((first.len(), first[0].seq, first[0].epoch, first[0].events.len()), (1, 1, 5, 2));
        outbox.push(stored(2));
        assert!(!outbox.has_batch());
        outbox.flush();
        let mut receiver = Receiver::default();
        for batch in first.into_iter().chain(drain(&mut outbox, &[1, 2])) {
            assert!(receiver.apply(batch));
        }
        assert_eq!((receiver.applied, receiver.owned.len()), (2, 2));
    }

    #[test]
    fn a_session_goes_on_where_the_last_one_broke_off() {
        let mut outbox = Outbox::new(Epoch(5));
        outbox.resume(0);
        drain(&mut outbox, &[]);
        for i in 0..4 {
            outbox.push(stored(i));
            outbox.flush();
        }
        assert_eq!(drain(&mut outbox, &[]).iter().map(|b| b.seq).collect::<Vec<_>>(), [2, 3, 4, 5]);
        outbox.suspend();
        outbox.push(stored(9));
        outbox.flush();
        assert!(!outbox.has_batch());
        outbox.resume(4);
        assert_eq!(drain(&mut outbox, &[]).iter().map(|b| b.seq).collect::<Vec<_>>(), [4, 5, 6]);
        outbox.resume(7);
        assert!(!outbox.has_batch());
        // What the agent never made cannot be gone on from.
        outbox.resume(99);
        let all = drain(&mut outbox, &[0, 1, 2, 3, 9]);
        // Cleared, and the runs 0–2, 3 and 9.
        assert_eq!((all.len(), all[0].seq, all[0].events.len()), (1, 99, 4));
    }

    #[test]
    fn too_much_that_is_unsent_becomes_a_snapshot() {
        let mut outbox = Outbox::new(Epoch(5));
        outbox.max_kept = 10;
        outbox.resume(0);
        drain(&mut outbox, &[]);
        for i in 0..11 {
            outbox.push(stored(i));
            outbox.flush();
        }
        let owned: Vec<u64> = (0..11).collect();
        let batches = drain(&mut outbox, &owned);
        assert_eq!((batches.len(), batches[0].seq, batches[0].events.len()), (1, 2, 5));
        // Sent batches are dropped without further ado.
        for i in 11..40 {
            outbox.push(stored(i));
            outbox.flush();
            assert_eq!(drain(&mut outbox, &[]).len(), 1);
        }
        assert!(outbox.kept.len() <= 10);
    }

    #[test]
    fn snapshots_are_split() {
        let mut outbox = Outbox::new(Epoch(5));
        outbox.resume(0);
        let owned: Vec<u64> = (0..BATCH as u64 * 2).collect();
        let batches = drain(&mut outbox, &owned);
        assert_eq!(batches.iter().map(|batch| batch.seq).collect::<Vec<_>>(), [1, 2, 3]);
        let mut receiver = Receiver::default();
        assert!(batches.into_iter().all(|batch| receiver.apply(batch)));
        assert_eq!(receiver.owned.len(), owned.len());
    }

    #[derive(Clone, Debug)]
    enum Op {
        Store(u64),
        Remove(u64),
        Clear,
        Flush,
        Send(usize),
        Break { receiver_forgets: bool },
        Connect,
        Resync,
    }

    fn any_op() -> impl Strategy<Value = Op> {
        prop_oneof![
            8 => (0..12u64).prop_map(Op::Store),
            6 => (0..12u64).prop_map(Op::Remove),
            1 => Just(Op::Clear),
            6 => Just(Op::Flush),
            6 => (1..4usize).prop_map(Op::Send),
            2 => any::<bool>().prop_map(|receiver_forgets| Op::Break { receiver_forgets }),
            3 => Just(Op::Connect),
            1 => Just(Op::Resync),
        ]
    }

    proptest! {
        #[test]
        fn the_receiver_ends_with_what_is_owned(ops in prop::collection::vec(any_op(), 1..120), max_kept in 1..20usize, max_batch in 1..5usize) {
            let mut outbox = Outbox::new(Epoch(1));
            (outbox.max_kept, outbox.max_batch) = (max_kept, max_batch);
            let mut owned: BTreeSet<u64> = BTreeSet::new();
            let mut receiver = Receiver::default();
            let mut connected = false;
            for op in ops.into_iter().chain([Op::Connect, Op::Flush, Op::Send(usize::MAX)]) {
                match op {
                    Op::Store(i) if owned.insert(i) => outbox.push(stored(i)),
                    Op::Remove(i) if owned.remove(&i) => outbox.push(Change::Removed(hash(i), Place::GPU)),
                    Op::Store(_) | Op::Remove(_) => {}
                    Op::Clear => {
                        owned.clear();
                        outbox.push(Change::Cleared);
                    }
                    Op::Flush => outbox.flush(),
                    Op::Send(n) => {
                        for _ in 0..n {
                            let all = || owned.iter().map(|i| (block(*i), Place::GPU));
                            let Some(batch) = outbox.take(all, || ()) else {
                                prop_assert!(!outbox.has_batch());
                                break;
                            };
                            prop_assert!(connected);
                            prop_assert!(receiver.apply(batch), "a gap");
                        }
                    }
                    Op::Break { receiver_forgets } => {
                        connected = false;
                        outbox.suspend();
                        if receiver_forgets {
                            receiver = Receiver::default();
                        }
                    }
                    Op::Connect if !connected => {
                        connected = true;
                        outbox.resume(receiver.wants());
                    }
                    Op::Connect => {}
                    Op::Resync if connected => outbox.demand_snapshot(),
                    Op::Resync => {}
                }
            }
            let expected: BTreeSet<_> = owned.iter().map(|i| (hash(*i), 0, v1::Tier::Gpu as i32)).collect();
            prop_assert_eq!(receiver.owned, expected);
        }
    }
}
