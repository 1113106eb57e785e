//! Pulls of prompts that are still being computed, over QUIC and from memory to memory.

mod support;

use std::time::Duration;

use baton_kv_transfer::{HoldEnd, Limits, PullError};
use baton_proto::wire::ErrorCode;
use support::two::{LEASE, Two};
use support::{Shape, fill, id, read};

const SHAPE: Shape = Shape { pieces: 6, piece_bytes: 4096, blocks: 64 };
/// Shorter than what these pulls wait for.
const STALL: Duration = Duration::from_millis(800);

fn both() -> [Two; 2] {
    [false, true].map(|direct| {
        let limits = Limits { direct, stall: STALL, ..Limits::default() };
        Two::new(SHAPE, limits.clone(), limits)
    })
}

#[tokio::test]
async fn blocks_come_as_they_are_computed() {
    for two in both() {
        // The lease is of the growth, not of the whole.
        let lease = Duration::from_millis(900);
        assert!(two.source.take(id(1), &two.theirs, two.shape, (vec![], 4), lease).is_empty());
        let started = std::time::Instant::now();
        let pull = two.puller.pull(two.request(1, 1, 3), two.ours.clone(), vec![10, 11, 12]);
        let computing = async {
            tokio::time::sleep(Duration::from_millis(600)).await;
            two.source.grow(id(1), 0, vec![40, 41]);
            tokio::time::sleep(Duration::from_millis(600)).await;
            // What lies there until then is nobody's.
            fill(&two.theirs, 42..44, 77);
            two.source.grow(id(1), 2, vec![42, 43]);
        };
        let (report, ()) = tokio::join!(pull, computing);
        let (report, took) = (report.unwrap(), started.elapsed());
        assert_eq!((report.failed.len(), report.corrupt), (0, 0));
        for (from, to) in [(41, 10), (42, 11), (43, 12)] {
            assert!(read(&two.ours, to) == read(&two.theirs, from), "block {from} at {to}");
        }
        // What the link took is a small part of it.
        assert!(report.waited > Duration::from_millis(1100) && report.waited < took, "{:?}", report.waited);
        assert_eq!(two.source.released().await.end, HoldEnd::Finished);
        assert_eq!(two.source.report().await.checksums, report.checksums);
    }
}

#[tokio::test]
async fn a_request_that_ends_early_ends_the_pull_of_its_prompt() {
    for (two, direct) in both().into_iter().zip([false, true]) {
        two.source.take(id(1), &two.theirs, two.shape, (vec![], 2), LEASE);
        let pull = two.puller.pull(two.request(1, 0, 2), two.ours.clone(), vec![0, 1]);
        let computing = async {
            two.source.grow(id(1), 0, vec![7]);
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(two.source.table.lock().unwrap().cancel(&id(1).to_string()));
            two.source.released().await
        };
        let (result, released) = tokio::join!(pull, computing);
        let refused = PullError::Refused(ErrorCode::Released.into());
        match direct {
            true => assert_eq!(result, Err(refused)),
            // What has travelled is kept.
            false => {
                let report = result.unwrap();
                assert_eq!((report.stopped, report.failed), (Some(refused), vec![1]));
                assert!(read(&two.ours, 0) == read(&two.theirs, 7));
            }
        }
        assert_eq!(released.end, HoldEnd::Released);
    }
}

#[tokio::test]
async fn what_came_before_the_deadline_is_kept() {
    let [two, _] = both();
    two.source.take(id(1), &two.theirs, two.shape, (vec![], 4), LEASE);
    let mut request = two.request(1, 0, 4);
    request.deadline = Duration::from_millis(500);
    let pull = two.puller.pull(request, two.ours.clone(), vec![10, 11, 12, 13]);
    let computing = async { two.source.grow(id(1), 0, vec![40, 41]) };
    let (report, ()) = tokio::join!(pull, computing);
    let report = report.unwrap();
    assert_eq!(report.stopped, Some(PullError::Stopped(ErrorCode::Deadline.into())));
    assert_eq!((report.failed, report.bytes), (vec![2, 3], 2 * SHAPE.block_bytes() as u64));
    assert_eq!(report.checksums[2..], [0, 0]);
    for (from, to) in [(40, 10), (41, 11)] {
        assert!(read(&two.ours, to) == read(&two.theirs, from), "block {from} at {to}");
    }
    // The link is not to blame.
    let on_the_way = report.elapsed - report.waited;
    assert!(on_the_way < Duration::from_millis(250), "{:?} of {:?}", report.waited, report.elapsed);
    assert_eq!(two.source.released().await.end, HoldEnd::Finished, "the puller does not come back");
}
