//! The time for a transfer is over when a part of it has come: that is kept, and the engine computes the rest.

use super::{LONG_LEASE_MS, SLOW_TRANSFER, conclude, expect_failed_pull, slow_relay, start_pull};
use crate::bed::Bed;
use crate::report::Line;

pub(in crate::scenarios) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let mut line = Line::new("fault.late");
    let (ask, expected) = bed.fresh(bed.scale.fault_tokens).await?;
    let before = bed.counters().await?;
    let held = bed.hold(Bed::PREFILL, &ask, LONG_LEASE_MS).await?;
    let (relay, _) = slow_relay(bed, expected.prompt_tokens).await?;
    let answer = start_pull(bed, &ask, &held, &relay, SLOW_TRANSFER / 2)?.await?;
    line.figure("bytes_before", relay.bytes_to_client());
    let after = bed.counters().await?;
    expect_failed_pull(&mut line, &before, &after, Bed::DECODE);
    conclude(bed, &mut line, answer, &expected).await;
    Ok(vec![line])
}
