//! The engines of the fleet: who is registered, who is alive, what each said last.
//!
//! An engine enters with its agent's Register message, or from the store when the coordinator starts. Its agent's lease
//! keeps it healthy. A lapsed lease takes it out of placement at once, and what it owned is dropped some time later.

mod probing;
mod registration;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use baton_coordinator_core::fleet::{Engine, EngineInfo};
use baton_coordinator_core::kv_index::Slot;
use baton_coordinator_core::load::{EngineLoad, PrefillShare};
use baton_coordinator_core::speed::SpeedEstimate;
use baton_proto::control::v1;
use baton_proto::control::v1::coordinator_message::Message as Command;
use baton_proto::plan::Held;
use baton_proto::{EngineId, Epoch, TransferId};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::probing::{Candidate, Probing};
#[cfg(test)]
pub(crate) use self::registration::testing;
pub use self::registration::{EngineUrl, MAX_GROUPS, Registration, RegistrationError};
use crate::dispatch::Upstream;

/// Commands that may wait for a session's stream.
pub const COMMAND_QUEUE: usize = 256;
/// An engine that refused a connection is not tried for so long.
const SUSPICION: Duration = Duration::from_secs(2);

/// A registration that comes too late or one too many.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RegisterError {
    /// A newer life of the engine is known.
    #[error("engine {id} is at epoch {known}, epoch {given} is over")]
    OldEpoch {
        /// The engine.
        id: EngineId,
        /// What it is at.
        known: Epoch,
        /// What came.
        given: Epoch,
    },
    /// The fleet is full.
    #[error("the fleet has its {0} engines: raise limits.max_engines")]
    Full(u32),
}

/// One engine.
#[derive(Debug)]
pub struct Entry {
    /// Its name.
    pub id: EngineId,
    /// Its place in the index.
    pub slot: Slot,
    /// What was dispatched to it.
    pub load: Arc<EngineLoad>,
    speed: Mutex<SpeedEstimate>,
    /// Brought up to date with each load report.
    prefill_share: Mutex<(PrefillShare, f64)>,
    since: Instant,
    /// Who waits to hear that blocks are held.
    awaited: Mutex<BTreeMap<TransferId, oneshot::Sender<Held>>>,
    live: RwLock<Live>,
}

#[derive(Debug)]
struct Live {
    registration: Arc<Registration>,
    info: Arc<EngineInfo>,
    upstream: Upstream,
    session: Option<Session>,
    last_heard: Instant,
    healthy: bool,
    suspect_until: Option<Instant>,
    reported: v1::EngineLoad,
    foreign_waiting: u32,
    foreign_running: u32,
    kv_beyond: f64,
    applied_seq: u64,
    resync_asked: bool,
    gone: CancellationToken,
}

#[derive(Debug)]
struct Session {
    number: u64,
    commands: mpsc::Sender<Command>,
}

/// What to do with an event batch of this sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchOrder {
    /// Apply it.
    Next,
    /// It was applied before; acknowledge this number.
    Seen(u64),
    /// Batches before it are missing. `ask` is true for the first after which to ask for a resync.
    Gap {
        /// Whether to ask now.
        ask: bool,
    },
}

impl Entry {
    /// The engine's present registration.
    pub fn registration(&self) -> Arc<Registration> {
        self.live().registration.clone()
    }

    /// The connections to its server.
    pub fn upstream(&self) -> Upstream {
        self.live().upstream.clone()
    }

    /// Cancelled when the engine's lease lapses, or its epoch ends.
    pub fn gone(&self) -> CancellationToken {
        self.live().gone.clone()
    }

    /// The newest event batch that is applied.
    pub fn applied_seq(&self) -> u64 {
        self.live().applied_seq
    }

    /// Its agent's last report.
    pub fn reported(&self) -> v1::EngineLoad {
        self.live().reported
    }

    /// Whether its agent was heard from within the lease.
    pub fn healthy(&self) -> bool {
        self.live().healthy
    }

    /// A consistent view for the store: registration and applied sequence number.
    pub fn record(&self) -> (Arc<Registration>, u64) {
        let live = self.live();
        (live.registration.clone(), live.applied_seq)
    }

    /// The engine as a decision sees it.
    pub fn snapshot(&self, now: Instant) -> Engine {
        let live = self.live();
        let (speed, answer_tokens, reused) = {
            let estimate = self.speed.lock().expect(POISON);
            (estimate.speed(), estimate.answer_tokens(), estimate.reused())
        };
        Engine {
            info: live.info.clone(),
            healthy: live.healthy && live.suspect_until.is_none_or(|until| until <= now),
            can_transfer: live.registration.message.can_transfer && live.session.is_some(),
            speed,
            part: None,
            answer_tokens,
            reused,
            load: self.load.clone(),
            foreign_waiting: live.foreign_waiting,
            foreign_running: live.foreign_running,
            kv_beyond: live.kv_beyond,
            prefill_share: self.prefill_share.lock().expect(POISON).1,
        }
    }

