//! Two endpoints.

use std::sync::Arc;
use std::time::Duration;

use baton_kernels::{BlockMemory, EngineMemory, Guard};
use baton_kv_transfer::checksum::Checksums;
use baton_kv_transfer::{Endpoint, Limits, Peer, PullError, PullReport, PullRequest};
use baton_proto::wire::ErrorCode;

use super::{Authority, Shape, TableSource, endpoint, fill, id, peer, read, request};

/// Of every hold.
pub const LEASE: Duration = Duration::from_secs(60);

/// A holder of blocks 0 to 63 with known content, and a puller.
pub struct Two {
    pub shape: Shape,
    pub authority: Authority,
    pub source: Arc<TableSource>,
    pub holder: Endpoint,
    pub puller: Endpoint,
    pub theirs: Arc<EngineMemory>,
    pub ours: Arc<EngineMemory>,
}

impl Two {
    pub fn new(shape: Shape, holders: Limits, pullers: Limits) -> Self {
        let authority = Authority::new();
        let source = TableSource::new(1);
        let holder = endpoint(authority.issue("holder"), source.clone(), holders);
        let puller = endpoint(authority.issue("puller"), TableSource::new(1), pullers);
        let (theirs, ours) = (shape.memory(), shape.memory());
        fill(&theirs, 0..64, 5);
        Self { shape, authority, source, holder, puller, theirs, ours }
    }

    pub fn hold(&self, number: u8, block_ids: Vec<u32>) {
        self.source.hold(id(number), &self.theirs, self.shape, block_ids, LEASE);
    }

    pub fn hold_unchecked(&self, number: u8, block_ids: Vec<u32>) -> (Arc<Checksums>, Guard) {
        self.source.hold_unchecked(id(number), &self.theirs, self.shape, block_ids, LEASE)
    }

    pub fn peer(&self) -> Peer {
        peer("holder", &self.holder)
    }

    pub fn request(&self, number: u8, first: u32, blocks: u32) -> PullRequest {
        request(self.peer(), id(number), 1, self.shape, first, blocks)
    }

    pub async fn pull(&self, number: u8, blocks: Vec<u32>) -> Result<PullReport, PullError> {
        let request = self.request(number, 0, blocks.len() as u32);
        self.puller.pull(request, self.ours.clone(), blocks).await
    }

    /// Cancels and drops pulls 0 to 19, each a `step` later than the one before, and sees to it that none writes any more.
    pub async fn end_pulls_early(&self, step: Duration) {
        let blocks: Vec<u32> = (0..64).collect();
        for number in 0..20u8 {
            self.hold(number, blocks.clone());
            let pull = self.puller.pull(self.request(number, 0, 64), self.ours.clone(), blocks.clone());
            tokio::time::sleep(step * u32::from(number)).await;
            if number % 2 == 0 {
                pull.canceller().cancel();
                // It may have been over before.
                let result = pull.await;
                let cancelled = Err(PullError::Stopped(ErrorCode::Cancelled.into()));
                assert!(result.is_ok() || result == cancelled, "{result:?}");
            } else {
                drop(pull);
            }
            // From here on the memory is the engine's again.
            let mark = vec![0xab; self.shape.block_bytes()];
            for block in &blocks {
                self.ours.write(*block, 0, &mark).unwrap();
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
            for block in &blocks {
                assert!(read(&self.ours, *block) == mark, "written after the end of pull {number}");
            }
        }
    }
}
