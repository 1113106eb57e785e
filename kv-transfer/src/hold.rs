//! Holds: blocks that stay until they were pulled.
//!
//! A hold is taken when all its blocks are computed, or before: then it *grows* ([`HoldTable::grow`]) as each rank computes
//! them, and a pull waits for every block until it is there ([`Checksums::wait`]).
//!
//! # Two-phase release
//! A hold *ends* by the first of: every rank of a puller said it is finished with it, its lease ran out, it was released
//! by order, or its epoch was dropped. From then on it opens for nobody, and copies in flight are told to stop. But its
//! blocks are *released* (given back to the engine) only when no copy of them is in flight: when every [`Guard`] that
//! was handed out for it is dropped, including those inside buffers kept for retransmission. The two steps never
//! swap, however late the second one comes.
//!
//! The table reads no clock and does no I/O: `now` comes in, and [`HoldTable::poll`] says what to release. When a guard is
//! dropped or a puller finishes on another thread, the table's `wake` is called, after which `poll` has news.

mod open;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use baton_kernels::{BlockLayout, BlockMemory, Guard, MemoryError};
use baton_proto::wire::{ErrorCode, MAX_RANKS};
use baton_proto::{BlockHash, Epoch, TransferId};
use tokio_util::sync::CancellationToken;

pub use self::open::{Claim, HeldBlocks};
use crate::checksum::Checksums;

/// Ended transfers that a table remembers, to tell why a late pull is refused, and to take no hold behind its release.
const REMEMBERED: usize = 1024;

/// Called when a table has news, from any thread and with no lock held; should do little more than notify.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// Blocks to hold.
pub struct Hold {
    /// The engine's request id.
    pub request_id: String,
    /// Names the handoff.
    pub transfer_id: TransferId,
    /// Hash of each block, from the prompt's start.
    pub hashes: Vec<BlockHash>,
    /// The first blocks, in order, that all ranks have computed already; at most as many as hashes.
    pub block_ids: Vec<u32>,
    /// The workers' part, by rank; at least one.
    pub ranks: Vec<RankHold>,
}

/// One worker's part of a hold.
pub struct RankHold {
    /// Where the blocks lie.
    pub memory: Arc<dyn BlockMemory>,
    /// How they lie there.
    pub layout: BlockLayout,
    /// Of all blocks of the hold, in order; may still be in the making.
    pub checksums: Arc<Checksums>,
}

impl RankHold {
    fn making(&self, growth: Growth, shared: &Arc<Shared>) -> Making {
        Making {
            memory: self.memory.clone(),
            checksums: self.checksums.clone(),
            growth,
            guard: shared.copy(),
        }
    }
}

/// A hold that cannot be taken. Its blocks are free to go.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HoldError {
    /// The id is in use.
    #[error("transfer {0} is held already")]
    DuplicateTransfer(TransferId),
    /// The hold is over, or was released before it came.
    #[error("transfer {0} is over already")]
    TransferOver(TransferId),
    /// The request has a hold.
    #[error("request {0:?} has a hold already")]
    DuplicateRequest(String),
    /// Too many.
    #[error("{0} holds are live, and no more are taken")]
    Full(usize),
    /// Counts that must agree do not.
    #[error("a hold of {blocks} blocks so far with {hashes} hashes for {ranks} ranks")]
    Shape {
        /// Block ids.
        blocks: usize,
        /// Hashes.
        hashes: usize,
        /// Ranks.
        ranks: usize,
    },
}

/// Why a hold ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldEnd {
    /// Every rank of a puller finished with it.
    Finished,
    /// Its lease ran out.
    Expired,
    /// By [`HoldTable::release`].
    Released,
    /// By [`HoldTable::drop_epoch`].
    Dropped,
}

impl HoldEnd {
    /// What a pull of such a hold is told.
    pub fn code(self) -> ErrorCode {
        match self {
            Self::Finished | Self::Released => ErrorCode::Released,
            Self::Expired => ErrorCode::LeaseExpired,
            Self::Dropped => ErrorCode::StaleEpoch,
        }
    }
}

