//! Requests that wait for room: the queues of [`baton_coordinator_core::admission`], and the futures that stand in them.
//!
//! Each model has a queue. Only its first request is tried: whenever another request of the model ends, and every [`TRY_AGAIN`], because
//! room also comes of prompts that were computed. A request that comes while others wait goes behind them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use baton_coordinator_core::admission::{Admission, Offer, Refused, Ticket};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// How often the first in a queue is tried where nothing ends.
const TRY_AGAIN: Duration = Duration::from_millis(20);
const POISON: &str = "no code that holds this lock panics";

/// All queues.
#[derive(Debug)]
pub struct WaitingRoom {
    began: Instant,
    most: usize,
    tickets: AtomicU64,
    queues: Mutex<HashMap<String, Queue>>,
}

#[derive(Debug)]
struct Queue {
    admission: Admission,
    waiting: HashMap<u64, Arc<Waiter>>,
}

#[derive(Debug, Default)]
struct Waiter {
    told: Notify,
    /// Seconds after which to come back; 0 while it is not refused.
    refused: AtomicU64,
}

/// A refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom {
    /// When to come back.
    pub retry_after_seconds: u64,
}

impl Queue {
    /// Its first request may try.
    fn call_first(&self, now_ms: u64) {
        if let Some(waiter) = self.admission.next(now_ms).and_then(|id| self.waiting.get(&id)) {
            waiter.told.notify_one();
        }
    }

    fn refuse(&mut self, refused: Refused) {
        if let Some(waiter) = self.waiting.remove(&refused.id) {
            waiter.refused.store(refused.retry_after_seconds, Ordering::Relaxed);
            waiter.told.notify_one();
        }
    }
}

impl WaitingRoom {
    /// Empty queues; in each at most `most` requests wait.
    pub fn new(most: usize) -> Self {
        Self { began: Instant::now(), most, tickets: AtomicU64::new(0), queues: Mutex::default() }
    }

    /// Whether requests for the model wait.
    pub fn is_busy(&self, model: &str) -> bool {
        self.queues.lock().expect(POISON).get(model).is_some_and(|queue| !queue.admission.is_empty())
    }

    /// How many requests wait, for all models.
    pub fn len(&self) -> usize {
        self.queues.lock().expect(POISON).values().map(|queue| queue.admission.len()).sum()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts a request in the queue of its model, until `deadline` at the latest. The smaller priority goes first.
    pub fn enter(self: &Arc<Self>, model: &str, priority: u8, deadline: Instant) -> Result<Place, NoRoom> {
        let id = self.tickets.fetch_add(1, Ordering::Relaxed);
        let now_ms = self.ms(Instant::now());
        let mut queues = self.queues.lock().expect(POISON);
        let queue = queues
            .entry(model.to_owned())
            .or_insert_with(|| Queue { admission: Admission::new(self.most), waiting: HashMap::new() });
        match queue.admission.offer(now_ms, Ticket { id, priority, deadline_ms: self.ms(deadline) }) {
            Offer::Waits => {}
            Offer::Displaces(refused) => queue.refuse(refused),
            Offer::Refused(Refused { retry_after_seconds, .. }) => {
                return Err(NoRoom { retry_after_seconds });
            }
        }
        let waiter = Arc::<Waiter>::default();
        queue.waiting.insert(id, waiter.clone());
        drop(queues);
        Ok(Place { room: self.clone(), model: model.to_owned(), id, waiter, deadline })
    }

    /// A request for the model ended: there may be room.
    pub fn departed(&self, model: &str) {
        let now_ms = self.ms(Instant::now());
        let mut queues = self.queues.lock().expect(POISON);
        if let Some(queue) = queues.get_mut(model) {
            queue.admission.departed(now_ms);
            queue.call_first(now_ms);
        }
    }

    fn ms(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.began).as_millis() as u64
    }
}

