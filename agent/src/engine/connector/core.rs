//! What the connectors of one engine may do, and when: a state machine without I/O.
//!
//! # Lives
//! All connections that name one `instance` make up a *life* of the engine, which has one epoch. It ends with the
//! first of its connections that is lost, or when another instance says hello. Then its holds end, its pulls
//! are cancelled and the epoch moves on; and when the last copy from or to its memory is over, and not before, all of
//! its connections are closed. That is how the connectors learn that their blocks are theirs again.

mod hello;
mod holds;
mod interface;
mod pulls;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use baton_kernels::BlockMemory;
use baton_kv_transfer::HoldTable;
use baton_proto::connector::{Computed, Hello, Side, ToAgent, ToConnector, VERSION};
use baton_proto::wire::WireDtype;
use baton_proto::{Epoch, TransferId};

use self::interface::kind;
pub use self::interface::{
    Action, Attachment, ChecksumJob, ConnId, EngineShape, Extra, Input, Mapped, Now, PullId, Storages,
};
use self::pulls::Running;
use super::outcomes::Outcomes;
use crate::layout::{self, RankLayout};
use crate::metrics::Metrics;

/// Most requests held at a time; more are given back at once.
pub const MAX_HOLDS: usize = 4096;
/// Most pulls under way or waiting; more fail at once.
pub const MAX_PULLS: usize = 1024;
/// Most storages a worker may have.
pub const MAX_STORAGES: usize = 4096;
/// Longest lease and deadline; longer ones are cut.
pub const MAX_LEASE: Duration = Duration::from_secs(600);

struct Life {
    epoch: Epoch,
    instance: String,
    shape: EngineShape,
    scheduler: Option<ConnId>,
    workers: BTreeMap<u32, Worker>,
    /// Requests that are over. Their pulls come by other connections, and may come later than that.
    cancelled: VecDeque<String>,
    /// Requests whose blocks came to be held before all workers were ready to be told of their release.
    unheld: Vec<String>,
    /// Of requests that are not held, the latest: what a worker says may overtake what the scheduler said before.
    early: VecDeque<(u32, Computed)>,
}

struct Worker {
    conn: ConnId,
    ready: Option<Ready>,
}

struct Ready {
    memory: Arc<dyn BlockMemory>,
    layout: RankLayout,
}

impl Life {
    fn connections(&self) -> impl Iterator<Item = ConnId> + '_ {
        self.scheduler.into_iter().chain(self.workers.values().map(|worker| worker.conn))
    }

    /// All ranks in order, once all are ready.
    fn ranks(&self) -> Option<Vec<&Ready>> {
        (0..self.shape.tp_size).map(|rank| self.workers.get(&rank)?.ready.as_ref()).collect()
    }
}

/// A life that has ended but for its last copies.
struct Ending {
    epoch: Epoch,
    connections: Vec<ConnId>,
}

/// Where a connection stands.
enum Stage {
    /// Before its hello.
    New,
    /// Part of the current life.
    Scheduler,
    /// Part of the current life, with the storages that came so far.
    Worker { rank: u32, storages: Storages, layout: Option<RankLayout> },
    /// Part of a life that ends; what it says has no effect.
    Ending,
}

/// See the module.
pub struct Core {
    /// What KV is pulled as.
    dtype: WireDtype,
    metrics: Metrics,
    table: Arc<Mutex<HoldTable>>,
    epoch: Epoch,
    connections: BTreeMap<ConnId, Stage>,
    life: Option<Life>,
    endings: Vec<Ending>,
    stopping: bool,
    pulls: BTreeMap<PullId, Running>,
    next_pull: u64,
    /// Epoch of every hold in the table.
    holds: BTreeMap<TransferId, Epoch>,
    outcomes: Outcomes,
    actions: Vec<Action>,
}

impl Core {
    /// Without any connection. The table is shared with those who serve pulls from it; its epoch is the first. Engines whose
    /// KV cannot be pulled as `dtype` are refused.
    pub fn new(dtype: WireDtype, table: Arc<Mutex<HoldTable>>, metrics: Metrics) -> Self {
        let epoch = lock(&table).epoch();
        metrics.set_epoch(epoch.0);
        Self {
            dtype,
            metrics,
            table,
            epoch,
            connections: BTreeMap::new(),
            life: None,
            endings: Vec::new(),
            stopping: false,
            pulls: BTreeMap::new(),
            next_pull: 0,
            holds: BTreeMap::new(),
            outcomes: Outcomes::default(),
            actions: Vec::new(),
        }
    }

