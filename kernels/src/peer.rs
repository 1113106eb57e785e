//! Memory of another engine on this host, which this process copies from without anybody's help.
//!
//! The holder's agent gives its mapping away to be *read*: descriptors that are open for reading only, or a GPU's IPC
//! handles. What a reader may rely on is what an agent relies on with its own engine's memory (see [`crate::memory`]):
//! held blocks do not change, and where they do all the same, the bytes are wrong and a checksum says so; a file that is
//! truncated below its mapped length ends this process by SIGBUS. Nothing keeps the holder from releasing a block below a
//! copy but the word that it is under way: see `baton_kv_transfer::direct`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use baton_proto::connector::Layout;
use baton_proto::wire::{SharedMemory, SharedStorages};
use rustix::fs::{Mode, OFlags, open};

use crate::bounds::{self, LayoutError, Run};
use crate::cuda::peer::PeerGpu;
use crate::memory::MemoryError;
use crate::storage::{Access, Storage};

/// Most storages of a memory that is shared: as many descriptors as one message takes.
pub const MAX_SHARED_FILES: usize = 253;

/// A memory as it is given away.
#[derive(Debug)]
pub struct Shared {
    /// What it is.
    pub memory: SharedMemory,
    /// Its files, in order; none for memory of a GPU.
    pub files: Vec<OwnedFd>,
}

/// A memory of another engine on this host, open to be copied from.
pub struct PeerMemory(pub(crate) Peer);

pub(crate) enum Peer {
    Files(PeerFiles),
    Gpu(Arc<PeerGpu>),
}

impl std::fmt::Debug for PeerMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.0 {
            Peer::Files(_) => "PeerMemory(files)",
            Peer::Gpu(_) => "PeerMemory(gpu)",
        })
    }
}

/// The same file, for reading only.
pub(crate) fn for_reading(file: &OwnedFd) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Files of shared memory.
pub(crate) struct PeerFiles {
    storages: Vec<Storage>,
    runs: Vec<Run>,
    num_blocks: u64,
}

impl PeerFiles {
    /// Maps the files, and checks the layout against them and against blocks of `block_bytes` bytes. Pages are touched
    /// when they are read.
    pub(crate) fn open(shared: Shared, block_bytes: usize) -> Result<Self, MemoryError> {
        let Shared { memory: SharedMemory { num_blocks, pieces, storages }, files } = shared;
        let SharedStorages::Files(lens) = storages else { return Err(MemoryError::NotShared) };
        if lens.len() != files.len() {
            return Err(MemoryError::NotShared);
        }
        let layout = Layout { pieces, ..Layout::default() };
        let (runs, bytes) = bounds::check(&layout, &lens, num_blocks)?;
        if bytes != block_bytes {
            return Err(LayoutError::BlockBytes.into());
        }
        let map = |(index, (file, len))| {
            Storage::map(file, len, Access::Read).map_err(|error| MemoryError::Map { index, error })
        };
        let storages = files.into_iter().zip(lens).enumerate().map(map).collect::<Result<_, _>>()?;
        Ok(Self { storages, runs, num_blocks })
    }

    /// Where the bytes of a block lie: addresses and lengths, in order. They stay mapped for as long as `self` lives,
    /// and are never written here.
    pub(crate) fn pieces(
        &self,
        block: u32,
    ) -> Result<impl Iterator<Item = (NonNull<u8>, usize)> + '_, MemoryError> {
        if u64::from(block) >= self.num_blocks {
            return Err(MemoryError::Block { block, num_blocks: self.num_blocks });
        }
        let block = block as usize;
        Ok(self
            .runs
            .iter()
            .map(move |run| (self.storages[run.storage].at(run.offset + block * run.stride), run.len)))
    }
}
