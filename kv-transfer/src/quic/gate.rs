//! Lets a pull write to memory until somebody says stop.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// While [`Open`] lives, the gate cannot be shut, and nobody else enters.
pub(crate) struct Open<'a>(#[allow(dead_code, reason = "held, never read")] MutexGuard<'a, bool>);

/// Open at first.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    shut: Mutex<bool>,
}

impl Gate {
    /// Keeps the gate open for the while; `None` where it is shut.
    pub(crate) fn enter(&self) -> Option<Open<'_>> {
        let shut = self.lock();
        (!*shut).then_some(Open(shut))
    }

    /// Keeps everybody else out for the while, also where the gate is shut.
    pub(crate) fn hold(&self) -> Open<'_> {
        Open(self.lock())
    }

    /// Shuts the gate for good. Waits until nobody is inside.
    pub(crate) fn shut(&self) {
        *self.lock() = true;
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.shut.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