    /// Teaches the engine's speed.
    pub fn learn(&self, teach: impl FnOnce(&mut SpeedEstimate)) {
        teach(&mut self.speed.lock().expect(POISON));
    }

    /// See [`SpeedEstimate::knows_prefill`].
    pub fn knows_prefill(&self) -> bool {
        self.speed.lock().expect(POISON).knows_prefill()
    }

    /// It refused a connection: for a moment it is not chosen.
    pub fn suspect(&self, now: Instant) {
        self.live.write().expect(POISON).suspect_until = Some(now + SUSPICION);
    }

    /// Its agent was heard from.
    pub fn heard(&self, now: Instant) {
        self.live.write().expect(POISON).last_heard = now;
    }

    /// Takes a load report.
    pub fn report(&self, load: v1::EngineLoad) {
        let reserved = self.load.reserved();
        {
            let mut share = self.prefill_share.lock().expect(POISON);
            let now_ms = self.since.elapsed().as_millis() as u64;
            share.1 = share.0.observe(now_ms, self.load.prefilled_seconds());
        }
        let foreign = |reported: u32, ours: u64| reported.saturating_sub(ours.try_into().unwrap_or(u32::MAX));
        let mut live = self.live.write().expect(POISON);
        live.foreign_waiting = foreign(load.waiting, reserved.prefills);
        live.foreign_running = foreign(load.running, reserved.sequences.max(reserved.prefills));
        live.kv_beyond = live.info.kv_beyond(load.kv_usage, &self.load);
        live.reported = load;
    }

    /// Whether a batch is the next one. `whole` says that it begins with Cleared and so needs none before it.
    pub fn order(&self, seq: u64, whole: bool) -> BatchOrder {
        let mut live = self.live.write().expect(POISON);
        if seq <= live.applied_seq {
            return BatchOrder::Seen(live.applied_seq);
        }
        if whole || (seq == live.applied_seq + 1 && !live.resync_asked) {
            live.resync_asked = false;
            return BatchOrder::Next;
        }
        BatchOrder::Gap { ask: !std::mem::replace(&mut live.resync_asked, true) }
    }

    /// Notes that a batch is applied.
    pub fn applied(&self, seq: u64) {
        self.live.write().expect(POISON).applied_seq = seq;
    }

    /// Tells its agent something, if the session is up and its queue has room. Returns whether it went.
    pub fn tell(&self, command: Command) -> bool {
        self.live().session.as_ref().is_some_and(|session| session.commands.try_send(command).is_ok())
    }

    /// Resolves when its agent says that it holds a prompt that is being computed; with an error when
    /// [`Self::release_hold`] was called. Agents do not say it of prompts that are held when they are computed.
    pub fn await_hold(&self, transfer: TransferId) -> oneshot::Receiver<Held> {
        let (held, taken) = oneshot::channel();
        self.awaited.lock().expect(POISON).insert(transfer, held);
        taken
    }

    /// Its agent said so.
    pub fn hold_taken(&self, held: Held) {
        if let Some(awaited) = self.awaited.lock().expect(POISON).remove(&held.transfer_id) {
            // Who waited may just have left.
            let _ = awaited.send(held);
        }
    }

    /// Tells its agent that a hold is not needed any more. Where that does not get through, the hold's lease ends
    /// it.
    pub fn release_hold(&self, transfer: TransferId) {
        self.awaited.lock().expect(POISON).remove(&transfer);
        let transfer_id = bytes::Bytes::copy_from_slice(transfer.as_bytes());
        self.tell(Command::ReleaseHold(v1::ReleaseHold { transfer_id }));
    }

    fn live(&self) -> std::sync::RwLockReadGuard<'_, Live> {
        self.live.read().expect(POISON)
    }
}

const POISON: &str = "no code that holds this lock panics";

/// A session that was taken in.
#[derive(Debug)]
pub struct Registered {
    /// The engine.
    pub entry: Arc<Entry>,
    /// To be given back when the session ends.
    pub session: u64,
    /// The next event batch that is wanted; 0 for everything.
    pub next_event_seq: u64,
    /// Whether what was known of its cache is void.
    pub emptied: bool,
}

/// What the passing of time did to an engine.
#[derive(Debug)]
pub enum Lapse {
    /// Its lease ran out.
    Unhealthy(Arc<Entry>),
    /// It was gone for long; it is not registered any more.
    Forgotten(Arc<Entry>),
}

