//! Engines for tests.

use std::sync::Arc;

use baton_proto::Epoch;

use super::*;
use crate::fleet::{Engine, EngineInfo, Role};
use crate::links::Links;
use crate::speed::Speed;

pub(crate) fn engine(n: u32) -> Engine {
    Engine {
        info: Arc::new(EngineInfo {
            slot: Slot(n),
            id: format!("e{n:04}").parse().unwrap(),
            epoch: Epoch(1),
            host: String::new(),
            models: vec!["m".into()],
            role: Role::Both,
            block_size: 16,
            block_bytes: 100_000,
            wire_block_bytes: 100_000,
            num_blocks: 0,
            layout: "l".into(),
            chunk_tokens: 0,
            can_pull_cached: false,
        }),
        healthy: true,
        can_transfer: true,
        speed: Speed::default(),
        load: Arc::default(),
        foreign_waiting: 0,
        foreign_running: 0,
        kv_beyond: 0.0,
        prefill_share: 0.0,
        part: None,
        answer_tokens: None,
        reused: None,
    }
}

/// The engine with its fixed part changed.
pub(crate) fn with(mut engine: Engine, change: impl FnOnce(&mut EngineInfo)) -> Engine {
    change(Arc::make_mut(&mut engine.info));
    engine
}

pub(crate) fn fleet(n: u32) -> Fleet {
    Fleet::new((0..n).map(engine).collect(), Links::default())
}

pub(crate) fn request(overlaps: &Overlaps) -> Request<'_> {
    Request::new("m", 3000, overlaps)
}
