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

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use baton_kernels::{BlockLayout, BlockMemory, Guard, MemoryError, Slice, Sliced, shares_of};
use baton_proto::wire::{Accepted, BlockForm, ErrorCode, MAX_RANKS, PullHeader, WireDtype, WireError};
use baton_proto::{BlockHash, Epoch, TransferId};
use tokio_util::sync::CancellationToken;

use crate::checksum::{Checksums, Made, Part};

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

/// A run of held blocks, opened for one puller.
#[derive(Clone)]
pub struct HeldBlocks {
    /// Where they lie, or a view of it in the common order.
    pub memory: Arc<dyn BlockMemory>,
    /// The form in which `memory` has them.
    pub form: BlockForm,
    /// The hold's, as far as they are computed.
    ids: Arc<[OnceLock<u32>]>,
    /// Which of them these are.
    range: Range<usize>,
    /// The ranks that they are read from, each with the checksums made when they were held. Of blocks as they lie it is one.
    pub parts: Arc<[Part]>,
    /// The right to read them.
    pub claim: Claim,
}

/// The right to read held blocks for one puller.
#[derive(Clone)]
pub struct Claim {
    copy: Arc<Copy>,
    rank: u32,
    ranks: u32,
}

impl HeldBlocks {
    /// What the puller is told of them.
    pub fn accepted(&self) -> Accepted {
        Accepted { block_bytes: self.memory.block_bytes() as u64, form: self.form }
    }

    /// How many there are, those that are not computed yet included.
    pub fn count(&self) -> u32 {
        self.range.len() as u32
    }

    /// The id of one of the blocks, once it is computed: known wherever its checksum is.
    pub fn block(&self, index: u32) -> Option<u32> {
        self.ids[self.range.clone()].get(index as usize)?.get().copied()
    }

    /// Whether they travel as they lie, and so have the checksums made when they were held.
    pub fn lie(&self) -> bool {
        self.form == BlockForm::AsItLies
    }

    /// Whether one of the blocks is computed, and its checksums are made.
    pub fn is_there(&self, index: u32) -> bool {
        self.parts.iter().all(|part| part.checksums.get(part.first_block + index as usize).is_some())
    }

    /// The checksum of one of the blocks, where they travel as they lie and it is known.
    pub fn checksum(&self, index: u32) -> Option<u64> {
        let part = self.parts.first().filter(|_| self.lie())?;
        part.checksums.get(part.first_block + index as usize)
    }

    /// The same once it is known; `None` where it will not be.
    ///
    /// # Cancel safety
    /// Safe to drop.
    pub async fn checksum_made(&self, index: u32) -> Option<u64> {
        let part = self.parts.first().filter(|_| self.lie())?;
        part.checksums.wait(part.first_block + index as usize).await
    }

    /// Puts one of the blocks together for the wire, with its checksum, once those of hold time are known; `None` where they
    /// will not be, or the block cannot be read.
    ///
    /// # Cancel safety
    /// Safe to drop: a block that is being read is let go within some milliseconds.
    pub fn make(&self, index: u32) -> impl Future<Output = Option<Made>> + Send + 'static {
        let held = self.clone();
        async move {
            let mut checksum = 0;
            for part in &*held.parts {
                checksum ^= part.checksums.wait(part.first_block + index as usize).await?;
            }
            let block = held.block(index)?;
            let made = tokio::task::spawn_blocking(move || held.make_now(block, checksum)).await.ok()?;
            made.inspect_err(|error| tracing::warn!(%error, "a held block cannot be put together")).ok()
        }
    }

    /// The same at once, of the block with this id. `checksum` is that of the parts when they were held, joined by exclusive or.
    pub(crate) fn make_now(&self, block: u32, checksum: u64) -> Result<Made, MemoryError> {
        Made::read(&self.memory, &self.parts, block, checksum, &self.claim.guard())
    }
}

impl Claim {
    /// To be kept by everything that reads the blocks: none of them is released while it or a clone of it lives. The
    /// claim itself is such a clone.
    pub fn guard(&self) -> Guard {
        self.copy.clone()
    }

    /// Says that the puller needs nothing more of the hold.
    pub fn finish(&self) {
        let shared = &self.copy.shared;
        if shared.finished().add(self.rank, self.ranks) {
            (shared.wake)();
        }
    }

    /// Cancelled when the hold ends: stop reading, and drop all guards. Ask [`Self::end`] why.
    pub fn ended(&self) -> &CancellationToken {
        &self.copy.shared.ended
    }

    /// Cancelled when the epoch ends in which the hold was taken: the memory is another one from then on.
    pub fn epoch_ended(&self) -> &CancellationToken {
        &self.copy.shared.epoch_ended
    }

    /// Why the hold ended, once it did.
    pub fn end(&self) -> Option<HoldEnd> {
        self.copy.shared.end.get().copied()
    }
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