    /// Takes in what happened, and says what to do.
    pub fn handle(&mut self, now: Now, input: Input) -> Vec<Action> {
        match input {
            Input::Connected(conn) if self.stopping => self.actions.push(Action::Close(conn)),
            Input::Connected(conn) => {
                self.connections.insert(conn, Stage::New);
            }
            Input::Message(conn, message, extra) => self.message(now, conn, message, extra),
            Input::Malformed(conn, why) => {
                if self.connections.contains_key(&conn) {
                    self.actions.push(Action::Send(conn, ToConnector::Refused { reason: why }));
                    self.lost(now, conn, "it sent what is no message");
                }
            }
            Input::Ended(conn) => self.lost(now, conn, "it is gone"),
            Input::Mapped(conn, Mapped(result)) => self.mapped(conn, result),
            Input::PullEnded(pull, result) => self.pull_ended(now, pull, result),
            Input::Release(transfer_id) => {
                lock(&self.table).release(transfer_id);
            }
            Input::Woken => {}
            Input::Stop => {
                self.stopping = true;
                self.end_life(now, "the agent stops");
                let new = |(conn, stage): (&ConnId, &Stage)| matches!(stage, Stage::New).then_some(*conn);
                let unbound: Vec<_> = self.connections.iter().filter_map(new).collect();
                unbound.into_iter().for_each(|conn| self.close(conn));
            }
        }
        self.poll_holds(now);
        self.finish_endings();
        self.metrics.set_connector_up(self.life.as_ref().is_some_and(|life| life.scheduler.is_some()));
        std::mem::take(&mut self.actions)
    }

    /// When [`Input::Woken`] is due, unless the table calls before.
    pub fn poll_timeout(&self) -> Option<Instant> {
        lock(&self.table).poll_timeout()
    }

    /// Whether the agent stops and nothing is under way any more.
    pub fn has_stopped(&self) -> bool {
        self.stopping && self.connections.is_empty()
    }

    /// What the rest of the agent sees.
    pub fn attachment(&self) -> Attachment {
        let mut attachment = Attachment { epoch: self.epoch, ..Attachment::default() };
        let Some(life) = &self.life else { return attachment };
        attachment.engine = Some(life.shape.clone());
        if let Some(ranks) = life.ranks()
            && life.scheduler.is_some()
        {
            attachment.can_transfer = true;
            let stored = |rank: &Ready| rank.memory.block_bytes() as u64;
            let on_the_wire = |rank: &Ready| rank.layout.packed_bytes.unwrap_or(stored(rank));
            attachment.block_bytes = ranks.iter().map(|rank| stored(rank)).sum();
            attachment.wire_block_bytes = ranks.iter().map(|rank| on_the_wire(rank)).sum();
            attachment.layout = layout::describe(ranks.iter().map(|rank| &rank.layout));
        }
        attachment
    }

    fn message(&mut self, now: Now, conn: ConnId, message: ToAgent, extra: Extra) {
        let Some(stage) = self.connections.get_mut(&conn) else { return };
        match (stage, message) {
            (Stage::Ending, _) => {}
            (Stage::New, ToAgent::Hello(hello)) => self.hello(now, conn, hello),
            (
                Stage::Worker { storages, layout: None, .. },
                message @ (ToAgent::Storage { .. } | ToAgent::Gpu { .. } | ToAgent::CudaStorage { .. }),
            ) => {
                let added = if storages.len() == MAX_STORAGES {
                    Err(format!("storage: at most {MAX_STORAGES} can be registered"))
                } else {
                    storages.add(message, extra.fd)
                };
                if let Err(reason) = added {
                    self.refuse(now, conn, reason);
                }
            }
            (Stage::Worker { storages, layout: described @ None, .. }, ToAgent::Layout(layout)) => {
                let shape = self.life.as_ref().map(|life| &life.shape);
                let (ranks, blocks) = shape.map_or((1, 0), |shape| (shape.tp_size, shape.num_blocks));
                match RankLayout::new(&layout, ranks, self.dtype) {
                    Ok(rank) => {
                        *described = Some(rank);
                        let storages = std::mem::replace(storages, Storages::new());
                        self.actions.push(Action::Map(conn, storages, layout, blocks));
                    }
                    Err(error) => self.refuse(now, conn, error.to_string()),
                }
            }
            (Stage::Scheduler, ToAgent::Hold(hold)) => self.hold(now, hold, extra.hashes),
            (Stage::Scheduler, ToAgent::Cancel { request_id }) => self.cancel(request_id),
            (Stage::Worker { rank, .. }, ToAgent::Computed(computed)) => {
                let rank = *rank;
                self.computed(now, conn, rank, computed);
            }
            (Stage::Worker { rank, .. }, ToAgent::Pull(pull)) => {
                let rank = *rank;
                self.pull(now, conn, rank, pull, extra.hashes);
            }
            (_, message) => {
                let kind = kind(&message);
                self.refuse(now, conn, format!("{kind}: not expected at this point of this connection"));
            }
        }
    }

