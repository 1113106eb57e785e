//! What all parts of the coordinator share, and the few operations that touch more than one of them.

use std::sync::{Arc, Mutex, RwLock};

use baton_coordinator_core::cost::Term;
use baton_coordinator_core::fleet::{Fleet, Role};
use baton_coordinator_core::kv_index::{Holder, IndexError, KvIndex, Limits, Run, Slot, Tier, Tiers};
use baton_coordinator_core::links::Links;
use baton_coordinator_core::placement::Policy;
use baton_coordinator_core::planner::Parts;
use baton_proto::control::{FieldError, unpack_hashes, unpack_parent, v1};
use baton_proto::{BlockHash, EngineId, Epoch};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::decisions::Decisions;
use crate::dispatch::WaitingRoom;
use crate::metrics::Metrics;
use crate::ownership::Ownership;
use crate::registry::{BatchOrder, Entry, Lapse, RegisterError, Registered, Registration, Registry};
use crate::tokenizer::Models;

const POISON: &str = "no code that holds this lock panics";

/// The coordinator.
pub struct Coordinator {
    /// As configured.
    pub config: Config,
    /// What `/metrics` shows.
    pub metrics: Metrics,
    /// The engines.
    pub registry: Registry,
    /// Their blocks.
    pub index: KvIndex,
    /// What outlives this process.
    pub ownership: Ownership,
    /// The models' tokenizers.
    pub models: Models,
    /// What decisions leave behind.
    pub decisions: Decisions,
    /// Requests that wait for room.
    pub waiting: Arc<WaitingRoom>,
    /// A permit for each request in flight.
    pub requests: Arc<Semaphore>,
    links: RwLock<Links>,
    /// As it was last seen.
    fleet: Mutex<Arc<Fleet>>,
    /// What engines were given to do last.
    parts: RwLock<Parts>,
}

/// A batch that cannot be applied; the session ends.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// It belongs to another life of the engine.
    #[error("events of epoch {given}, but the session registered epoch {registered}")]
    OtherEpoch {
        /// The batch's.
        given: u64,
        /// The session's.
        registered: u64,
    },
    /// Its hashes are torn.
    #[error("events: {0}")]
    Field(#[from] FieldError),
    /// It names a cache group that the engine did not register.
    #[error("events: group {0}: not registered")]
    Group(u32),
}

/// What a batch led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ingested {
    /// Batches up to this one are applied.
    Upto(u64),
    /// Some are missing: ask for all.
    AskAll,
    /// Some are missing, and were asked for.
    Waiting,
}

/// A change of a batch, with its hashes unpacked.
enum BlockChange {
    /// Of a cache group. Each block follows the one before it, the first this one.
    Stored(u16, Tiers, Option<BlockHash>, Vec<BlockHash>),
    Removed(u16, Tiers, Vec<BlockHash>),
    Cleared,
}

impl Coordinator {
    /// A coordinator without engines.
    pub fn new(config: Config, tls: rustls::ClientConfig, ownership: Ownership, models: Models) -> Self {
        Self {
            metrics: Metrics::new(),
            registry: Registry::new(config.limits.max_engines, tls),
            index: KvIndex::new(Limits::of(config.limits.index_max_blocks), rand::random()),
            ownership,
            models,
            requests: Arc::new(Semaphore::new(config.limits.max_requests)),
            links: RwLock::default(),
            fleet: Mutex::default(),
            parts: RwLock::default(),
            decisions: Decisions::new(&config.limits),
            waiting: Arc::new(WaitingRoom::new(config.limits.max_waiting)),
            config,
        }
    }

    /// The fleet as a decision of this policy sees it.
    pub fn fleet(&self, policy: &dyn Policy) -> Arc<Fleet> {
        let links = self.links.read().expect(POISON).clone();
        let mut engines = self.registry.snapshot(Instant::now());
        if policy.gives_parts() {
            self.parts.read().expect(POISON).give(&mut engines);
        }
        let mut last = self.fleet.lock().expect(POISON);
        let fleet = Arc::new(last.renewed(engines, links));
        *last = fleet.clone();
        fleet
    }

