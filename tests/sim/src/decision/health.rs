//! Engines that die and come back, as a coordinator hears of it.
//!
//! An agent outlives its engine. It says at once that the engine's life is over: a new epoch begins, in which nothing is cached, and what was learnt of
//! the engine's speed is forgotten. Then its session ends, and when it was not heard from for a lease the engine is not placed on any more; until then a request
//! may be sent to it, whose connection is refused, and for some seconds no other one is. After another while what is known of its links and its sessions goes. When
//! the engine is back, its agent registers it, at another epoch.

use std::sync::Arc;

use baton_coordinator_core::fleet as core;
use baton_coordinator_core::kv_index::Slot;
use baton_coordinator_core::speed::SpeedEstimate;
use baton_proto::Epoch;

use super::{Member, Production, Speeds};
use crate::sim::Health;
use crate::{Nanos, SECOND};

/// These are a coordinator's, by default: how long its agent may be silent,
const LEASE: Nanos = 5 * SECOND;
/// how long after that the engine is remembered,
const FORGET_AFTER: Nanos = 60 * SECOND;
/// and for how long nothing is sent to an engine that refused a connection.
const SUSPICION: Nanos = 2 * SECOND;

/// Whether an engine lives.
#[derive(Debug)]
pub(super) struct Life {
    pub(super) epoch: Epoch,
    /// When it died, while it is away.
    died: Option<Nanos>,
    is_forgotten: bool,
    suspect_until: Nanos,
}

impl Default for Life {
    fn default() -> Self {
        Self { epoch: Epoch(1), died: None, is_forgotten: false, suspect_until: 0 }
    }
}

impl Life {
    /// Whether its agent's session is up.
    pub(super) fn is_there(&self) -> bool {
        self.died.is_none()
    }

    /// Whether requests are sent to it.
    fn is_healthy(&self, now: Nanos) -> bool {
        self.suspect_until <= now && self.died.is_none_or(|died| now < died + LEASE)
    }

    /// When that, or what is remembered, changes by itself.
    fn changes(&self, now: Nanos) -> Option<Nanos> {
        let lapses = self.died.map(|died| died + LEASE);
        let forgotten = lapses.map(|lapses| lapses + FORGET_AFTER);
        [Some(self.suspect_until), lapses, forgotten].into_iter().flatten().filter(|at| *at > now).min()
    }
}

impl Production {
    /// Something is heard of an engine.
    pub(super) fn heard(&mut self, now: Nanos, engine: u32, health: Health) {
        let member = &mut self.members[engine as usize];
        match health {
            Health::Refused => member.life.suspect_until = now + SUSPICION,
            Health::Died | Health::Back => {
                let epoch = Epoch(member.life.epoch.0 + 1);
                let died = (health == Health::Died).then_some(now);
                member.life = Life { epoch, died, ..Life::default() };
                member.info = Arc::new(core::EngineInfo { epoch, ..(*member.info).clone() });
                member.estimate = SpeedEstimate::default();
                self.index.open(Slot(engine), epoch).expect("it was open");
            }
        }
        self.renew(now);
    }

    /// What was learnt goes into the fleet that decisions see.
    pub(super) fn renew(&mut self, now: Nanos) {
        for member in &mut self.members {
            let life = &mut member.life;
            if life.died.is_some_and(|died| now >= died + LEASE + FORGET_AFTER) && !life.is_forgotten {
                life.is_forgotten = true;
                self.links.forget(member.info.slot);
                self.links.place(member.info.slot, &member.info.host);
                self.sessions.forget(member.info.slot);
            }
        }
        let engine = |member: &Member| core::Engine {
            info: Arc::clone(&member.info),
            healthy: member.life.is_healthy(now),
            can_transfer: member.life.is_there(),
            speed: match self.speeds {
                Speeds::Learned => member.estimate.speed(),
                Speeds::Known => member.known,
            },
            load: Arc::clone(&member.load),
            foreign_waiting: member.foreign_waiting,
            foreign_running: member.foreign_running,
            kv_beyond: member.kv_beyond,
            prefill_share: member.prefill_share,
            part: None,
            answer_tokens: member.estimate.answer_tokens(),
            reused: member.estimate.reused(),
        };
        let mut engines: Vec<core::Engine> = self.members.iter().map(engine).collect();
        self.parts.give(&mut engines);
        self.fleet = self.fleet.renewed(engines, self.links.clone());
        let changes = self.members.iter().filter_map(|member| member.life.changes(now));
        self.health_changes = changes.min().unwrap_or(Nanos::MAX);
    }

    /// The first part of a request failed: the engine that answers computes all of it.
    pub(super) fn fell_back(&mut self, key: u32) {
        let Some(live) = self.live.get_mut(key as usize).and_then(Option::as_mut) else { return };
        let engine = live.plan.decode() as usize;
        let seconds = self.fleet.engines()[engine].speed.prefill_seconds(live.prompt_tokens, 0);
        (live.fell_back, live.hold, live.transfer) = (true, None, None);
        live.decode.sent();
        live.prefill = Some(self.members[engine].load.reserve_prefill(live.prompt_tokens, seconds));
    }
}
