//! Which engine holds which blocks, in which tier, and how much of a prompt it could reuse.
//!
//! The index is exact: it holds what the engines' events said, and, apart from that, what a dispatch made likely
//! ([`KvIndex::expect`]). Each engine's part stands under an epoch; opening another epoch empties it, and whatever comes
//! under an old one is refused. Events may come twice; the last event of a block decides.
//!
//! # Namespaces
//! A [block hash](baton_proto::block_hash) covers the model, the LoRA adapter, the tenant's cache salt and the keys of
//! multimodal items, so blocks of different namespaces never meet here and the index knows nothing of them. An engine whose
//! ranks have caches of their own takes one [`Slot`] for each rank.
//!
//! # Cache groups
//! Engines of models with sliding-window or recurrent layers keep several caches, whose blocks come and go on their own.
//! Such an engine is opened with [`KvIndex::open_groups`]; its memberships are by block and group, and its overlap is
//! what vLLM would reuse: the longest prefix that each group accepts. vLLM never reuses a prompt whole: who wants its figure
//! to the block looks up the whole blocks of all tokens but the last. Not modelled: vLLM's hits inside a block (Mamba's
//! fine-grained hits), where the index says less than vLLM finds; and speculative decoding with EAGLE, where vLLM drops
//! the last block of a hit. Kinds of attention other than [`Attention`]'s (chunked local, cross) must not be reported: the
//! agent ignores them.
//!
//! # How it is kept
//! Blocks that follow each other lie in *chains*; a chain knows who holds which stretch of it. An engine stores and evicts
//! runs of blocks, so a stretch costs eight bytes however long it is, a lookup takes a few comparisons for each chain, and a store
//! of blocks that others hold too costs next to nothing. Two tables lead from a hash into a chain: a small one from where
//! chains begin, which lookups and stores ask, and a large compact one from all other blocks, which is asked where a search begins
//! inside a chain: at the parent of what is stored, at what is evicted. Changes of the large one wait in logs of its parts and are made
//! many at a time, so that its cache misses are shared; whoever searches it reads the part's log too.
//! That blocks follow each other is learnt from stores and dispatches that say so ([`Run::chain`]); blocks stored
//! without ([`Run::loose`]) are chains of one block until a dispatch shows where they belong. Links between blocks are
//! claims of authenticated agents and of the coordinator's own hashing; a false one could misplace requests, and no more: KV is
//! checked by hash where it is moved.
//!
//! # Concurrency
//! Every method takes `&self`. Changes are made in steps of at most 64 blocks, a few microseconds each; a lookup waits for
//! the step in hand at most, and a step for the lookups in hand. A store is visible step by step; [`KvIndex::clear`],
//! [`KvIndex::open`] and [`KvIndex::forget`] take effect at once and give memory back step by step before they return.
//!
//! # Memory
//! About 25 bytes for each distinct block (16 hash, 7 to 11 table) and 8 for each stretch that an engine holds, besides
//! 64 for each chain, and 3 MB for the logs. The worst case, in which every block is a chain of its own with one holder, is about 130 bytes a
//! membership; a cut-up chain may hold three dead blocks, 16 bytes each, for a live one. So [`Limits::memberships`] of 16 million
//! bounds the index at 2 GB in the worst case and at 0.6 GB in practice. At the cap, a store of a block that its cache does not hold
//! yet is dropped and counted: the index then knows less than the engines hold, and a request is computed where it could
//! have been a hit. Removals make room again. There can be 16.7 million chains; a block that would need one more is dropped
//! and counted in the same way. Expectations have a cap of their own ([`Limits::expected`]).

mod chain;
mod heads;
mod hybrid;
mod inner;
mod key;
mod lanes;
mod lock;
mod lookup;
mod overlaps;
mod places;
mod state;
mod types;

use std::sync::Mutex;

use baton_proto::{BlockHash, Epoch};

use self::hybrid::Groups;
use self::lock::Shared;
pub use self::overlaps::{Overlap, Overlaps};
use self::state::{Behind, Data, Mark, STEP};
pub use self::types::{Attention, Group, Holder, IndexError, Limits, Run, Slot, Tier, Tiers};

/// Ticks that an expectation lasts at most.
pub const MAX_TICKS: u64 = 200;

/// Chains that are looked at in one step of a sweep over all.
const SWEEP: u32 = 64;

/// Blocks of one engine that [`KvIndex::export`] gives: who holds it, its hash, where.
pub type Membership = (Holder, BlockHash, Tiers);

/// The index.
#[derive(Debug)]
pub struct KvIndex {
    data: Shared<Data>,
    /// Only one call lets time pass at once.
    expiry: Mutex<()>,
}

impl KvIndex {
    /// An empty index. `seed` is a secret that sets the layout of its tables and nothing else: with it, nobody can
    /// choose prompts that slow the index down.
    pub fn new(limits: Limits, seed: u64) -> Self {
        Self { data: Shared::new(Data::new(limits, seed)), expiry: Mutex::new(()) }
    }

