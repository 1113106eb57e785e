//! The engine loop: one thread that runs the scheduler on real time.
//!
//! As in vLLM, a step runs to its end before anything new is looked at: arrivals, aborts and the connector's news wait for
//! it. A step takes as long as the timing model says, or as long as computing on the KV memory takes, if that is
//! more.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{JoinHandle, Thread};
use std::time::Instant;

use baton_proto::connector::ToAgent;
use baton_proto::ids::Epoch;
use tokio::sync::{mpsc, oneshot};

use crate::events::KvEvent;
use crate::metrics::Metrics;
use crate::model::Model;
use crate::request::{NewRequest, Output};
use crate::scheduler::{Row, Scheduler};
use crate::timing::Timing;
use crate::vocabulary::Vocabulary;

/// Requests in the engine at the same time, at most; more are refused.
pub const MAX_REQUESTS: usize = 16 << 10;

/// What the engine is told.
#[derive(Debug)]
pub enum Command {
    /// A request, when it arrived, and where its outputs go.
    Add(NewRequest, Instant, mpsc::UnboundedSender<Output>),
    /// Nobody waits for this request any more.
    Abort(u64),
    /// The agent accepted the connector; messages for it go here.
    ConnectorUp(Epoch, mpsc::UnboundedSender<ToAgent>),
    /// The connection to the agent is gone.
    ConnectorDown,
    /// A pull is over.
    PullDone {
        /// The engine's request id.
        request_id: String,
        /// Blocks that do not hold what they should.
        failed_blocks: Vec<u32>,
        /// Why.
        error: String,
    },
    /// Holds that are over.
    Released(Vec<String>),
    /// Forget the prefix cache, after preempting the running requests if so; the answer is whether that was done.
    Reset(bool, oneshot::Sender<bool>),
}

/// What the engine works with.
#[derive(Debug)]
pub struct EngineParts {
    /// The scheduler.
    pub scheduler: Scheduler,
    /// The model, with the KV memory.
    pub model: Model,
    /// What it can say.
    pub vocabulary: Vocabulary,
    /// How long its steps take.
    pub timing: Timing,
    /// Where it counts.
    pub metrics: Arc<Metrics>,
    /// Where KV events go.
    pub events: Option<mpsc::Sender<Vec<KvEvent>>>,
}

/// The engine does not take the request.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SubmitError {
    /// Too many requests at once.
    #[error("the engine has {MAX_REQUESTS} requests already; try again later")]
    Full,
    /// The loop has ended.
    #[error("the engine has stopped")]
    Stopped,
}

/// To talk to a running engine. Cheap to clone.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    commands: Sender<Command>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    next_key: AtomicU64,
    requests: AtomicUsize,
    alive: AtomicBool,
    stopping: AtomicBool,
    thread: OnceLock<Thread>,
}

impl Shared {
    fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }
}

/// Tells that the loop has ended, however it did.
struct Alive(Arc<Shared>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.alive.store(false, Ordering::Release);
    }
}

/// A request that runs. Dropping it aborts what is left of it.
#[derive(Debug)]
pub struct Generation {
    key: u64,
    outputs: mpsc::UnboundedReceiver<Output>,
    ended: bool,
    engine: EngineHandle,
}

impl Generation {
    /// The next output; `None` behind the last one, or when the engine has stopped. Cancel safe.
    pub async fn next(&mut self) -> Option<Output> {
        let output = self.outputs.recv().await;
        self.ended |= output.as_ref().is_none_or(|output| output.finish.is_some());
        output
    }

    /// An output that is there already.
    pub fn ready(&mut self) -> Option<Output> {
        let output = self.outputs.try_recv().ok();
        self.ended |= output.as_ref().is_some_and(|output| output.finish.is_some());
        output
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.engine.shared.requests.fetch_sub(1, Ordering::Relaxed);
        if !self.ended {
            self.engine.send(Command::Abort(self.key));
        }
    }
}

impl EngineHandle {
    /// Starts a request; `make` is given its key.
    pub fn submit(
        &self,
        arrived: Instant,
        make: impl FnOnce(u64) -> NewRequest,
    ) -> Result<Generation, SubmitError> {
        if self.shared.requests.fetch_add(1, Ordering::Relaxed) >= MAX_REQUESTS {
            self.shared.requests.fetch_sub(1, Ordering::Relaxed);
            return Err(SubmitError::Full);
        }
        let key = self.shared.next_key.fetch_add(1, Ordering::Relaxed);
        let (sender, outputs) = mpsc::unbounded_channel();
        let generation = Generation { key, outputs, ended: false, engine: self.clone() };
        match self.send(Command::Add(make(key), arrived, sender)) {
            true => Ok(generation),
            false => Err(SubmitError::Stopped),
        }
    }

    /// Tells the engine something; `false` when it has stopped.
    pub fn send(&self, command: Command) -> bool {
        let sent = self.commands.send(command).is_ok();
        self.shared.wake();
        sent
    }

    /// Ends the loop, in the middle of a step as well.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.wake();
    }

    /// Whether the loop runs.
    pub fn is_alive(&self) -> bool {
        self.shared.alive.load(Ordering::Acquire)
    }
}

/// Starts the engine's thread. It ends on [`EngineHandle::stop`], or with an error when its memory fails it.
pub fn start(parts: EngineParts) -> io::Result<(EngineHandle, JoinHandle<io::Result<()>>)> {
    let (sender, commands) = channel();
    let shared = Arc::new(Shared {
        next_key: AtomicU64::new(0),
        requests: AtomicUsize::new(0),
        alive: AtomicBool::new(true),
        stopping: AtomicBool::new(false),
        thread: OnceLock::new(),
    });
    let handle = EngineHandle { commands: sender, shared: shared.clone() };
    let alive = Alive(shared.clone());
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
        let _alive = alive;
        let _ = shared.thread.set(std::thread::current());
        let engine = Engine { parts, commands, clients: HashMap::new(), agent: None, shared };
        let result = engine.run();
        if let Err(error) = &result {
            tracing::error!(%error, "the engine has failed");
        }
        result
    })?;
    Ok((handle, thread))
}

