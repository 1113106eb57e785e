//! Pulls into the engine's blocks: begun when a worker asks, given up when their request is over, and told of when they end.

use std::time::{Duration, Instant};

use baton_kv_transfer::{Peer, PullError, PullReport, PullRequest};
use baton_proto::connector::{Pull, ToConnector};
use baton_proto::control::v1;
use baton_proto::wire::ErrorCode;
use baton_proto::{BlockHash, Epoch, TransferId};

use super::{Action, ConnId, Core, MAX_LEASE, MAX_PULLS, Now, PullId, lock};

/// Most cancelled requests that are remembered, the latest.
const MAX_CANCELLED: usize = 1024;

/// A pull under way.
pub(super) struct Running {
    pub(super) epoch: Epoch,
    pub(super) conn: ConnId,
    pub(super) rank: u32,
    pub(super) ranks: u32,
    pub(super) request_id: String,
    pub(super) transfer_id: TransferId,
    pub(super) source: String,
    pub(super) block_ids: Vec<u32>,
    pub(super) started: Instant,
}

impl Core {
    pub(super) fn pull(&mut self, now: Now, conn: ConnId, rank: u32, pull: Pull, hashes: Vec<BlockHash>) {
        let Some(life) = &self.life else { return };
        let Some(ready) = life.workers.get(&rank).and_then(|worker| worker.ready.as_ref()) else {
            return self.refuse(now, conn, "pull: came before this worker's memory was accepted".into());
        };
        let Pull { request_id, transfer_id, source, deadline_ms, first_block, block_ids, .. } = pull;
        let wanted = hashes.len().saturating_sub(first_block as usize);
        let num_blocks = life.shape.num_blocks;
        let problem = if life.cancelled.contains(&request_id) {
            Some((ErrorCode::Cancelled, "the request is over".to_owned()))
        } else if block_ids.is_empty() || wanted != block_ids.len() {
            let problem = format!("{} blocks from {first_block} of {}", block_ids.len(), hashes.len());
            Some((ErrorCode::Range, problem))
        } else if let Some(block) = block_ids.iter().find(|block| u64::from(**block) >= num_blocks) {
            Some((ErrorCode::Range, format!("block {block} of {num_blocks}")))
        } else if self.pulls.len() >= MAX_PULLS {
            Some((ErrorCode::Busy, format!("{MAX_PULLS} pulls are under way")))
        } else {
            None
        };
        let (Some(last_hash), None) = (hashes.last(), &problem) else {
            let (code, problem) = problem.unwrap_or((ErrorCode::Range, "no content".to_owned()));
            let error = format!("{}: {problem}", code.name());
            tracing::warn!(%transfer_id, request_id, error, "pull refused");
            self.metrics.pull_ended(code.name(), Duration::ZERO, Duration::ZERO);
            let done = ToConnector::PullDone { request_id, failed_blocks: block_ids, error };
            self.actions.push(Action::Send(conn, done));
            return;
        };
        let id = PullId(self.next_pull);
        self.next_pull += 1;
        let request = PullRequest {
            peer: Peer { engine_id: source.engine_id.clone(), address: source.address },
            transfer_id,
            epoch: source.epoch,
            layout: ready.layout.blocks.clone(),
            dtype: self.dtype,
            first_block,
            last_hash: *last_hash,
            rank,
            ranks: life.shape.tp_size,
            deadline: Duration::from_millis(deadline_ms.into()).min(MAX_LEASE),
        };
        self.actions.push(Action::Pull(id, request, ready.memory.clone(), block_ids.clone()));
        let running = Running {
            epoch: life.epoch,
            conn,
            rank,
            ranks: life.shape.tp_size,
            request_id,
            transfer_id,
            source: source.engine_id.into(),
            block_ids,
            started: now.instant,
        };
        self.pulls.insert(id, running);
    }

    pub(super) fn cancel(&mut self, request_id: String) {
        let Some(life) = &mut self.life else { return };
        lock(&self.table).cancel(&request_id);
        for (id, pull) in &self.pulls {
            if pull.epoch == life.epoch && pull.request_id == request_id {
                self.actions.push(Action::CancelPull(*id));
            }
        }
        if life.cancelled.len() == MAX_CANCELLED {
            life.cancelled.pop_front();
        }
        life.cancelled.push_back(request_id);
    }

    pub(super) fn pull_ended(&mut self, now: Now, id: PullId, result: Result<PullReport, PullError>) {
        let Some(pull) = self.pulls.remove(&id) else { return };
        let elapsed = now.instant.saturating_duration_since(pull.started);
        let blocks =
            |failed: &[usize]| failed.iter().filter_map(|i| pull.block_ids.get(*i).copied()).collect();
        let (name, error, failed_blocks, bytes): (_, _, Vec<u32>, _) = match &result {
            Ok(PullReport { stopped: Some(stopped), failed, bytes, .. }) => {
                let error =
                    format!("{stopped}; {} of {} blocks did not come", failed.len(), pull.block_ids.len());
                (stopped.name(), error, blocks(failed), *bytes)
            }
            Ok(report) if report.failed.is_empty() => ("", String::new(), Vec::new(), report.bytes),
            Ok(PullReport { failed, bytes, .. }) => {
                let error = format!("{} blocks arrived corrupt, twice", failed.len());
                (ErrorCode::CorruptBlock.name(), error, blocks(failed), *bytes)
            }
            Err(error) => (error.name(), error.to_string(), pull.block_ids.clone(), 0),
        };
        let (transfer_id, request_id) = (pull.transfer_id, &pull.request_id);
        if name.is_empty() {
            tracing::debug!(%transfer_id, request_id, rank = pull.rank, bytes, ?elapsed, "pulled");
        } else {
            tracing::warn!(%transfer_id, request_id, rank = pull.rank, source = pull.source, error, "pull failed");
        }
        let waited = result.as_ref().map_or(Duration::ZERO, |report| report.waited);
        self.metrics.pull_ended(name, elapsed, waited);
        self.actions.extend(link_sample(&pull.source, elapsed, &result).map(Action::Link));
        let outcome = self.outcomes.rank_ended(transfer_id, pull.ranks, bytes, elapsed, name);
        self.actions.extend(outcome.map(Action::Outcome));
        if self.connections.contains_key(&pull.conn) {
            let done = ToConnector::PullDone { request_id: pull.request_id, failed_blocks, error };
            self.actions.push(Action::Send(pull.conn, done));
        }
    }
}

/// What a pull says of the link that it crossed.
fn link_sample(
    source: &str,
    elapsed: Duration,
    result: &Result<PullReport, PullError>,
) -> Option<v1::LinkSample> {
    let sample = |bytes, took: Duration, rtt: Duration, given_up| v1::LinkSample {
        source: source.to_owned(),
        bytes,
        seconds: took.as_secs_f64(),
        rtt_seconds: rtt.as_secs_f64(),
        given_up,
    };
    match result {
        Ok(PullReport { bytes, elapsed, waited, rtt, stopped, .. }) => {
            let given_up = matches!(stopped, Some(PullError::Stopped(_)));
            (*bytes > 0 || given_up).then(|| sample(*bytes, elapsed.saturating_sub(*waited), *rtt, given_up))
        }
        Err(PullError::Unreachable { .. }) => Some(sample(0, elapsed, Duration::ZERO, true)),
        Err(_) => None,
    }
}