/// A hold whose blocks nobody reads any more, and nobody will.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReleasedHold {
    /// The engine's request id.
    pub request_id: String,
    /// Named the handoff.
    pub transfer_id: TransferId,
    /// Why it ended.
    pub end: HoldEnd,
}

/// Blocks that a rank has computed of a hold that grows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Growth {
    /// How many blocks of the hold come before them.
    pub first: usize,
    /// The blocks, in order.
    pub block_ids: Vec<u32>,
}

/// Checksums to be made of blocks that came to be held. Holds a guard: drop it when they are made.
pub struct Making {
    /// The rank's memory.
    pub memory: Arc<dyn BlockMemory>,
    /// Where its checksums go.
    pub checksums: Arc<Checksums>,
    /// Which blocks.
    pub growth: Growth,
    /// Keeps them from being released.
    pub guard: Guard,
}

impl Making {
    /// Makes them: see [`Checksums::make`].
    pub fn run(&self) -> Result<(), MemoryError> {
        let Growth { first, block_ids } = &self.growth;
        self.checksums.make(&self.memory, *first, block_ids, &self.guard)
    }
}

/// A hold that cannot grow so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrowError {
    /// There is no hold of the request, or none yet.
    #[error("request {0:?} has no hold")]
    Unknown(String),
    /// It has fewer blocks, or ranks.
    #[error("blocks {first} to {end} of rank {rank}, in a hold of {blocks} blocks for {ranks} ranks")]
    Range {
        /// First block.
        first: usize,
        /// Behind the last one.
        end: usize,
        /// Whose.
        rank: u32,
        /// The hold's blocks.
        blocks: usize,
        /// The hold's ranks.
        ranks: usize,
    },
    /// Ranks differ in which block it is.
    #[error("block {index} of the prompt is {said}, and {known} by what another rank said")]
    Differs {
        /// Which of the hold's.
        index: usize,
        /// What it is now said to be.
        said: u32,
        /// What it was before.
        known: u32,
    },
}

/// Part of a hold that others share.
struct Shared {
    /// Live [`Copy`]s.
    copies: AtomicUsize,
    finished: Mutex<Finished>,
    end: std::sync::OnceLock<HoldEnd>,
    ended: CancellationToken,
    epoch_ended: CancellationToken,
    wake: Wake,
}

/// Which ranks of a puller are finished, as bits, by how many ranks the puller has: it may have other than the holder.
#[derive(Default)]
struct Finished(BTreeMap<u32, u64>);

const _: () = assert!(MAX_RANKS <= u64::BITS);

impl Finished {
    /// `false` where it was finished before.
    fn add(&mut self, rank: u32, ranks: u32) -> bool {
        let done = self.0.entry(ranks).or_default();
        let before = *done;
        *done |= 1 << rank;
        *done != before
    }

    fn has(&self, rank: u32, ranks: u32) -> bool {
        self.0.get(&ranks).is_some_and(|done| done & 1 << rank != 0)
    }

    /// Whether all ranks of a puller are.
    fn is_complete(&self) -> bool {
        self.0.iter().any(|(ranks, done)| done.count_ones() == *ranks)
    }
}

impl Shared {
    fn finished(&self) -> std::sync::MutexGuard<'_, Finished> {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn copy(self: &Arc<Self>) -> Arc<Copy> {
        self.copies.fetch_add(1, Ordering::Relaxed);
        Arc::new(Copy { shared: self.clone() })
    }
}

/// What guards are clones of.
struct Copy {
    shared: Arc<Shared>,
}

impl Drop for Copy {
    fn drop(&mut self) {
        if self.shared.copies.fetch_sub(1, Ordering::AcqRel) == 1 {
            (self.shared.wake)();
        }
    }
}