    /// Puts an engine with one cache of full attention at an epoch. A change of epoch empties its part; the same epoch
    /// again keeps it.
    ///
    /// # Errors
    /// [`IndexError::Caches`].
    pub fn open(&self, slot: Slot, epoch: Epoch) -> Result<(), IndexError> {
        self.open_groups(slot, epoch, &[Group::new(Attention::Full)])
    }

    /// Puts an engine with these cache groups, at least one, at an epoch. A change of epoch or of groups empties its
    /// part.
    ///
    /// # Errors
    /// [`IndexError::Caches`].
    pub fn open_groups(&self, slot: Slot, epoch: Epoch, groups: &[Group]) -> Result<(), IndexError> {
        // One cache of full attention needs no group's reckoning.
        let groups = (groups != [Group::new(Attention::Full)]).then(|| Groups::new(groups));
        let old = self.data.write(|data| {
            if data.lanes.is_open(slot, epoch, groups.as_ref()) {
                return Ok(Default::default());
            }
            let old = data.lanes.open(slot, epoch, groups)?;
            data.uncount(&old);
            Ok(old)
        })?;
        self.drain(&old);
        Ok(())
    }

    /// Empties the engine's part and closes its epoch.
    pub fn forget(&self, slot: Slot) {
        let old = self.data.write(|data| {
            let old = data.lanes.close(slot);
            data.uncount(&old);
            old
        });
        self.drain(&old);
    }

    /// The engine holds nothing any more, and nothing is expected of it.
    ///
    /// # Errors
    /// See [`IndexError`].
    pub fn clear(&self, slot: Slot, epoch: Epoch) -> Result<(), IndexError> {
        let old = self.data.write(|data| {
            data.lanes.check(slot, epoch)?;
            let old = data.lanes.renew(slot)?;
            data.uncount(&old);
            Ok(old)
        })?;
        self.drain(&old);
        Ok(())
    }

    /// The cache holds these blocks in these tiers, besides those it holds them in already. Returns how many memberships
    /// were dropped at the cap.
    ///
    /// # Errors
    /// See [`IndexError`]. A long run may be stored in part when its epoch ends meanwhile.
    pub fn store(&self, holder: Holder, tiers: impl Into<Tiers>, run: Run<'_>) -> Result<u64, IndexError> {
        self.mark(holder, Mark::Held(tiers.into().bits()), run)
    }

    /// The cache does not hold these blocks in these tiers any more.
    ///
    /// # Errors
    /// See [`IndexError`].
    pub fn remove(
        &self,
        holder: Holder,
        tiers: impl Into<Tiers>,
        hashes: &[BlockHash],
    ) -> Result<(), IndexError> {
        let tiers = tiers.into();
        self.data.write(|data| data.lanes.lane(holder).map(drop))?;
        let mut likely = None;
        for step in hashes.chunks(STEP) {
            likely = self.data.write(|data| {
                let lane = data.lanes.lane(holder)?;
                Ok(data.unmark(lane, tiers.bits(), step, likely))
            })?;
        }
        Ok(())
    }

    /// A prompt was sent to the engine: it will likely hold these blocks, all of the prompt's from the first on, soon. Each is
    /// expected until the engine says that it holds it, or until [`Self::expire`] is called with the tick `until` or a
    /// later one; at most [`MAX_TICKS`] after the last expired tick. Blocks that the engine holds are not expected, also
    /// when it evicts them afterwards. Returns how many were dropped at the cap.
    ///
    /// # Errors
    /// See [`IndexError`].
    pub fn expect(
        &self,
        slot: Slot,
        epoch: Epoch,
        hashes: &[BlockHash],
        until: u64,
    ) -> Result<u64, IndexError> {
        let (groups, mark) = {
            let data = self.data.read();
            data.lanes.check(slot, epoch)?;
            let until = until.min(data.now + MAX_TICKS);
            if until <= data.now {
                return Ok(0);
            }
            (data.lanes.groups(slot).cloned(), Mark::Expected(until as u8))
        };
        let holder = Holder::new(slot, epoch);
        let Some(groups) = groups else {
            return self.mark(holder, mark, Run::chain(None, hashes));
        };
        let mut dropped = 0;
        for (group, of) in groups.groups.iter().enumerate() {
            let stride = of.stride as usize;
            let blocks = hashes.len() / stride;
            let first = of.attention.needs().map_or(0, |needs| blocks.saturating_sub(needs as usize));
            let holder = holder.group(group as u16);
            dropped += if stride == 1 {
                let parent = first.checked_sub(1).map(|before| hashes[before]);
                self.mark(holder, mark, Run::chain(parent, &hashes[first..]))?
            } else {
                let last: Vec<BlockHash> =
                    (first..blocks).map(|block| hashes[(block + 1) * stride - 1]).collect();
                self.mark(holder, mark, Run::loose(&last))?
            };
        }
        Ok(dropped)
    }

