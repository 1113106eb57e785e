//! Memories of peers on this host that are open here.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use baton_kernels::{BlockMemory, PeerMemory};
use baton_proto::wire::{Direct, ErrorCode, Frame, NearReply, PullHeader, Purpose};
use baton_proto::{EngineId, Epoch};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::PATIENCE;
use super::pull::Failed;
use super::socket::{self, NotGiven};

/// Most memories that are open at a time: the ranks of all engines of a host.
const MAX_OPEN: usize = 256;

/// Between two looks whether the engine is still there for which a memory was opened.
const LOOK: Duration = Duration::from_secs(10);

/// One rank's memory in one life of its engine.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    engine_id: EngineId,
    epoch: Epoch,
    rank: u32,
}

struct Mapping {
    memory: Arc<PeerMemory>,
    /// Whose GPU it was opened on.
    opened_for: Weak<dyn BlockMemory>,
}

/// See the module. Locked while one is opened, so that pulls that come meanwhile share it.
#[derive(Clone, Default)]
pub(crate) struct Mappings(Arc<Mutex<HashMap<Key, Mapping>>>);

impl Mappings {
    /// The memory from which this pull's blocks are to be copied.
    ///
    /// # Cancel safety
    /// Safe to drop.
    pub(super) async fn get(
        &self,
        engine_id: &EngineId,
        near: &NearReply,
        pull: PullHeader,
        ours: &Arc<dyn BlockMemory>,
    ) -> Result<Arc<PeerMemory>, Failed> {
        let key = Key { engine_id: engine_id.clone(), epoch: pull.epoch, rank: pull.rank };
        let opened_for = Arc::downgrade(ours);
        let mut open = self.0.lock().await;
        if let Some(mapping) = open.get(&key).filter(|mapping| mapping.opened_for.ptr_eq(&opened_for)) {
            return Ok(mapping.memory.clone());
        }
        if open.len() >= MAX_OPEN {
            return Err(Failed::way(format!("{MAX_OPEN} memories are open already")));
        }
        let opening = timeout(PATIENCE, self.open(near, pull, ours));
        let (memory, stream) = opening.await.unwrap_or_else(|_| Err(Failed::way("no answer")))?;
        open.insert(key.clone(), Mapping { memory: memory.clone(), opened_for });
        tokio::spawn(self.clone().keep(key, Arc::downgrade(&memory), stream));
        Ok(memory)
    }

    async fn open(
        &self,
        near: &NearReply,
        pull: PullHeader,
        ours: &Arc<dyn BlockMemory>,
    ) -> Result<(Arc<PeerMemory>, UnixStream), Failed> {
        let mut stream = socket::connect(&near.name).map_err(Failed::way)?;
        let direct = Frame::Direct(Direct { token: near.token, purpose: Purpose::Map }).encode();
        let hello = [direct.as_ref(), Frame::Pull(pull).encode().as_ref()].concat();
        stream.write_all(&hello).await.map_err(Failed::way)?;
        let shared = socket::take(&stream).await.map_err(|not| match not {
            NotGiven::Refused(error) => Failed::refused(error),
            NotGiven::Failed(error) => Failed::way(error),
        })?;
        let ours = ours.clone();
        let opened = tokio::task::spawn_blocking(move || ours.open_peer(shared)).await;
        let memory = opened.map_err(Failed::way)?.map_err(Failed::way)?;
        Ok((Arc::new(memory), stream))
    }

    /// Forgets a memory when its holder does not share it any more, or nobody is there any more for whom it was opened.
    async fn keep(self, key: Key, memory: Weak<PeerMemory>, mut stream: UnixStream) {
        // The holder says nothing more: the end is all that comes.
        while timeout(LOOK, stream.read(&mut [0; 1])).await.is_err() {
            let open = self.0.lock().await;
            let is_it = |mapping: &&Mapping| Arc::downgrade(&mapping.memory).ptr_eq(&memory);
            if open.get(&key).filter(is_it).is_none_or(|mapping| mapping.opened_for.strong_count() == 0) {
                break;
            }
        }
        let mut open = self.0.lock().await;
        if open.get(&key).is_some_and(|mapping| Arc::downgrade(&mapping.memory).ptr_eq(&memory)) {
            open.remove(&key);
        }
    }
}

/// Whether a refusal is the hold's own, which no other way to it would change.
pub(super) fn is_final(code: ErrorCode) -> bool {
    use ErrorCode::{
        ContentMismatch, Deadline, LayoutMismatch, LeaseExpired, Range, Released, StaleEpoch, UnknownTransfer,
    };
    matches!(
        code,
        ContentMismatch
            | Deadline
            | LayoutMismatch
            | LeaseExpired
            | Range
            | Released
            | StaleEpoch
            | UnknownTransfer
    )
}