    /// Plans anew what engines are to do. Takes some ten milliseconds where there is much to plan.
    pub fn plan(&self) {
        let links = self.links.read().expect(POISON).clone();
        let fleet = Fleet::new(self.registry.snapshot(Instant::now()), links);
        let parts = self.decisions.plan(&fleet);
        let decoding = parts.decoding();
        let mut last = self.parts.write().expect(POISON);
        if *last != parts {
            info!(decode_only = decoding, engines = fleet.engines().len(), "engines have new parts");
            *last = parts;
        }
        drop(last);
        self.metrics.engines_decode_only.set(decoding as i64);
    }

    /// What an engine was given to do for the time being, if anything.
    pub fn part(&self, slot: Slot) -> Option<Role> {
        self.parts.read().expect(POISON).of(slot)
    }

    /// A term of a cost was predicted, and then seen, in seconds.
    pub fn seen(&self, term: Term, predicted: f64, seen: f64) {
        self.metrics.predicted(term, &self.decisions.seen(term, predicted, seen));
    }

    /// The links learn on which host an engine runs.
    fn place(&self, entry: &Entry) {
        self.links.write().expect(POISON).place(entry.slot, entry.registration().host());
    }

    /// As when they were stored: engines whose agents have not come back yet are in the fleet too.
    pub fn restored(&self) {
        self.registry.entries().iter().for_each(|entry| self.place(entry));
    }

    /// Takes a session in.
    pub fn register(
        &self,
        registration: Registration,
        commands: tokio::sync::mpsc::Sender<v1::coordinator_message::Message>,
    ) -> Result<Registered, RegisterError> {
        let (epoch, known) = (registration.epoch, self.registry.get(&registration.engine_id).is_some());
        let groups = registration.groups.clone();
        let registered = self.registry.register(registration, commands, Instant::now())?;
        let entry = &registered.entry;
        self.place(entry);
        let mut opened = self.index.open_groups(entry.slot, epoch, &groups);
        if registered.emptied && opened.is_ok() {
            opened = self.index.clear(entry.slot, epoch);
        }
        if let Err(error) = opened {
            // Its events will be refused, and it is placed by load.
            error!(engine = %entry.id, %error, "not indexed");
        }
        if registered.emptied && known {
            self.ownership.mark_all(entry);
        } else {
            self.ownership.mark(entry, []);
        }
        self.count();
        Ok(registered)
    }

    /// Applies a batch, if it is the next one.
    pub fn ingest(&self, entry: &Entry, epoch: u64, batch: &v1::EventBatch) -> Result<Ingested, BatchError> {
        if batch.epoch != epoch {
            return Err(BatchError::OtherEpoch { given: batch.epoch, registered: epoch });
        }
        let changes = unpack(&batch.events)?;
        let whole = matches!(changes.first(), Some(BlockChange::Cleared));
        match entry.order(batch.seq, whole) {
            BatchOrder::Next => {}
            BatchOrder::Seen(applied) => {
                self.metrics.batches_repeated.inc();
                return Ok(Ingested::Upto(applied));
            }
            BatchOrder::Gap { ask } => {
                self.metrics.batches_gap.inc();
                return Ok(if ask { Ingested::AskAll } else { Ingested::Waiting });
            }
        }
        let epoch = Epoch(epoch);
        for change in &changes {
            if let Err(error) = self.apply(entry, epoch, change) {
                if let IndexError::NoGroup { group, .. } = error {
                    return Err(BatchError::Group(group.into()));
                }
                // A newer session took the engine to its next epoch meanwhile; this one is about to end.
                return Ok(Ingested::Waiting);
            }
        }
        self.metrics.index_blocks.set(self.index.memberships() as i64);
        self.metrics.index_dropped.set(self.index.dropped() as i64);
        entry.applied(batch.seq);
        for change in &changes {
            match change {
                BlockChange::Stored(_, _, _, hashes) | BlockChange::Removed(_, _, hashes) => {
                    self.ownership.mark(entry, hashes);
                }
                BlockChange::Cleared => self.ownership.mark_all(entry),
            }
        }
        self.metrics.batches_applied.inc();
        Ok(Ingested::Upto(batch.seq))
    }

    fn apply(&self, entry: &Entry, epoch: Epoch, change: &BlockChange) -> Result<(), IndexError> {
        let holder = Holder::new(entry.slot, epoch);
        match change {
            BlockChange::Stored(group, tiers, parent, hashes) => {
                self.index.store(holder.group(*group), *tiers, Run::chain(*parent, hashes)).map(drop)
            }
            BlockChange::Removed(group, tiers, hashes) => {
                self.index.remove(holder.group(*group), *tiers, hashes)
            }
            BlockChange::Cleared => self.index.clear(entry.slot, epoch),
        }
    }

