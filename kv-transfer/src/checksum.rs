//! Checksums of blocks: XXH3-64 over a block's bytes in the order in which they travel.
//!
//! They are made when a hold is taken and travel with the blocks, so they cover everything between: a change of the
//! source's memory, the gather, the wire and the scatter.
//!
//! Blocks that travel in the common order ([`baton_kernels::Sliced`]) have checksums of their own, made when they are put
//! together ([`Made`]), over the bytes in that order; and each is spoilt where the memory that they were read from does not
//! match the checksum made when the hold was taken. So these cover the same. Where such blocks are packed, theirs are of the
//! packed bytes: they say that what was unpacked is what the holder packed, of the very bytes that were held. What packing
//! changes they cannot say, nor are they ever compared with those of the bytes before it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use baton_kernels::{BlockMemory, Guard, MemoryError};
use bytes::Bytes;
use tokio::sync::Notify;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// Blocks that a device is asked about at once; a pull waits for so many at most.
const AT_ONCE: usize = 64;

/// Between two looks for a free buffer, and how often one is looked for: 5 s.
const BUFFER_POLL: Duration = Duration::from_millis(1);
const BUFFER_POLLS: u32 = 5000;

/// The checksums of a hold's blocks as they become known. A pull may begin while they are being made, or while the blocks
/// themselves are being computed: it waits for the checksum of each block before it reads the block.
#[derive(Debug)]
pub struct Checksums {
    values: Box<[OnceLock<u64>]>,
    abandoned: AtomicBool,
    progress: Notify,
}

/// A rank whose blocks others are made of.
#[derive(Clone)]
pub struct Part {
    /// Where they lie.
    pub memory: Arc<dyn BlockMemory>,
    /// Made when they were held.
    pub checksums: Arc<Checksums>,
    /// Index in `checksums` of the first block in question.
    pub first_block: usize,
}

impl Checksums {
    /// For a hold of this many blocks; none is known yet.
    pub fn pending(blocks: usize) -> Arc<Self> {
        Arc::new(Self {
            values: (0..blocks).map(|_| OnceLock::new()).collect(),
            abandoned: AtomicBool::new(false),
            progress: Notify::new(),
        })
    }

    /// Makes those of blocks that are computed, `first` of the hold and the ones behind it, from a worker's memory: 0.1 s or
    /// less for each GiB; call it where blocking is fine, once for each block, and hand it the guard of the hold, so that the
    /// blocks stay. On an error nobody waits for the rest any more: pulls of these blocks end with `internal`.
    pub fn make(
        &self,
        memory: &Arc<dyn BlockMemory>,
        first: usize,
        block_ids: &[u32],
        guard: &Guard,
    ) -> Result<(), MemoryError> {
        let mut next = first..;
        let mut set = |checksum| next.by_ref().take(1).for_each(|block| self.set(block, checksum));
        let made = block_ids.chunks(AT_ONCE).try_for_each(|blocks| match memory.checksums(blocks) {
            Some(checksums) => {
                checksums?.into_iter().for_each(&mut set);
                Ok(())
            }
            None => blocks.iter().try_for_each(|block| {
                set(of_block(memory, *block, guard)?);
                Ok(())
            }),
        });
        if made.is_err() {
            self.abandon();
        }
        made
    }

    /// Blocks.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are no blocks.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The checksum of a block is known; the first one counts. That of a block which is none of the hold's is ignored.
    pub fn set(&self, block: usize, checksum: u64) {
        if self.values.get(block).is_some_and(|value| value.set(checksum).is_ok()) {
            self.progress.notify_waiters();
        }
    }

