//! Lets a pull write to memory until somebody says stop.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// While [`Open`] lives, the gate cannot be shut, and nobody else enters.
pub(super) struct Open<'a>(#[allow(dead_code, reason = "held, never read")] MutexGuard<'a, bool>);

/// Open at first.
#[derive(Debug, Default)]
pub(super) struct Gate {
    shut: Mutex<bool>,
}

impl Gate {
    /// Keeps the gate open for the while; `None` where it is shut.
    pub(super) fn enter(&self) -> Option<Open<'_>> {
        let shut = self.lock();
        (!*shut).then_some(Open(shut))
    }

    /// Keeps everybody else out for the while, also where the gate is shut.
    pub(super) fn hold(&self) -> Open<'_> {
        Open(self.lock())
    }

    /// Shuts the gate for good. Waits until nobody is inside.
    pub(super) fn shut(&self) {
        *self.lock() = true;
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.shut.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