    /// Takes a measurement of the link from `source` to the engine.
    pub fn link_sample(&self, entry: &Entry, sample: &v1::LinkSample) {
        let source = sample.source.parse::<EngineId>().ok().and_then(|id| self.registry.get(&id));
        if let Some(source) = source {
            let mut links = self.links.write().expect(POISON);
            let (now, link) = (self.decisions.now_seconds(), (source.slot, entry.slot));
            if sample.given_up {
                links.observe_given_up(now, link, sample.bytes, sample.seconds);
                return self.registry.doubted(source.slot, entry.slot);
            }
            let predicted = links.alone(source.slot, entry.slot, sample.bytes);
            self.seen(Term::Transfer, predicted, sample.seconds);
            links.observe(now, link, sample.bytes, sample.seconds, sample.rtt_seconds);
            self.registry.measured(source.slot, entry.slot, Instant::now());
        }
    }

    /// Lets time pass: what was expected and did not come is forgotten, leases lapse, engines that were gone for long are dropped.
    pub fn expire(&self, now: Instant) {
        self.index.expire(self.decisions.tick());
        let limits = &self.config.limits;
        for lapse in self.registry.expire(now, limits.lease(), limits.forget_after()) {
            match lapse {
                Lapse::Unhealthy(entry) => {
                    warn!(engine = %entry.id, "lease ran out: not placed any more");
                }
                Lapse::Forgotten(entry) => {
                    info!(engine = %entry.id, "gone for long: what it owned is dropped");
                    self.index.forget(entry.slot);
                    self.links.write().expect(POISON).forget(entry.slot);
                    self.decisions.forget(entry.slot);
                    self.ownership.erase(&entry.id);
                    self.registry.free(entry.slot);
                }
            }
        }
        self.count();
    }

    /// Whether every configured model has a healthy engine; else the first that has none.
    pub fn ready(&self) -> Result<(), &str> {
        let engines = self.registry.snapshot(Instant::now());
        let served = |model: &str| engines.iter().any(|engine| engine.healthy && engine.serves(model));
        match self.config.models.iter().find(|model| !served(&model.name)) {
            Some(model) => Err(&model.name),
            None => Ok(()),
        }
    }

    fn count(&self) {
        let entries: Vec<Arc<Entry>> = self.registry.entries();
        let healthy = entries.iter().filter(|entry| entry.healthy()).count();
        self.metrics.engines_healthy.set(healthy as i64);
        self.metrics.engines_unhealthy.set((entries.len() - healthy) as i64);
        self.metrics.index_blocks.set(self.index.memberships() as i64);
    }
}

fn unpack(events: &[v1::KvEvent]) -> Result<Vec<BlockChange>, BatchError> {
    use v1::kv_event::Event;

    let mut changes = Vec::with_capacity(events.len());
    for event in events {
        changes.push(match &event.event {
            Some(Event::Stored(stored)) => {
                let tier = tier(stored.tier()).unwrap_or(Tier::Gpu);
                let parent = unpack_parent(&stored.parent)?;
                let hashes = unpack_hashes(&stored.hashes)?.collect();
                BlockChange::Stored(group(stored.group)?, tier.into(), parent, hashes)
            }
            Some(Event::Removed(removed)) => {
                // Without a tier: from all of them.
                let tiers = tier(removed.tier()).map_or(Tiers::from_bits(u8::MAX), Tiers::from);
                let hashes = unpack_hashes(&removed.hashes)?.collect();
                BlockChange::Removed(group(removed.group)?, tiers, hashes)
            }
            Some(Event::Cleared(_)) => BlockChange::Cleared,
            // An event of a later version of the protocol.
            None => continue,
        });
    }
    Ok(changes)
}

fn group(group: u32) -> Result<u16, BatchError> {
    group.try_into().map_err(|_| BatchError::Group(group))
}

fn tier(tier: v1::Tier) -> Option<Tier> {
    match tier {
        v1::Tier::Unspecified => None,
        v1::Tier::Gpu => Some(Tier::Gpu),
        v1::Tier::Host => Some(Tier::Host),
        v1::Tier::Disk => Some(Tier::Disk),
    }
}