/// The engines' agents that others may pull from, by layout.
pub type PeerMap = BTreeMap<EngineId, (String, String)>;

/// All engines.
#[derive(Debug)]
pub struct Registry {
    engines: RwLock<BTreeMap<EngineId, Arc<Entry>>>,
    free_slots: Mutex<Vec<Slot>>,
    max_engines: u32,
    sessions: AtomicU64,
    peers: watch::Sender<Arc<PeerMap>>,
    probing: Mutex<Probing>,
    tls: rustls::ClientConfig,
}

impl Registry {
    /// An empty fleet of at most `max_engines`, spoken to with this TLS configuration.
    pub fn new(max_engines: u32, tls: rustls::ClientConfig) -> Self {
        Self {
            engines: RwLock::default(),
            free_slots: Mutex::new((0..max_engines).rev().map(Slot).collect()),
            max_engines,
            sessions: AtomicU64::new(0),
            peers: watch::Sender::new(Arc::default()),
            probing: Mutex::default(),
            tls,
        }
    }

    /// All engines, in order of their names.
    pub fn entries(&self) -> Vec<Arc<Entry>> {
        self.engines.read().expect(POISON).values().cloned().collect()
    }

    /// One engine.
    pub fn get(&self, id: &EngineId) -> Option<Arc<Entry>> {
        self.engines.read().expect(POISON).get(id).cloned()
    }

    /// The engines as a decision sees them, in order of their names.
    pub fn snapshot(&self, now: Instant) -> Vec<Engine> {
        self.engines.read().expect(POISON).values().map(|entry| entry.snapshot(now)).collect()
    }

    /// Changes whenever the set of agents to pull from does.
    pub fn peers(&self) -> watch::Receiver<Arc<PeerMap>> {
        self.peers.subscribe()
    }

    /// Puts an engine in as it was when the coordinator stopped. It is unhealthy until its agent registers.
    pub fn restore(
        &self,
        registration: Registration,
        applied_seq: u64,
        now: Instant,
    ) -> Result<Arc<Entry>, RegisterError> {
        let mut engines = self.engines.write().expect(POISON);
        let slot = self.take_slot()?;
        let entry = self.entry(slot, registration, now, false, applied_seq, None);
        engines.insert(entry.id.clone(), entry.clone());
        Ok(entry)
    }

    /// Takes a session in. A session of the same engine that was there before is superseded: its stream sees its commands
    /// end.
    pub fn register(
        &self,
        registration: Registration,
        commands: mpsc::Sender<Command>,
        now: Instant,
    ) -> Result<Registered, RegisterError> {
        let mut engines = self.engines.write().expect(POISON);
        let session = self.sessions.fetch_add(1, Ordering::Relaxed);
        let handle = Some(Session { number: session, commands });
        let id = registration.engine_id.clone();
        let registered = match engines.get(&id) {
            None => {
                let slot = self.take_slot()?;
                let entry = self.entry(slot, registration, now, true, 0, handle);
                engines.insert(id, entry.clone());
                Registered { entry, session, next_event_seq: 0, emptied: true }
            }
            Some(entry) => {
                let mut live = entry.live.write().expect(POISON);
                let (known, given) = (live.registration.epoch, registration.epoch);
                if given < known {
                    return Err(RegisterError::OldEpoch { id, known, given });
                }
                if given > known {
                    live.gone.cancel();
                    *entry.speed.lock().expect(POISON) = SpeedEstimate::default();
                }
                // An agent that lost count under the same epoch starts over as well, and one that learnt of its engine's
                // cache groups.
                let emptied = given > known
                    || registration.message.last_event_seq < live.applied_seq
                    || registration.groups != live.registration.groups;
                if emptied {
                    live.applied_seq = 0;
                }
                live.resync_asked = false;
                if live.gone.is_cancelled() {
                    live.gone = CancellationToken::new();
                }
                if !live.upstream.leads_to(&registration) {
                    live.upstream = Upstream::new(&registration, self.tls.clone());
                }
                live.info = registration.info(entry.slot);
                live.registration = Arc::new(registration);
                live.session = handle;
                live.last_heard = now;
                live.healthy = true;
                live.suspect_until = None;
                let next_event_seq = match live.applied_seq {
                    0 => 0,
                    applied => applied + 1,
                };
                drop(live);
                Registered { entry: entry.clone(), session, next_event_seq, emptied }
            }
        };
        drop(engines);
        self.publish_peers();
        Ok(registered)
    }