    /// Says that the rest will not be made.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::Release);
        self.progress.notify_waiters();
    }

    /// The checksum of a block, where it is known.
    pub fn get(&self, block: usize) -> Option<u64> {
        self.values.get(block)?.get().copied()
    }

    /// The checksum of a block, once it is known; `None` where it will not be made.
    ///
    /// # Cancel safety
    /// Safe to drop.
    pub async fn wait(&self, block: usize) -> Option<u64> {
        loop {
            let progress = self.progress.notified();
            tokio::pin!(progress);
            progress.as_mut().enable();
            if let Some(checksum) = self.get(block) {
                return Some(checksum);
            }
            if block >= self.values.len() || self.abandoned.load(Ordering::Acquire) {
                return None;
            }
            progress.await;
        }
    }
}

/// The bytes of a block as they are in memory now. Waits where the memory has no buffer free: call it where blocking is fine.
fn read(memory: &Arc<dyn BlockMemory>, block: u32, guard: &Guard) -> Result<Vec<Bytes>, MemoryError> {
    let mut tries = 0;
    loop {
        match memory.clone().read(block, guard.clone()) {
            Err(MemoryError::NoBuffer) if tries < BUFFER_POLLS => {
                tries += 1;
                std::thread::sleep(BUFFER_POLL);
            }
            read => return read,
        }
    }
}

fn of_pieces(pieces: &[Bytes]) -> u64 {
    let mut hasher = Xxh3::new();
    pieces.iter().for_each(|piece| hasher.update(piece));
    hasher.digest()
}

/// The checksum of a block as it is in memory now, made on the CPU. Waits where the memory has no buffer free: call it
/// where blocking is fine.
pub fn of_block(memory: &Arc<dyn BlockMemory>, block: u32, guard: &Guard) -> Result<u64, MemoryError> {
    Ok(of_pieces(&read(memory, block, guard)?))
}

/// A block that was put together for the wire.
pub struct Made {
    /// Its bytes, in order.
    pub pieces: Vec<Bytes>,
    /// Theirs, where they were read from what was held; else another number.
    pub checksum: u64,
}

impl Made {
    /// Reads `block` from `view`, and what `view` is made of. `held` is that of the parts when they were held, joined by
    /// exclusive or. Call it where blocking is fine: some milliseconds.
    pub(crate) fn read(
        view: &Arc<dyn BlockMemory>,
        parts: &[Part],
        block: u32,
        held: u64,
        guard: &Guard,
    ) -> Result<Self, MemoryError> {
        // The parts last: what they are then, they were when the view was read.
        let pieces = read(view, block, guard)?;
        let part = |part: &Part| match part.memory.checksums(&[block]) {
            Some(checksums) => Ok(checksums?.into_iter().fold(0, |a, b| a ^ b)),
            None => of_block(&part.memory, block, guard),
        };
        let are = parts.iter().try_fold(0, |joined, of| Ok::<_, MemoryError>(joined ^ part(of)?))?;
        // Equal where every part is what was held; the block does not match its checksum where one is not.
        let checksum = of_pieces(&pieces) ^ are ^ held;
        Ok(Self { pieces, checksum })
    }
}

/// The digest of a run of blocks, from their checksums in order: XXH3-128 over them, 64-bit little-endian each.
pub fn digest(checksums: &[u64]) -> u128 {
    let bytes: Vec<u8> = checksums.iter().flat_map(|checksum| checksum.to_le_bytes()).collect();
    xxh3_128(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waiters_get_each_checksum_once_made_and_none_once_abandoned() {
        let checksums = Checksums::pending(3);
        let waiter = tokio::spawn({
            let checksums = checksums.clone();
            async move { (checksums.wait(1).await, checksums.wait(2).await, checksums.wait(3).await) }
        });
        for (block, checksum) in [7, 8].into_iter().enumerate() {
            tokio::task::yield_now().await;
            checksums.set(block, checksum);
        }
        tokio::task::yield_now().await;
        checksums.abandon();
        assert_eq!(waiter.await.unwrap(), (Some(8), None, None));
        assert_eq!((checksums.get(0), checksums.get(2)), (Some(7), None));
    }

    #[test]
    fn the_digest_depends_on_the_order() {
        assert_ne!(digest(&[1, 2]), digest(&[2, 1]));
    }
}
