//! Work that was dispatched and is not finished: right between two heartbeats, and released on every way out.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The counters of one engine. Guards change them; reading them is free of locks.
#[derive(Debug, Default)]
pub struct EngineLoad {
    prefill_tokens: AtomicU64,
    prefills: AtomicU64,
    sequences: AtomicU64,
}

impl EngineLoad {
    /// Reserves the prefill of this many uncached tokens. Drop the guard at the first token.
    pub fn reserve_prefill(self: &Arc<Self>, uncached_tokens: u64) -> PrefillReservation {
        self.prefill_tokens.fetch_add(uncached_tokens, Ordering::Relaxed);
        self.prefills.fetch_add(1, Ordering::Relaxed);
        PrefillReservation { load: Arc::clone(self), tokens: uncached_tokens }
    }

    /// Reserves a place among the decoding sequences. Drop the guard at the last token.
    pub fn reserve_decode(self: &Arc<Self>) -> DecodeReservation {
        self.sequences.fetch_add(1, Ordering::Relaxed);
        DecodeReservation { load: Arc::clone(self) }
    }

    /// What is reserved now.
    pub fn reserved(&self) -> Reserved {
        Reserved {
            prefill_tokens: self.prefill_tokens.load(Ordering::Relaxed),
            prefills: self.prefills.load(Ordering::Relaxed),
            sequences: self.sequences.load(Ordering::Relaxed),
        }
    }
}

/// Reserved work of one engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reserved {
    /// Uncached tokens of prompts whose first token is still to come.
    pub prefill_tokens: u64,
    /// Those prompts.
    pub prefills: u64,
    /// Sequences that decode, or will after their prefill.
    pub sequences: u64,
}

/// A prompt that waits for its first token.
#[derive(Debug)]
#[must_use = "the reservation ends when this is dropped"]
pub struct PrefillReservation {
    load: Arc<EngineLoad>,
    tokens: u64,
}

impl Drop for PrefillReservation {
    fn drop(&mut self) {
        self.load.prefill_tokens.fetch_sub(self.tokens, Ordering::Relaxed);
        self.load.prefills.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A sequence that decodes.
#[derive(Debug)]
#[must_use = "the reservation ends when this is dropped"]
pub struct DecodeReservation {
    load: Arc<EngineLoad>,
}

impl Drop for DecodeReservation {
    fn drop(&mut self) {
        self.load.sequences.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservations_end_on_every_way_out() {
        let load = Arc::new(EngineLoad::default());
        let prefill = load.reserve_prefill(100);
        let decode = load.reserve_decode();
        assert_eq!(load.reserved(), Reserved { prefill_tokens: 100, prefills: 1, sequences: 1 });
        let panicked = std::thread::spawn(move || {
            let _guards = (prefill, decode);
            panic!("on purpose");
        });
        assert!(panicked.join().is_err());
        assert_eq!(load.reserved(), Reserved::default());
    }
}
