//! Where an engine's event stream stands.
//!
//! Batches carry numbers that begin at 0 with each life of the engine and have no gap. Batches are lost when the
//! subscriber is slow, and while it is not connected; the engine replays its most recent ones on request. A
//! replay is asked for from the batch that was applied last: where it begins with the very bytes of that
//! batch, it comes from the same life of the engine and can be gone on with.

use std::cmp::Ordering;
use std::hash::{DefaultHasher, Hasher};

/// Where a batch stands to those already applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is the next one.
    Next,
    /// It was applied before.
    Duplicate,
    /// Batches before it are missing.
    Gap,
}

/// The batch that was applied last.
#[derive(Clone, Copy, Debug)]
struct Last {
    seq: u64,
    fingerprint: u64,
}

/// Position in the stream of one life of the engine.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    last: Option<Last>,
}

impl Sequence {
    /// Number of the batch that was applied last; `None` before the first.
    pub fn last(&self) -> Option<u64> {
        self.last.map(|last| last.seq)
    }

    /// Judges batch `seq`, within one life of the engine.
    pub fn judge(&self, seq: u64) -> Standing {
        match seq.cmp(&self.last.map_or(0, |last| last.seq + 1)) {
            Ordering::Less => Standing::Duplicate,
            Ordering::Equal => Standing::Next,
            Ordering::Greater => Standing::Gap,
        }
    }

    /// Whether this is the batch that was applied last, to the byte.
    pub fn is_last(&self, seq: u64, payload: &[u8]) -> bool {
        self.last.is_some_and(|last| last.seq == seq && last.fingerprint == fingerprint(payload))
    }

    /// Batch `seq` was applied.
    pub fn applied(&mut self, seq: u64, payload: &[u8]) {
        self.last = Some(Last { seq, fingerprint: fingerprint(payload) });
    }

    /// Nothing is known of the stream any more.
    pub fn forget(&mut self) {
        self.last = None;
    }
}

fn fingerprint(payload: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(payload);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_judged_by_their_number_and_recognised_by_their_bytes() {
        let mut sequence = Sequence::default();
        assert_eq!((sequence.judge(0), sequence.judge(1)), (Standing::Next, Standing::Gap));
        sequence.applied(7, b"x");
        assert_eq!(
            [6, 7, 8, 9].map(|seq| sequence.judge(seq)),
            [Standing::Duplicate, Standing::Duplicate, Standing::Next, Standing::Gap]
        );
        assert!(sequence.is_last(7, b"x"));
        assert!(!sequence.is_last(7, b"y") && !sequence.is_last(6, b"x"));
        sequence.forget();
        assert_eq!(sequence.judge(0), Standing::Next);
        assert!(!sequence.is_last(7, b"x"));
    }
}