struct Client {
    outputs: mpsc::UnboundedSender<Output>,
    arrived: Instant,
    last: Instant,
}

struct Engine {
    parts: EngineParts,
    commands: Receiver<Command>,
    clients: HashMap<u64, Client>,
    agent: Option<mpsc::UnboundedSender<ToAgent>>,
    shared: Arc<Shared>,
}

impl Engine {
    fn run(mut self) -> io::Result<()> {
        loop {
            let idle = !self.parts.scheduler.has_work();
            if !self.take_commands(idle) {
                return Ok(());
            }
            let (rows, preempted) = self.parts.scheduler.schedule();
            self.send_messages();
            if rows.is_empty() {
                self.publish();
                self.parts.metrics.record().stats(self.parts.scheduler.stats());
                // Without rows, only news can help; but whoever was preempted just now may fit at once.
                if preempted == 0 && self.parts.scheduler.has_work() && !self.take_commands(true) {
                    return Ok(());
                }
                continue;
            }
            self.parts.metrics.record().stats(self.parts.scheduler.stats());
            let until = Instant::now() + self.parts.timing.of_step(&rows);
            let sampled = self.compute(&rows)?;
            self.sleep(until);
            let outputs = self.parts.scheduler.complete(&rows, sampled);
            self.send_messages();
            self.publish();
            self.deliver(outputs);
        }
    }

    /// Takes what there is, after waiting for something where `wait`. `false`: stop.
    fn take_commands(&mut self, wait: bool) -> bool {
        let mut wait = wait;
        loop {
            if self.shared.stopping.load(Ordering::Acquire) {
                return false;
            }
            match self.commands.try_recv() {
                Ok(command) => {
                    self.take(command);
                    wait = false;
                }
                Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) if wait => std::thread::park(),
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    /// Sleeps until a step is over; stopping ends that.
    fn sleep(&self, until: Instant) {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.shared.stopping.load(Ordering::Acquire) {
                return;
            }
            std::thread::park_timeout(left);
        }
    }

    fn take(&mut self, command: Command) {
        let scheduler = &mut self.parts.scheduler;
        match command {
            Command::Add(request, arrived, outputs) => {
                self.clients.insert(request.key, Client { outputs, arrived, last: arrived });
                scheduler.add(request);
            }
            Command::Abort(key) => {
                if let Some(client) = self.clients.remove(&key) {
                    scheduler.abort(key);
                    self.parts.metrics.record().finished(None, client.arrived.elapsed());
                }
            }
            Command::ConnectorUp(epoch, agent) => {
                scheduler.connector_up(epoch);
                self.agent = Some(agent);
            }
            Command::ConnectorDown => {
                scheduler.connector_down();
                self.agent = None;
            }
            Command::PullDone { request_id, failed_blocks, error } => {
                scheduler.pull_done(&request_id, &failed_blocks, &error);
            }
            Command::Released(request_ids) => scheduler.released(request_ids.iter().map(String::as_str)),
            Command::Reset(preempt_running, answer) => {
                // Nobody may be waiting for the answer any more.
                let _ = answer.send(scheduler.reset_prefix_cache(preempt_running));
            }
        }
    }

    fn send_messages(&mut self) {
        let messages = self.parts.scheduler.take_messages();
        let Some(agent) = &self.agent else { return };
        for message in messages {
            // A closed channel means that the news of it is on its way, and that will fail the pulls and free the holds.
            let _ = agent.send(message);
        }
    }

    fn publish(&mut self) {
        let events = self.parts.scheduler.take_events();
        if let Some(publisher) = &self.parts.events
            && !events.is_empty()
            && publisher.blocking_send(events).is_err()
        {
            self.parts.events = None;
        }
    }

    /// Computes the KV of all rows, and then the next tokens from the KV of those that sample.
    fn compute(&mut self, rows: &[Row]) -> io::Result<Vec<u32>> {
        let EngineParts { scheduler, model, vocabulary, .. } = &mut self.parts;
        for row in rows {
            let request = scheduler.running_mut(row.running);
            let before = request.chain_at(row.start);
            let tokens = &request.tokens()[row.start..row.start + row.len];
            let after = model.compute(request.blocks(), row.start, tokens, before)?;
            request.set_chain(row.start + row.len, after);
        }
        let sampling = rows.iter().filter(|row| row.samples);
        sampling
            .map(|row| {
                let request = &scheduler.running()[row.running];
                let digest = model.digest(request.blocks(), request.tokens().len())?;
                Ok(vocabulary.next(digest, request))
            })
            .collect()
    }

    fn deliver(&mut self, outputs: Vec<Output>) {
        let now = Instant::now();
        let mut record = self.parts.metrics.record();
        record.stats(self.parts.scheduler.stats());
        for output in outputs {
            let key = output.key;
            let Some(client) = self.clients.get_mut(&key) else { continue };
            match output.prefill {
                Some(prefill) => record.first_token(now - client.arrived, prefill),
                None => record.next_token(now - client.last),
            }
            client.last = now;
            let finish = output.finish.as_ref().map(|finish| finish.reason);
            // A receiver that is gone has left an abort behind.
            let _ = client.outputs.send(output);
            if finish.is_some() {
                record.finished(finish, now - client.arrived);
                self.clients.remove(&key);
            }
        }
    }
}