    fn hello(&mut self, now: Now, conn: ConnId, hello: Hello) {
        if let Err(reason) = hello::check(&hello) {
            return self.refuse(now, conn, reason);
        }
        let Hello { instance, side, tp_size, model, block_size, num_blocks, chunk_tokens, version: _ } =
            hello;
        let shape = EngineShape { model, block_size, num_blocks, tp_size, chunk_tokens };
        if let Some(life) = &self.life {
            let taken = match side {
                Side::Scheduler => life.scheduler.is_some(),
                Side::Worker(rank) => life.workers.contains_key(&rank),
            };
            if life.instance != instance {
                self.end_life(now, "another instance of the engine says hello");
            } else if taken {
                self.end_life(now, "a part of the engine connects again");
            } else if life.shape != shape {
                let reason = format!(
                    "hello: {shape:?} differs from {:?}, as another part of this instance said",
                    life.shape
                );
                return self.refuse(now, conn, reason);
            }
        }
        let epoch = self.epoch;
        let life = self.life.get_or_insert_with(|| {
            tracing::info!(%epoch, instance, ?shape, "the engine's connector is here");
            Life {
                epoch,
                instance,
                shape,
                scheduler: None,
                workers: BTreeMap::new(),
                cancelled: VecDeque::new(),
                unheld: Vec::new(),
                early: VecDeque::new(),
            }
        });
        let stage = match side {
            Side::Scheduler => {
                life.scheduler = Some(conn);
                Stage::Scheduler
            }
            Side::Worker(rank) => {
                life.workers.insert(rank, Worker { conn, ready: None });
                Stage::Worker { rank, storages: Storages::new(), layout: None }
            }
        };
        self.connections.insert(conn, stage);
        self.welcome(conn);
    }

    fn welcome(&mut self, conn: ConnId) {
        let welcome = ToConnector::Welcome { version: VERSION, epoch: self.epoch };
        self.actions.push(Action::Send(conn, welcome));
    }

    /// Refuses what a connection said, and ends it.
    fn refuse(&mut self, now: Now, conn: ConnId, reason: String) {
        tracing::warn!(reason, "refused the engine's connector");
        self.actions.push(Action::Send(conn, ToConnector::Refused { reason }));
        self.lost(now, conn, "it was refused");
    }

    /// A connection says nothing more that counts.
    fn lost(&mut self, now: Now, conn: ConnId, why: &str) {
        match self.connections.get(&conn) {
            Some(Stage::New) => self.close(conn),
            Some(Stage::Scheduler | Stage::Worker { .. }) => self.end_life(now, why),
            Some(Stage::Ending) | None => {}
        }
    }

    fn close(&mut self, conn: ConnId) {
        self.connections.remove(&conn);
        self.actions.push(Action::Close(conn));
    }

    fn end_life(&mut self, now: Now, why: &str) {
        let Some(life) = self.life.take() else { return };
        // Strictly greater than any before, also where the clock was set back.
        self.epoch = Epoch(now.unix_ms.max(self.epoch.0 + 1));
        self.metrics.set_epoch(self.epoch.0);
        tracing::info!(ended = %life.epoch, next = %self.epoch, why, "the engine's epoch ended");
        lock(&self.table).drop_epoch(self.epoch);
        for (id, pull) in &self.pulls {
            if pull.epoch == life.epoch {
                self.actions.push(Action::CancelPull(*id));
            }
        }
        let connections: Vec<_> = life.connections().collect();
        for conn in &connections {
            self.connections.insert(*conn, Stage::Ending);
        }
        self.endings.push(Ending { epoch: life.epoch, connections });
    }

    fn finish_endings(&mut self) {
        let copying = |epoch: Epoch| {
            self.pulls.values().any(|pull| pull.epoch == epoch) || self.holds.values().any(|e| *e == epoch)
        };
        let (over, still): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.endings).into_iter().partition(|ending| !copying(ending.epoch));
        self.endings = still;
        over.into_iter().flat_map(|ending| ending.connections).for_each(|conn| self.close(conn));
    }

    fn mapped(&mut self, conn: ConnId, result: Result<Arc<dyn BlockMemory>, String>) {
        let Some(Stage::Worker { rank, layout, .. }) = self.connections.get(&conn) else { return };
        let Some(life) = &mut self.life else { return };
        match result {
            Ok(memory) => {
                let (Some(layout), Some(worker)) = (layout.clone(), life.workers.get_mut(rank)) else {
                    return;
                };
                tracing::info!(rank, block_bytes = memory.block_bytes(), "a worker's memory is mapped");
                worker.ready = Some(Ready { memory, layout });
                let request_ids = life.unheld.clone();
                self.welcome(conn);
                if !request_ids.is_empty() {
                    self.actions.push(Action::Send(conn, ToConnector::Released { request_ids }));
                }
            }
            Err(reason) => {
                tracing::warn!(reason, "refused a worker's memory");
                // Nothing was held or pulled yet without this worker, so the life need not end.
                life.workers.remove(rank);
                self.actions.push(Action::Send(conn, ToConnector::Refused { reason }));
                self.close(conn);
            }
        }
    }
}

/// A panic elsewhere leaves the table as it was between two of its calls.
pub(super) fn lock(table: &Mutex<HoldTable>) -> std::sync::MutexGuard<'_, HoldTable> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}
