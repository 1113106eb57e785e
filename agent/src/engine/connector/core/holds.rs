//! Holds of the engine: taken when the scheduler says so, grown as workers say what they have computed, and given back to all of them.

use std::collections::VecDeque;
use std::time::Duration;

use baton_kv_transfer::checksum::Checksums;
use baton_kv_transfer::{GrowError, Growth, Hold as HeldRequest, HoldEnd as TableEnd, HoldError, RankHold};
use baton_proto::BlockHash;
use baton_proto::connector::{Computed, Hold, ToConnector};
use baton_proto::control::v1;

use super::{Action, ChecksumJob, ConnId, Core, MAX_LEASE, Now, lock};
use crate::metrics::HoldEnd;

/// Most messages of workers about requests that are not held that are kept.
pub(super) const MAX_EARLY: usize = 256;
/// Most requests that the engine wants held before its workers have registered their memory.
const MAX_UNHELD: usize = 16 << 10;

impl Core {
    pub(super) fn hold(&mut self, now: Now, hold: Hold, hashes: Vec<BlockHash>) {
        let Some(life) = &mut self.life else { return };
        if life.ranks().is_none() {
            if life.unheld.len() == MAX_UNHELD {
                return self.end_life(now, "too many holds came before all workers");
            }
            self.metrics.hold_ended(HoldEnd::Dropped);
            let ready = life.workers.values().filter(|worker| worker.ready.is_some());
            for worker in ready {
                let released = ToConnector::Released { request_ids: vec![hold.request_id.clone()] };
                self.actions.push(Action::Send(worker.conn, released));
            }
            life.unheld.push(hold.request_id);
            return;
        }
        let Some(ranks) = life.ranks() else { return };
        let num_blocks = life.shape.num_blocks;
        let epoch = life.epoch;
        let workers = &life.workers;
        let Hold { request_id, transfer_id, lease_ms, block_ids, content } = hold;
        let problem = beyond(&block_ids, num_blocks);
        let grows = block_ids.len() < hashes.len();
        let ranks: Vec<_> = ranks
            .iter()
            .map(|rank| RankHold {
                memory: rank.memory.clone(),
                layout: rank.layout.blocks.clone(),
                checksums: Checksums::pending(hashes.len()),
            })
            .collect();
        let lease = Duration::from_millis(lease_ms.into()).min(MAX_LEASE);
        let taken = match problem {
            Some(problem) => Err(problem),
            None => {
                let request_id = request_id.clone();
                let held = HeldRequest { request_id, transfer_id, hashes, block_ids, ranks };
                let inserted = lock(&self.table).insert(now.instant, held, lease);
                if let Err(HoldError::DuplicateRequest(_)) = inserted {
                    // To say `Released` would free the blocks of the hold that there is.
                    return self.end_life(now, "a request was held twice");
                }
                inserted.map_err(|error| error.to_string())
            }
        };
        match taken {
            Ok(making) => {
                self.holds.insert(transfer_id, epoch);
                let taken = now.instant;
                self.actions
                    .extend(making.into_iter().map(|making| Action::Checksum(ChecksumJob { making, taken })));
                if grows {
                    self.actions.push(Action::HoldTaken(v1::HoldTaken {
                        transfer_id: transfer_id.as_bytes().to_vec().into(),
                        epoch: epoch.0,
                        num_tokens: (content.tokens.len() / 4) as u32,
                    }));
                    self.take_early(now, &request_id);
                }
            }
            Err(error) => {
                tracing::warn!(%transfer_id, request_id, error, "blocks cannot be held");
                self.metrics.hold_ended(HoldEnd::Dropped);
                for worker in workers.values() {
                    let released = ToConnector::Released { request_ids: vec![request_id.clone()] };
                    self.actions.push(Action::Send(worker.conn, released));
                }
            }
        }
    }

    /// A rank has computed more of a held prompt.
    pub(super) fn computed(&mut self, now: Now, conn: ConnId, rank: u32, computed: Computed) {
        let Some(life) = &mut self.life else { return };
        if let Some(problem) = beyond(&computed.block_ids, life.shape.num_blocks) {
            return self.refuse(now, conn, format!("computed.block_ids: {problem}"));
        }
        let growth = Growth { first: computed.first_block as usize, block_ids: computed.block_ids.clone() };
        let grown = lock(&self.table).grow(now.instant, &computed.request_id, rank, growth);
        match grown {
            Ok(making) => {
                let job = making.map(|making| ChecksumJob { making, taken: now.instant });
                self.actions.extend(job.map(Action::Checksum));
            }
            Err(GrowError::Unknown(_)) => {
                if life.early.len() == MAX_EARLY {
                    life.early.pop_front();
                }
                life.early.push_back((rank, computed));
            }
            Err(error) => self.refuse(now, conn, format!("computed: {error}")),
        }
    }

    /// A request came to be held of which workers have spoken already.
    fn take_early(&mut self, now: Now, request_id: &str) {
        let Some(life) = &mut self.life else { return };
        let early = std::mem::take(&mut life.early);
        let (of_it, others) = early.into_iter().partition(|(_, early)| early.request_id == request_id);
        life.early = others;
        let of_it: VecDeque<(u32, Computed)> = of_it;
        for (rank, computed) in of_it {
            let conn = self.life.as_ref().and_then(|life| life.workers.get(&rank)).map(|worker| worker.conn);
            if let Some(conn) = conn {
                self.computed(now, conn, rank, computed);
            }
        }
    }

    pub(super) fn poll_holds(&mut self, now: Now) {
        let (released, live) = {
            let mut table = lock(&self.table);
            (table.poll(now.instant), table.len())
        };
        self.metrics.set_holds(live);
        let current = self.life.as_ref().map(|life| life.epoch);
        let mut request_ids = Vec::new();
        for hold in released {
            let epoch = self.holds.remove(&hold.transfer_id);
            let end = match hold.end {
                TableEnd::Finished | TableEnd::Released => HoldEnd::Released,
                TableEnd::Expired => HoldEnd::Expired,
                TableEnd::Dropped => HoldEnd::Dropped,
            };
            tracing::debug!(transfer_id = %hold.transfer_id, request_id = hold.request_id, end = end.label(), "hold ended");
            self.metrics.hold_ended(end);
            if hold.end == TableEnd::Expired {
                self.actions.push(Action::Outcome(v1::TransferOutcome {
                    transfer_id: hold.transfer_id.as_bytes().to_vec().into(),
                    state: v1::TransferState::Expired.into(),
                    bytes: 0,
                    seconds: 0.0,
                    error: hold.end.code().name().to_owned(),
                }));
            }
            // The connectors of an ended life take all back when they are cut off.
            if epoch.is_some() && epoch == current {
                request_ids.push(hold.request_id);
            }
        }
        if request_ids.is_empty() {
            return;
        }
        for worker in self.life.iter().flat_map(|life| life.workers.values()) {
            let released = ToConnector::Released { request_ids: request_ids.clone() };
            self.actions.push(Action::Send(worker.conn, released));
        }
    }
}

/// What is wrong with these blocks of an engine that has so many.
fn beyond(block_ids: &[u32], num_blocks: u64) -> Option<String> {
    let block = block_ids.iter().find(|block| u64::from(**block) >= num_blocks)?;
    Some(format!("block {block} of {num_blocks}"))
}
