//! A lock for many short reads beside many short writes.
//!
//! Both sides spin before they sleep, since neither holds the lock for more than a few microseconds, and a writer lets
//! readers that wait go first: a lookup waits for the batch in hand and not for those behind it. Patience is bounded on
//! both sides, so that neither starves and a descheduled holder costs no more than sleep.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, RwLock, RwLockReadGuard};

/// Tries before a thread sleeps: about 50 µs.
const SPINS: u32 = 2_000;

/// The lock.
#[derive(Debug, Default)]
pub(super) struct Shared<T> {
    data: RwLock<T>,
    /// Writers queue here, so that at most one of them is at `data`.
    writers: Mutex<()>,
    /// Readers that wait.
    waiting: AtomicU32,
}

const POISON: &str = "no code that holds this lock panics";

impl<T> Shared<T> {
    pub(super) fn new(data: T) -> Self {
        Self { data: RwLock::new(data), writers: Mutex::new(()), waiting: AtomicU32::new(0) }
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, T> {
        if let Ok(guard) = self.data.try_read() {
            return guard;
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let guard = (0..SPINS)
            .find_map(|_| {
                std::hint::spin_loop();
                self.data.try_read().ok()
            })
            .unwrap_or_else(|| self.data.read().expect(POISON));
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        guard
    }

    /// Runs `change` alone.
    pub(super) fn write<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let _turn = self.writers.lock().expect(POISON);
        for _ in 0..SPINS {
            if self.waiting.load(Ordering::Relaxed) == 0 {
                break;
            }
            std::hint::spin_loop();
        }
        let mut guard = (0..SPINS)
            .find_map(|spin| {
                if spin > 0 {
                    std::hint::spin_loop();
                }
                self.data.try_write().ok()
            })
            .unwrap_or_else(|| self.data.write().expect(POISON));
        change(&mut guard)
    }
}