    /// A session's stream ended. The engine serves on until its lease lapses, but neither holds nor pulls.
    pub fn disconnected(&self, entry: &Entry, session: u64) {
        let mut live = entry.live.write().expect(POISON);
        if live.session.as_ref().is_some_and(|current| current.number == session) {
            live.session = None;
            drop(live);
            self.publish_peers();
        }
    }

    /// Applies what the passing of time does.
    pub fn expire(&self, now: Instant, lease: Duration, forget_after: Duration) -> Vec<Lapse> {
        let mut lapses = Vec::new();
        let mut engines = self.engines.write().expect(POISON);
        for entry in engines.values() {
            let mut live = entry.live.write().expect(POISON);
            let silent = now.saturating_duration_since(live.last_heard);
            if live.healthy && silent > lease {
                live.healthy = false;
                live.session = None;
                live.gone.cancel();
                lapses.push(Lapse::Unhealthy(entry.clone()));
            }
            if !live.healthy && silent > lease + forget_after {
                lapses.push(Lapse::Forgotten(entry.clone()));
            }
        }
        for lapse in &lapses {
            if let Lapse::Forgotten(entry) = lapse {
                engines.remove(&entry.id);
            }
        }
        drop(engines);
        if !lapses.is_empty() {
            self.publish_peers();
        }
        lapses
    }

    /// A transfer over a link was measured.
    pub fn measured(&self, source: Slot, destination: Slot, now: Instant) {
        self.probing.lock().expect(POISON).measured(source, destination, now);
    }

    /// A transfer over a link was given up: it is probed as soon as it is idle.
    pub fn doubted(&self, source: Slot, destination: Slot) {
        self.probing.lock().expect(POISON).doubted(source, destination);
    }

    /// Asks agents to measure idle links, each at most one. To be called about once a second.
    pub fn probe(&self, now: Instant) {
        let peers = self.peers.borrow().clone();
        let entries: Vec<Arc<Entry>> = peers.keys().filter_map(|id| self.get(id)).collect();
        let candidates: Vec<Candidate<'_>> = entries
            .iter()
            .map(|entry| {
                let reserved = entry.load.reserved();
                let idle = reserved.sending_bytes + reserved.receiving_bytes == 0;
                Candidate { slot: entry.slot, layout: &peers[&entry.id].1, idle }
            })
            .collect();
        let due = self.probing.lock().expect(POISON).due(&candidates, now);
        for (to, from) in due {
            let (engine_id, transfer_address) = (&entries[from].id, &peers[&entries[from].id].0);
            entries[to].tell(Command::ProbeLink(v1::ProbeLink {
                engine_id: engine_id.to_string(),
                transfer_address: transfer_address.clone(),
            }));
        }
    }

    /// Gives the slot of a forgotten engine to whoever comes next. Nothing may refer to it any more.
    pub fn free(&self, slot: Slot) {
        self.free_slots.lock().expect(POISON).push(slot);
    }

    fn take_slot(&self) -> Result<Slot, RegisterError> {
        self.free_slots.lock().expect(POISON).pop().ok_or(RegisterError::Full(self.max_engines))
    }

    fn entry(
        &self,
        slot: Slot,
        registration: Registration,
        now: Instant,
        healthy: bool,
        applied_seq: u64,
        session: Option<Session>,
    ) -> Arc<Entry> {
        let gone = CancellationToken::new();
        if !healthy {
            gone.cancel();
        }
        Arc::new(Entry {
            id: registration.engine_id.clone(),
            slot,
            load: Arc::default(),
            speed: Mutex::default(),
            prefill_share: Mutex::default(),
            awaited: Mutex::default(),
            since: now,
            live: RwLock::new(Live {
                info: registration.info(slot),
                upstream: Upstream::new(&registration, self.tls.clone()),
                registration: Arc::new(registration),
                session,
                last_heard: now,
                healthy,
                suspect_until: None,
                reported: v1::EngineLoad::default(),
                foreign_waiting: 0,
                foreign_running: 0,
                kv_beyond: 0.0,
                applied_seq,
                resync_asked: false,
                gone,
            }),
        })
    }

    fn publish_peers(&self) {
        let peers: PeerMap = self
            .entries()
            .into_iter()
            .filter_map(|entry| {
                let live = entry.live();
                let message = &live.registration.message;
                let ready = live.session.is_some() && message.can_transfer && !message.layout.is_empty();
                ready.then(|| (entry.id.clone(), (message.transfer_address.clone(), message.layout.clone())))
            })
            .collect();
        self.peers.send_if_modified(|known| {
            let changed = **known != peers;
            if changed {
                *known = Arc::new(peers);
            }
            changed
        });
    }
}

#[cfg(test)]
mod tests;