/// A request's place in a queue. Dropping it leaves the queue.
#[derive(Debug)]
pub struct Place {
    room: Arc<WaitingRoom>,
    model: String,
    id: u64,
    waiter: Arc<Waiter>,
    deadline: Instant,
}

impl Place {
    /// Waits until it is worth trying again; an error when its time is over, or a more urgent request took its place.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn turn(&self) -> Result<(), NoRoom> {
        loop {
            let first = self.is_first()?;
            let until = if first { self.deadline.min(Instant::now() + TRY_AGAIN) } else { self.deadline };
            let told = tokio::select! {
                () = self.waiter.told.notified() => true,
                () = sleep_until(until) => false,
            };
            if self.is_first()? && (first || told) {
                return Ok(());
            }
        }
    }

    /// Whether no other request goes before; an error where this one is to go.
    fn is_first(&self) -> Result<bool, NoRoom> {
        let now_ms = self.room.ms(Instant::now());
        let mut queues = self.room.queues.lock().expect(POISON);
        let refused = |seconds| Err(NoRoom { retry_after_seconds: seconds });
        let Some(queue) = queues.get_mut(&self.model) else { return Ok(true) };
        while let Some(over) = queue.admission.expired(now_ms) {
            queue.refuse(over);
        }
        match self.waiter.refused.load(Ordering::Relaxed) {
            0 => Ok(queue.admission.next(now_ms) == Some(self.id)),
            seconds => refused(seconds),
        }
    }

    /// It is dispatched.
    pub fn admitted(self) {
        let now_ms = self.room.ms(Instant::now());
        if let Some(queue) = self.room.queues.lock().expect(POISON).get_mut(&self.model) {
            queue.admission.admitted(now_ms, self.id);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let now_ms = self.room.ms(Instant::now());
        if let Some(queue) = self.room.queues.lock().expect(POISON).get_mut(&self.model) {
            queue.admission.cancel(self.id);
            queue.waiting.remove(&self.id);
            // There may be room for more than one.
            queue.call_first(now_ms);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon(ms: u64) -> Instant {
        Instant::now() + Duration::from_millis(ms)
    }

    #[tokio::test]
    async fn the_first_is_tried_and_then_the_next() {
        let room = Arc::new(WaitingRoom::new(10));
        let late = room.enter("m", 0, soon(10_000)).unwrap();
        let urgent = room.enter("m", 0, soon(5_000)).unwrap();
        let other = room.enter("other", 0, soon(5_000)).unwrap();
        assert_eq!((room.len(), room.is_busy("m"), room.is_busy("n")), (3, true, false));
        urgent.turn().await.unwrap();
        other.turn().await.unwrap();
        let waits = tokio::spawn(async move { late.turn().await.map(|()| late) });
        tokio::time::sleep(5 * TRY_AGAIN).await;
        assert!(!waits.is_finished(), "another goes before it");
        urgent.admitted();
        let late = waits.await.unwrap().unwrap();
        room.departed("m");
        late.turn().await.unwrap();
        drop((late, other));
        assert!(room.is_empty());
    }

    #[tokio::test]
    async fn who_is_over_or_displaced_is_told() {
        let room = Arc::new(WaitingRoom::new(2));
        let first = room.enter("m", 1, soon(300)).unwrap();
        let second = room.enter("m", 1, soon(9_000)).unwrap();
        assert!(room.enter("m", 1, soon(9_001)).is_err());
        let urgent = room.enter("m", 0, soon(9_000)).unwrap();
        assert!(second.turn().await.is_err(), "displaced");
        let began = Instant::now();
        let no_room = first.turn().await.unwrap_err();
        assert!(no_room.retry_after_seconds >= 1);
        assert!(began.elapsed() >= Duration::from_millis(100), "it had its time");
        urgent.turn().await.unwrap();
        assert!(room.enter("m", 0, Instant::now()).is_err(), "no time left");
    }
}
