//! What outlives a decision: the sessions it pinned, the record of it, how well its terms were predicted, and what the planner rehearses.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use baton_coordinator_core::accuracy::{Accuracy, TermAccuracy};
use baton_coordinator_core::cost::Term;
use baton_coordinator_core::fleet::Fleet;
use baton_coordinator_core::kv_index::Slot;
use baton_coordinator_core::planner::{Finished, Parts, Placed, Planner};
use baton_coordinator_core::record::Recent;
use baton_coordinator_core::sessions::Sessions;
use tokio::time::Instant;

use crate::config::Limits;

/// Sessions that are remembered: about 16 MB.
const MAX_SESSIONS: usize = 200_000;
const POISON: &str = "no code that holds this lock panics";

/// Notes for the planner between two plans: more of a second's requests than it looks at.
const MOST_NOTES: usize = 20_000;

/// What the planner is to know.
enum Note {
    Placed(u64, Placed),
    Finished(u64, Finished),
}

/// Shared by all requests.
pub struct Decisions {
    began: Instant,
    count: AtomicU64,
    sessions: Mutex<Sessions>,
    recent: Mutex<Recent>,
    accuracy: Mutex<Accuracy>,
    planner: Mutex<Planner>,
    /// What it has not been told yet.
    notes: Mutex<Vec<Note>>,
    placed: AtomicU64,
}

impl Decisions {
    /// Nothing was decided yet.
    pub fn new(limits: &Limits) -> Self {
        Self {
            began: Instant::now(),
            count: AtomicU64::new(0),
            sessions: Mutex::new(Sessions::new(MAX_SESSIONS, limits.session_idle_ms)),
            recent: Mutex::new(Recent::new(limits.recent_decisions)),
            accuracy: Mutex::default(),
            planner: Mutex::default(),
            notes: Mutex::default(),
            placed: AtomicU64::new(0),
        }
    }

    /// A number for the next decision.
    pub fn next_seed(&self) -> u64 {
        self.count.fetch_add(1, Ordering::Relaxed)
    }

    /// Milliseconds since the coordinator started: the clock of sessions and of requests that wait.
    pub fn now_ms(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    /// The same as a fraction of seconds: the clock of measurements.
    pub fn now_seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// The same in whole seconds: the clock of what the index expects.
    pub fn tick(&self) -> u64 {
        self.began.elapsed().as_secs()
    }

    /// Where a session is served.
    pub fn pinned(&self, session: u64) -> Option<Slot> {
        self.sessions.lock().expect(POISON).get(self.now_ms(), session)
    }

    /// A session is served by this engine from now on.
    pub fn pin(&self, session: u64, slot: Slot) {
        self.sessions.lock().expect(POISON).pin(self.now_ms(), session, slot);
    }

    /// An engine left for good.
    pub fn forget(&self, slot: Slot) {
        self.sessions.lock().expect(POISON).forget(slot);
    }

    /// Runs with the last decisions.
    pub fn with_recent<T>(&self, run: impl FnOnce(&mut Recent) -> T) -> T {
        run(&mut self.recent.lock().expect(POISON))
    }

    /// A request was placed. Returns a key for [`Decisions::finished`].
    pub fn placed(&self, placed: Placed) -> u64 {
        let mut notes = self.notes.lock().expect(POISON);
        // Under the lock, so that keys come in order.
        let key = self.placed.fetch_add(1, Ordering::Relaxed);
        if notes.len() < MOST_NOTES {
            notes.push(Note::Placed(key, placed));
        }
        key
    }

    /// It was answered whole.
    pub fn finished(&self, key: u64, finished: Finished) {
        let mut notes = self.notes.lock().expect(POISON);
        if notes.len() < MOST_NOTES {
            notes.push(Note::Finished(key, finished));
        }
    }

    /// What engines are to do from now on; see [`Planner::plan`]. Requests do not wait for it.
    pub fn plan(&self, fleet: &Fleet) -> Parts {
        let mut planner = self.planner.lock().expect(POISON);
        // Taken before the loop: its head would hold the lock to its end.
        let notes = std::mem::take(&mut *self.notes.lock().expect(POISON));
        for note in notes {
            match note {
                Note::Placed(key, placed) => planner.placed(key, placed),
                Note::Finished(key, finished) => planner.finished(key, &finished),
            }
        }
        planner.plan(self.now_ms(), fleet)
    }

    /// A term was predicted, and then seen, in seconds. Returns how well it is predicted now.
    pub fn seen(&self, term: Term, predicted: f64, seen: f64) -> TermAccuracy {
        let mut accuracy = self.accuracy.lock().expect(POISON);
        accuracy.observe(term, predicted, seen);
        accuracy.of(term)
    }
}
