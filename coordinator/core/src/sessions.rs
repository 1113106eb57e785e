//! Which engine a session was served by: a bounded table that forgets.
//!
//! # Memory
//! About 80 bytes for each session. At the cap the session that was idle the longest is dropped; it is then placed like a new
//! one.

use std::collections::{BTreeSet, HashMap};

use crate::kv_index::Slot;

#[derive(Clone, Copy, Debug)]
struct Pin {
    slot: Slot,
    used_ms: u64,
}

/// The table. Times are milliseconds on any clock that does not run backwards.
#[derive(Debug)]
pub struct Sessions {
    most: usize,
    idle_ms: u64,
    pins: HashMap<u64, Pin>,
    /// By when they were used last.
    order: BTreeSet<(u64, u64)>,
}

impl Sessions {
    /// An empty table of at most `most` sessions; one that is not used for `idle_ms` is forgotten.
    pub fn new(most: usize, idle_ms: u64) -> Self {
        Self { most: most.max(1), idle_ms, pins: HashMap::new(), order: BTreeSet::new() }
    }

    /// The key of a session's name. Two names that share one share an engine, and nothing else.
    pub fn key(name: &str) -> u64 {
        xxhash_rust::xxh3::xxh3_64(name.as_bytes())
    }

    /// Where the session is pinned, unless it was idle for too long.
    pub fn get(&mut self, now_ms: u64, session: u64) -> Option<Slot> {
        self.expire(now_ms);
        let slot = self.pins.get(&session)?.slot;
        self.pin(now_ms, session, slot);
        Some(slot)
    }

    /// The session is served by this engine from now on: after its first request, and again where the engine that
    /// it was pinned to could not take it.
    pub fn pin(&mut self, now_ms: u64, session: u64, slot: Slot) {
        self.expire(now_ms);
        if let Some(old) = self.pins.insert(session, Pin { slot, used_ms: now_ms }) {
            self.order.remove(&(old.used_ms, session));
        } else if self.pins.len() > self.most
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.pins.remove(&oldest);
        }
        self.order.insert((now_ms, session));
    }

    /// An engine left for good: its sessions go free, before its slot goes to another engine.
    pub fn forget(&mut self, slot: Slot) {
        let order = &mut self.order;
        self.pins.retain(|session, pin| {
            let keep = pin.slot != slot;
            if !keep {
                order.remove(&(pin.used_ms, *session));
            }
            keep
        });
    }

    /// Sessions in the table.
    pub fn len(&self) -> usize {
        self.pins.len()
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.pins.is_empty()
    }

    fn expire(&mut self, now_ms: u64) {
        while let Some(&(used_ms, session)) = self.order.first() {
            if now_ms.saturating_sub(used_ms) <= self.idle_ms {
                break;
            }
            self.order.pop_first();
            self.pins.remove(&session);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Op {
        Get(u64),
        Pin(u64, u32),
        Forget(u32),
        Pass(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0u64..12).prop_map(Op::Get),
            (0u64..12, 0u32..4).prop_map(|(session, slot)| Op::Pin(session, slot)),
            (0u32..4).prop_map(Op::Forget),
            (0u64..60).prop_map(Op::Pass),
        ]
    }

    proptest! {
        #[test]
        fn it_is_a_bounded_list_by_last_use(ops in prop::collection::vec(op(), 0..120)) {
            const MOST: usize = 5;
            const IDLE: u64 = 100;
            let mut table = Sessions::new(MOST, IDLE);
            // Session, slot, last use.
            let mut model: Vec<(u64, u32, u64)> = Vec::new();
            let mut now = 0;
            for op in ops {
                model.retain(|entry| now - entry.2 <= IDLE);
                match op {
                    Op::Pass(ms) => now += ms,
                    Op::Get(session) => {
                        let found = model.iter_mut().find(|entry| entry.0 == session);
                        let expected = found.map(|entry| {
                            entry.2 = now;
                            Slot(entry.1)
                        });
                        prop_assert_eq!(table.get(now, session), expected);
                    }
                    Op::Pin(session, slot) => {
                        table.pin(now, session, Slot(slot));
                        model.retain(|entry| entry.0 != session);
                        if model.len() == MOST {
                            let oldest = *model.iter().min_by_key(|entry| (entry.2, entry.0)).unwrap();
                            model.retain(|entry| *entry != oldest);
                        }
                        model.push((session, slot, now));
                    }
                    Op::Forget(slot) => {
                        table.forget(Slot(slot));
                        model.retain(|entry| entry.1 != slot);
                    }
                }
                prop_assert!(table.len() <= MOST);
                prop_assert_eq!(table.order.len(), table.pins.len());
            }
        }
    }
}
