//! Who owns which blocks, kept over a restart of the coordinator.
//!
//! The index in memory leads; the store follows. Every engine's blocks lie in 256 buckets by the first byte of their
//! hash. An event marks the buckets it touches, and about once a second [`Ownership::flush`] writes the marked ones whole, then
//! the engine's registration with the newest applied sequence number. So the stored number never runs ahead of
//! the stored blocks, and events between the two are applied twice, which changes nothing: the last event of a
//! block decides.
//!
//! What waits to be written is one bit for each bucket and engine, however long the store is away. A store that fails is tried again
//! at the next flush; meanwhile requests are served from memory.

mod embedded;
mod etcd;
mod kv;
mod record;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use baton_coordinator_core::kv_index::{Holder, KvIndex, Run, Slot, Tiers};
use baton_proto::{BlockHash, EngineId};
use tokio::time::Instant;
use tracing::warn;

pub use self::embedded::Embedded;
pub use self::etcd::Etcd;
pub use self::kv::{Change, KvStore, MAX_VALUE, StoreError};
use crate::config::{Config, StoreConfig};
use crate::metrics::Metrics;
use crate::registry::{Entry, Registration, Registry};

/// Values that are gathered before they are written: bounds the memory of a flush.
const WRITE_BATCH: usize = 4 << 20;

/// Blocks of the index that are gathered at once, if no single engine has more: bounds the memory of a flush.
const GATHERED_BLOCKS: u64 = 1 << 20;

/// Opens the configured store.
pub async fn open(config: &Config) -> Result<Box<dyn KvStore>, StoreError> {
    Ok(match &config.store {
        StoreConfig::Embedded(path) => Box::new(Embedded::open(path)?),
        StoreConfig::Etcd(urls) => Box::new(Etcd::connect(urls, &config.tls).await?),
    })
}

/// The bucket that a block falls into.
fn bucket_of(hash: &BlockHash) -> u8 {
    hash.as_bytes()[0]
}

/// Buckets, one bit each.
#[derive(Clone, Copy, Debug, Default)]
struct Marks([u64; 4]);

impl Marks {
    const ALL: Self = Self([u64::MAX; 4]);

    fn set(&mut self, bucket: u8) {
        self.0[usize::from(bucket / 64)] |= 1 << (bucket % 64);
    }

    fn has(&self, bucket: u8) -> bool {
        self.0[usize::from(bucket / 64)] & (1 << (bucket % 64)) != 0
    }

    fn merge(&mut self, other: Self) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine |= theirs;
        }
    }

    fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }
}

/// What is to be written of one engine.
#[derive(Clone, Copy, Debug, Default)]
struct Dirty {
    marks: Marks,
    /// Everything stored of the engine goes first.
    erase: bool,
}

/// The ownership of all engines.
pub struct Ownership {
    store: Box<dyn KvStore>,
    dirty: Mutex<BTreeMap<EngineId, Dirty>>,
}

/// What a restart found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Engines that were registered.
    pub engines: usize,
    /// Their blocks.
    pub blocks: u64,
    /// Engines whose blocks were not whole: they are asked for all.
    pub incomplete: usize,
}

impl Ownership {
    /// Ownership in this store.
    pub fn new(store: Box<dyn KvStore>) -> Self {
        Self { store, dirty: Mutex::default() }
    }

    /// Puts the stored engines and their blocks into registry and index. Entries of another version are left
    /// out.
    pub async fn restore(
        &self,
        registry: &Registry,
        index: &KvIndex,
        now: Instant,
    ) -> Result<Restored, StoreError> {
        let mut restored = Restored::default();
        for (key, value) in self.store.load(record::ENGINES).await? {
            let registration = record::decode_engine(value)
                .and_then(|(message, seq)| Some((Registration::check(message).ok()?, seq)));
            let Some((registration, mut applied_seq)) = registration else {
                warn!(key, "left out: not of this version");
                continue;
            };
            let (id, epoch) = (registration.engine_id.clone(), registration.epoch);
            let mut buckets = Vec::new();
            let mut whole = true;
            for (_, value) in self.store.load(&record::buckets_prefix(&id)).await? {
                match record::decode_bucket(value) {
                    Some((of, blocks)) if of == epoch => buckets.push(blocks),
                    _ => whole = false,
                }
            }
            if !whole {
                buckets.clear();
                applied_seq = 0;
                restored.incomplete += 1;
            }
            let groups = registration.groups.clone();
            let entry = match registry.restore(registration, applied_seq, now) {
                Ok(entry) => entry,
                Err(error) => {
                    warn!(engine = %id, %error, "left out");
                    continue;
                }
            };
            let mut by_place: BTreeMap<(u16, Tiers), Vec<BlockHash>> = BTreeMap::new();
            for (hash, group, tiers) in buckets.into_iter().flatten() {
                by_place.entry((group, tiers)).or_default().push(hash);
            }
            let stored = index.open_groups(entry.slot, epoch, &groups).and_then(|()| {
                by_place.iter().try_for_each(|((group, tiers), hashes)| {
                    let holder = Holder::new(entry.slot, epoch).group(*group);
                    index.store(holder, *tiers, Run::loose(hashes)).map(drop)
                })
            });
            if let Err(error) = stored {
                warn!(engine = %id, %error, "not indexed");
            }
            restored.engines += 1;
            restored.blocks += index.blocks_of(entry.slot);
        }
        Ok(restored)
    }