    /// Opens the blocks that a pull asks for, or says why not. Everything that can be wrong with a pull is found here,
    /// before any byte moves.
    pub fn open(&self, now: Instant, pull: &PullHeader) -> Result<HeldBlocks, WireError> {
        if pull.epoch != self.epoch {
            return Err(WireError::new(ErrorCode::StaleEpoch, self.epoch.0));
        }
        let Some(entry) = self.entries.get(&pull.transfer_id) else {
            let ended = self.past(pull.transfer_id);
            return Err(ended.map_or(ErrorCode::UnknownTransfer, HoldEnd::code).into());
        };
        if let Some(end) = entry.shared.end.get() {
            return Err(end.code().into());
        }
        if now >= entry.expires {
            return Err(ErrorCode::LeaseExpired.into());
        }
        if pull.ranks == 0 || pull.ranks > MAX_RANKS || pull.rank >= pull.ranks {
            return Err(ErrorCode::Protocol.into());
        }
        let Some(wanted) = Wanted::of(&entry.ranks, pull) else {
            let block_bytes = entry.ranks.first().map_or(0, |rank| rank.memory.block_bytes() as u64);
            return Err(WireError::new(ErrorCode::LayoutMismatch, block_bytes));
        };
        let held = entry.ids.len();
        let (first, blocks) = (pull.first_block as usize, pull.blocks as usize);
        let Some(end) = first.checked_add(blocks).filter(|end| blocks > 0 && *end <= held) else {
            return Err(WireError::new(ErrorCode::Range, held as u64));
        };
        if entry.hashes[end - 1] != pull.last_hash {
            return Err(WireError::new(ErrorCode::ContentMismatch, held as u64));
        }
        if entry.shared.finished().has(pull.rank, pull.ranks) {
            return Err(ErrorCode::Released.into());
        }
        let claim = Claim { copy: entry.shared.copy(), rank: pull.rank, ranks: pull.ranks };
        let part = |rank: &RankHold| Part {
            memory: rank.memory.clone(),
            checksums: rank.checksums.clone(),
            first_block: first,
        };
        let Wanted { memory, form, ranks } = wanted;
        let parts = ranks.into_iter().map(part).collect();
        Ok(HeldBlocks { memory, form, ids: entry.ids.clone(), range: first..end, parts, claim })
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

/// What a pull's rank gets of the holder's.
struct Wanted<'a> {
    /// What its blocks are read from.
    memory: Arc<dyn BlockMemory>,
    form: BlockForm,
    /// Whose they are.
    ranks: Vec<&'a RankHold>,
}

impl<'a> Wanted<'a> {
    /// `None` where they are of no use to it.
    fn of(ranks: &'a [RankHold], pull: &PullHeader) -> Option<Self> {
        match pull.dtype {
            WireDtype::AsStored => None,
            WireDtype::Fp8 => Self::heads(ranks, pull, BlockForm::Packed),
        }
        .or_else(|| Self::as_it_lies(ranks, pull))
        .or_else(|| Self::heads(ranks, pull, BlockForm::Common))
    }

    /// All of one, which has the same layout.
    fn as_it_lies(ranks: &'a [RankHold], pull: &PullHeader) -> Option<Self> {
        let same = ranks.get(pull.rank as usize).filter(|rank| rank.layout.fingerprint == pull.layout);
        let rank = same.filter(|_| pull.ranks as usize == ranks.len())?;
        Some(Self { memory: rank.memory.clone(), form: BlockForm::AsItLies, ranks: vec![rank] })
    }

    /// Heads of some, with the same content.
    fn heads(ranks: &'a [RankHold], pull: &PullHeader, form: BlockForm) -> Option<Self> {
        let content = pull.content?;
        let total = ranks.first()?.layout.heads.as_ref()?.total();
        let shares = shares_of(total, u32::try_from(ranks.len()).ok()?, pull.rank, pull.ranks).ok()?;
        let slice = |share: baton_kernels::Share| {
            let rank = ranks.get(share.from_rank as usize)?;
            let map = rank.layout.heads.clone().filter(|map| map.content() == content)?;
            let heads = share.from_heads;
            (heads.end <= map.count()).then(|| (rank, Slice { memory: rank.memory.clone(), map, heads }))
        };
        let shares = shares.into_iter().map(slice).collect::<Option<Vec<_>>>()?;
        let (ranks, slices) = shares.into_iter().unzip();
        Some(Self { memory: Sliced::new(slices, form.dtype()).ok()?, form, ranks })
    }
}

fn end(entry: &Entry, end: HoldEnd) -> bool {
    let first = entry.shared.end.set(end).is_ok();
    if first {
        entry.shared.ended.cancel();
    }
    first
}

#[cfg(test)]
mod tests;