struct Entry {
    request_id: String,
    hashes: Vec<BlockHash>,
    ids: Arc<[OnceLock<u32>]>,
    ranks: Vec<RankHold>,
    lease: Duration,
    expires: Instant,
    shared: Arc<Shared>,
}

/// All holds of one agent. See the module.
pub struct HoldTable {
    epoch: Epoch,
    epoch_ended: CancellationToken,
    max_holds: usize,
    wake: Wake,
    /// Live and ended ones, until released. Ordered, so that releases come in an order that tests can repeat.
    entries: BTreeMap<TransferId, Entry>,
    requests: BTreeMap<String, TransferId>,
    remembered: VecDeque<(TransferId, HoldEnd)>,
}

impl HoldTable {
    /// An empty table of an epoch, for at most `max_holds` holds at a time.
    pub fn new(epoch: Epoch, max_holds: usize, wake: Wake) -> Self {
        Self {
            epoch,
            epoch_ended: CancellationToken::new(),
            max_holds,
            wake,
            entries: BTreeMap::new(),
            requests: BTreeMap::new(),
            remembered: VecDeque::new(),
        }
    }

    /// The epoch whose holds open.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Holds that are not released yet, ended ones included.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Holds blocks for `lease` from `now`. Gives the checksums to be made of those that are computed already, of each rank.
    pub fn insert(&mut self, now: Instant, hold: Hold, lease: Duration) -> Result<Vec<Making>, HoldError> {
        let Hold { request_id, transfer_id, hashes, block_ids, ranks } = hold;
        let checksums_fit = ranks.iter().all(|rank| rank.checksums.len() == hashes.len());
        if hashes.is_empty() || block_ids.len() > hashes.len() || ranks.is_empty() || !checksums_fit {
            let (blocks, hashes, ranks) = (block_ids.len(), hashes.len(), ranks.len());
            return Err(HoldError::Shape { blocks, hashes, ranks });
        }
        if self.entries.contains_key(&transfer_id) {
            return Err(HoldError::DuplicateTransfer(transfer_id));
        }
        if self.past(transfer_id).is_some() {
            return Err(HoldError::TransferOver(transfer_id));
        }
        if self.requests.contains_key(&request_id) {
            return Err(HoldError::DuplicateRequest(request_id));
        }
        if self.entries.len() >= self.max_holds {
            return Err(HoldError::Full(self.entries.len()));
        }
        let shared = Arc::new(Shared {
            copies: AtomicUsize::new(0),
            finished: Mutex::default(),
            end: std::sync::OnceLock::new(),
            ended: CancellationToken::new(),
            epoch_ended: self.epoch_ended.clone(),
            wake: self.wake.clone(),
        });
        let known = block_ids.iter().map(|block| OnceLock::from(*block));
        let ids = known.chain(std::iter::repeat_with(OnceLock::new)).take(hashes.len()).collect();
        let growth = Growth { first: 0, block_ids };
        let making = ranks.iter().filter(|_| !growth.block_ids.is_empty());
        let making = making.map(|rank| rank.making(growth.clone(), &shared)).collect();
        self.requests.insert(request_id.clone(), transfer_id);
        let entry = Entry { request_id, hashes, ids, ranks, lease, expires: now + lease, shared };
        self.entries.insert(transfer_id, entry);
        Ok(making)
    }

