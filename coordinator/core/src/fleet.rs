//! The engines as one decision sees them.

use std::sync::Arc;

use baton_proto::{EngineId, Epoch};

use crate::kv_index::Slot;
use crate::links::Links;
use crate::load::Reserved;
use crate::speed::Speed;

/// What an operator wants an engine to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Both parts of a request, and either part of a handoff.
    Both,
    /// The first part of a handoff; whole requests only where no other engine is left.
    Prefill,
    /// The second part of a handoff, and whole requests where that is cheaper.
    Decode,
}

impl Role {
    /// Whether it takes the first part of a handoff.
    pub fn prefills(self) -> bool {
        matches!(self, Role::Both | Role::Prefill)
    }

    /// Whether it takes the second part of a handoff.
    pub fn decodes(self) -> bool {
        matches!(self, Role::Both | Role::Decode)
    }
}

/// What is fixed while an engine's registration stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineInfo {
    /// Its stand-in in the index and the links.
    pub slot: Slot,
    /// Its name.
    pub id: EngineId,
    /// Its present life.
    pub epoch: Epoch,
    /// Names under which it serves its model; the first is the namespace of its block hashes.
    pub models: Vec<String>,
    /// What it is for.
    pub role: Role,
    /// Tokens in a block; at least 1.
    pub block_size: u32,
    /// Bytes of a block over all layers and ranks; 0 where not known.
    pub block_bytes: u64,
    /// Equal on engines that can use each other's blocks; empty where not known.
    pub layout: String,
}

/// One engine.
#[derive(Clone, Debug)]
pub struct Engine {
    /// What is fixed.
    pub info: Arc<EngineInfo>,
    /// Whether its agent was heard from within the lease.
    pub healthy: bool,
    /// Whether it can hold and pull: its connector is attached and its agent's session is up.
    pub can_transfer: bool,
    /// How fast it is.
    pub speed: Speed,
    /// What was dispatched to it.
    pub reserved: Reserved,
    /// Requests that wait on the engine and are not ours, by its own report.
    pub foreign_waiting: u32,
    /// Sequences that run on the engine and are not ours, by its own report.
    pub foreign_running: u32,
}

impl Engine {
    /// Whether it serves a model under this name.
    pub fn serves(&self, model: &str) -> bool {
        self.info.models.iter().any(|name| name == model)
    }

    /// Sequences that decode on it, as far as known.
    pub fn sequences(&self) -> u64 {
        self.reserved.sequences + u64::from(self.foreign_running)
    }
}

/// All engines, in order of their names.
#[derive(Clone, Debug, Default)]
pub struct Fleet {
    engines: Vec<Engine>,
    /// The links between them.
    pub links: Links,
}

impl Fleet {
    /// A fleet of these engines.
    pub fn new(mut engines: Vec<Engine>, links: Links) -> Self {
        engines.sort_by(|a, b| a.info.id.cmp(&b.info.id));
        Self { engines, links }
    }

    /// The engines, in order of their names.
    pub fn engines(&self) -> &[Engine] {
        &self.engines
    }
}