    /// Time passed: expectations up to this tick end. Ticks are the caller's, and do not go back.
    pub fn expire(&self, now: u64) {
        // Spans keep the low byte of their tick only, so time moves in steps much shorter than a byte's worth.
        const STRIDE: u64 = 50;
        let _turn = self.expiry.lock().expect("no code that holds this lock panics");
        loop {
            let done = self.data.write(|data| {
                let left = now.saturating_sub(data.now);
                data.now += if data.expecting.is_empty() { left } else { left.min(STRIDE) };
                data.now >= now
            });
            let mut still = Vec::new();
            loop {
                // A chain that is cut up while its expectations end leaves new ones in the list.
                let chains = self.data.write(|data| std::mem::take(&mut data.expecting));
                if chains.is_empty() {
                    break;
                }
                for chain in chains {
                    while self.data.write(|data| data.expire(chain)) {}
                    let expects = self.data.write(|data| {
                        data.chains[chain].listed = data.expects(chain);
                        data.chains[chain].listed
                    });
                    if expects {
                        still.push(chain);
                    }
                }
            }
            self.data.write(|data| data.expecting.append(&mut still));
            if done {
                return;
            }
        }
    }

    /// How many leading blocks of the prompt each engine can reuse. `hashes` is the prompt's chain from its first block on.
    /// What `found` held before is forgotten.
    pub fn overlaps(&self, hashes: &[BlockHash], found: &mut Overlaps) {
        self.data.read().overlaps(hashes, found);
    }

    /// Every membership of the wanted engines: what a store of ownership writes. Equal to the index at one moment, if
    /// nothing changes meanwhile; else each block that does not change is given once.
    pub fn export(&self, wanted: impl Fn(Slot) -> bool) -> Vec<Membership> {
        // Blocks that move between chains could be missed: then once more, and at last in one go.
        for steps in [SWEEP, SWEEP, u32::MAX] {
            let mut members = Vec::new();
            let moves = self.data.read().chains.moves;
            let mut next: u32 = 1;
            loop {
                let data = self.data.read();
                let end = data.chains.end().min(next.saturating_add(steps));
                (next..end).for_each(|chain| data.members(chain, &wanted, &mut members));
                next = end;
                if data.chains.end() == end {
                    break;
                }
            }
            if steps == u32::MAX || self.data.read().chains.moves == moves {
                return members;
            }
        }
        Vec::new()
    }

    /// Blocks that the engine holds, summed over its groups.
    pub fn blocks_of(&self, slot: Slot) -> u64 {
        let data = self.data.read();
        data.lanes.of(slot).iter().map(|lane| data.lanes.get(*lane).held).sum()
    }

    /// Memberships over all engines.
    pub fn memberships(&self) -> u64 {
        self.data.read().memberships
    }

    /// Memberships that the cap kept out, ever.
    pub fn dropped(&self) -> u64 {
        self.data.read().dropped
    }

    /// Blocks that are expected and not held, over all engines.
    pub fn expected(&self) -> u64 {
        self.data.read().expected
    }

    /// Expectations that the cap kept out, ever.
    pub fn dropped_expected(&self) -> u64 {
        self.data.read().dropped_expected
    }

    fn mark(&self, holder: Holder, mark: Mark, run: Run<'_>) -> Result<u64, IndexError> {
        self.data.write(|data| data.lanes.lane(holder).map(drop))?;
        if matches!(mark, Mark::Held(0)) {
            return Ok(0);
        }
        let mut dropped = 0;
        let parent = run.parent.as_ref();
        let mut behind = Behind { chained: run.chained, parent, likely: None, new: false };
        let mut left = run.hashes.len();
        for step in run.hashes.chunks(STEP) {
            left -= step.len();
            dropped += self.data.write(|data| {
                let lane = data.lanes.lane(holder)?;
                Ok(data.mark(lane, mark, &mut behind, step, left))
            })?;
            behind.parent = step.last().filter(|_| run.chained);
        }
        Ok(dropped)
    }

    /// Takes everything from lanes that do not count any more, and frees their ids.
    fn drain(&self, lanes: &[u16]) {
        if lanes.is_empty() {
            return;
        }
        let full = |data: &Data| {
            lanes.iter().any(|lane| data.lanes.get(*lane).held + data.lanes.get(*lane).expected > 0)
        };
        // Blocks that move to a chain behind the sweep are met by the next one.
        while full(&self.data.read()) {
            let mut next: u32 = 1;
            loop {
                let (mut found, end) = {
                    let data = self.data.read();
                    let end = data.chains.end().min(next + SWEEP);
                    ((next..end).filter(|chain| data.has_any(lanes, *chain)).collect::<Vec<u32>>(), end)
                };
                for chain in found.drain(..) {
                    while self.data.write(|data| data.drain(lanes, chain)) {}
                }
                next = end;
                if self.data.read().chains.end() <= end {
                    break;
                }
            }
        }
        self.data.write(|data| lanes.iter().for_each(|lane| data.lanes.release(*lane)));
    }
}