    /// A rank has computed more blocks of a hold, whose lease begins anew. Gives the checksums to be made, or `None` where the
    /// hold has ended.
    pub fn grow(
        &mut self,
        now: Instant,
        request_id: &str,
        rank: u32,
        growth: Growth,
    ) -> Result<Option<Making>, GrowError> {
        let entry = self.requests.get(request_id).and_then(|id| self.entries.get_mut(id));
        let entry = entry.ok_or_else(|| GrowError::Unknown(request_id.to_owned()))?;
        let (first, end) = (growth.first, growth.first.saturating_add(growth.block_ids.len()));
        let range = || {
            let (blocks, ranks) = (entry.ids.len(), entry.ranks.len());
            GrowError::Range { first, end, rank, blocks, ranks }
        };
        let ids = entry.ids.get(first..end).ok_or_else(range)?;
        let of = entry.ranks.get(rank as usize).ok_or_else(range)?;
        for ((index, id), said) in (first..).zip(ids).zip(&growth.block_ids) {
            let known = *id.get_or_init(|| *said);
            if known != *said {
                return Err(GrowError::Differs { index, said: *said, known });
            }
        }
        // An ended hold's guards only become fewer.
        if entry.shared.end.get().is_some() || now >= entry.expires {
            return Ok(None);
        }
        let making = of.making(growth, &entry.shared);
        entry.expires = now + entry.lease;
        Ok(Some(making))
    }

    /// The request of a hold is over before its time: ends the hold, as [`Self::release`] does.
    pub fn cancel(&mut self, request_id: &str) -> bool {
        self.requests.get(request_id).copied().is_some_and(|transfer_id| self.release(transfer_id))
    }

    /// Ends a hold by order. `false` where there is none, or it ended already. Its blocks are released by a later
    /// [`Self::poll`].
    ///
    /// The order may come by another way than the hold, and overtake it: then the hold is not taken when it comes.
    pub fn release(&mut self, transfer_id: TransferId) -> bool {
        match self.entries.get(&transfer_id) {
            Some(entry) => end(entry, HoldEnd::Released),
            None => {
                if self.past(transfer_id).is_none() {
                    self.remember(transfer_id, HoldEnd::Released);
                }
                false
            }
        }
    }

    /// How a transfer ended, if that is remembered.
    fn past(&self, transfer_id: TransferId) -> Option<HoldEnd> {
        self.remembered.iter().rev().find(|(id, _)| *id == transfer_id).map(|(_, end)| *end)
    }

    fn remember(&mut self, transfer_id: TransferId, end: HoldEnd) {
        if self.remembered.len() == REMEMBERED {
            self.remembered.pop_front();
        }
        self.remembered.push_back((transfer_id, end));
    }

    /// Ends all holds and opens none of this epoch any more: the engine or the agent is another one from now on. The
    /// holds' blocks are released by later [`Self::poll`]s, when no copy of them is in flight.
    pub fn drop_epoch(&mut self, next: Epoch) {
        self.epoch = next;
        std::mem::take(&mut self.epoch_ended).cancel();
        for entry in self.entries.values() {
            end(entry, HoldEnd::Dropped);
        }
    }

    /// Ends what is to end at `now`, and returns the holds that are released with this call: ended, and with no copy
    /// in flight. In order of transfer id.
    pub fn poll(&mut self, now: Instant) -> Vec<ReleasedHold> {
        let mut released = Vec::new();
        for (transfer_id, entry) in &self.entries {
            if entry.shared.finished().is_complete() {
                end(entry, HoldEnd::Finished);
            } else if now >= entry.expires {
                end(entry, HoldEnd::Expired);
            }
            let Some(end) = entry.shared.end.get().copied() else { continue };
            // An ended hold opens for nobody, so its count only falls.
            if entry.shared.copies.load(Ordering::Acquire) == 0 {
                let request_id = entry.request_id.clone();
                released.push(ReleasedHold { request_id, transfer_id: *transfer_id, end });
            }
        }
        for ReleasedHold { request_id, transfer_id, end } in &released {
            self.entries.remove(transfer_id);
            self.requests.remove(request_id);
            self.remember(*transfer_id, *end);
        }
        released
    }

    /// When [`Self::poll`] has to be called at the latest, unless woken before.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let live = self.entries.values().filter(|entry| entry.shared.end.get().is_none());
        live.map(|entry| entry.expires).min()
    }
}

fn end(entry: &Entry, end: HoldEnd) -> bool {
    let first = entry.shared.end.set(end).is_ok();
    if first {
        entry.shared.ended.cancel();
    }
    first
}
