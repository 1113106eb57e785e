//! Holds that are opened: what one puller gets of the held blocks, and its right to read them.

use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use baton_kernels::{BlockMemory, Guard, MemoryError, Slice, Sliced, shares_of};
use baton_proto::wire::{Accepted, BlockForm, ErrorCode, MAX_RANKS, PullHeader, WireDtype, WireError};
use tokio_util::sync::CancellationToken;

use super::{Copy, HoldEnd, HoldTable, RankHold};
use crate::checksum::{Made, Part};

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

impl HoldTable {
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