    /// The engine's blocks with these hashes changed.
    pub fn mark<'a>(&self, entry: &Entry, hashes: impl IntoIterator<Item = &'a BlockHash>) {
        let mut marks = Marks::default();
        for hash in hashes {
            marks.set(bucket_of(hash));
        }
        self.dirty.lock().expect(POISON).entry(entry.id.clone()).or_default().marks.merge(marks);
    }

    /// Everything of the engine changed.
    pub fn mark_all(&self, entry: &Entry) {
        self.dirty.lock().expect(POISON).entry(entry.id.clone()).or_default().marks = Marks::ALL;
    }

    /// The engine is not registered any more.
    pub fn erase(&self, id: &EngineId) {
        // Marks stay: the engine may be back before the next flush.
        self.dirty.lock().expect(POISON).entry(id.clone()).or_default().erase = true;
    }

    /// Writes what is marked. On an error it stays marked.
    pub async fn flush(
        &self,
        registry: &Registry,
        index: &KvIndex,
        metrics: &Metrics,
    ) -> Result<(), StoreError> {
        let taken = std::mem::take(&mut *self.dirty.lock().expect(POISON));
        let written = self.write(&taken, registry, index).await;
        let mut dirty = self.dirty.lock().expect(POISON);
        if written.is_err() {
            metrics.store_errors.inc();
            for (id, before) in taken {
                let now = dirty.entry(id).or_default();
                now.marks.merge(before.marks);
                now.erase |= before.erase;
            }
        }
        let waiting: u32 = dirty.values().map(|dirty| dirty.marks.count()).sum();
        metrics.store_dirty_buckets.set(waiting.into());
        written
    }

    async fn write(
        &self,
        dirty: &BTreeMap<EngineId, Dirty>,
        registry: &Registry,
        index: &KvIndex,
    ) -> Result<(), StoreError> {
        for (id, _) in dirty.iter().filter(|(_, dirty)| dirty.erase) {
            self.store.write(vec![(record::engine_key(id), None)]).await?;
            self.store.delete_prefix(&record::buckets_prefix(id)).await?;
        }
        // Records before blocks: their sequence numbers may lag behind the blocks, never lead.
        let engines: BTreeMap<Slot, (Arc<Entry>, Marks, Arc<Registration>, u64)> = dirty
            .iter()
            .filter_map(|(id, dirty)| {
                let entry = registry.get(id)?;
                let (registration, seq) = entry.record();
                // Of an engine that is back already everything was just erased.
                let marks = if dirty.erase { Marks::ALL } else { dirty.marks };
                Some((entry.slot, (entry, marks, registration, seq)))
            })
            .collect();
        let mut changes = Vec::new();
        let mut bytes = 0;
        let mut left: Vec<Slot> = engines.keys().copied().rev().collect();
        while !left.is_empty() {
            let mut parts: BTreeMap<(Slot, u8), Vec<record::Stored>> = BTreeMap::new();
            let (mut gathered, mut blocks) = (Vec::new(), 0);
            while let Some(slot) = left.pop_if(|slot| {
                blocks += index.blocks_of(*slot);
                gathered.is_empty() || blocks <= GATHERED_BLOCKS
            }) {
                let marked = (0..=255u8).filter(|bucket| engines[&slot].1.has(*bucket));
                parts.extend(marked.map(|bucket| ((slot, bucket), Vec::new())));
                gathered.push(slot);
            }
            for (holder, hash, tiers) in index.export(|slot| gathered.binary_search(&slot).is_ok()) {
                if let Some(part) = parts.get_mut(&(holder.slot, bucket_of(&hash))) {
                    part.push((hash, holder.group, tiers));
                }
            }
            for ((slot, bucket), mut blocks) in parts {
                blocks.sort_unstable();
                let (entry, _, registration, _) = &engines[&slot];
                let value = (!blocks.is_empty()).then(|| record::encode_bucket(registration.epoch, &blocks));
                bytes += value.as_ref().map_or(0, bytes::Bytes::len);
                changes.push((record::bucket_key(&entry.id, bucket), value));
                if bytes > WRITE_BATCH {
                    self.store.write(std::mem::take(&mut changes)).await?;
                    bytes = 0;
                }
            }
        }
        for (entry, _, registration, seq) in engines.values() {
            let value = record::encode_engine(&registration.message, *seq);
            changes.push((record::engine_key(&entry.id), Some(value)));
        }
        if changes.is_empty() { Ok(()) } else { self.store.write(changes).await }
    }
}

const POISON: &str = "no code that holds this lock panics";

#[cfg(test)]
mod tests;
