//! The decode engine's client goes away in the middle of a transfer.

use super::{LONG_DEADLINE, conclude, slow_relay, start_pull};
use crate::bed::Bed;
use crate::report::Line;

/// The suite cannot tell the agent to drop a hold, as a coordinator does: a short lease ends it.
const LEASE_MS: u32 = 6_000;

pub(in crate::scenarios) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let mut line = Line::new("fault.client_gone");
    let (ask, expected) = bed.fresh(bed.scale.fault_tokens).await?;
    let before = bed.counters().await?;
    let held = bed.hold(Bed::PREFILL, &ask, LEASE_MS).await?;
    let (relay, third) = slow_relay(bed, expected.prompt_tokens).await?;
    let pull = start_pull(bed, &ask, &held, &relay, LONG_DEADLINE)?;
    relay.passed(third, bed.scale.patience).await?;
    pull.abort();
    line.figure("bytes_before", relay.bytes_to_client());
    let settled = bed.settled().await;
    line.check(settled.is_ok(), || format!("after the client went: {:#}", settled.unwrap_err()));
    let after = bed.counters().await?;
    super::expect_failed_pull(&mut line, &before, &after, Bed::DECODE);

    // Half of the blocks had arrived: none of them may be taken for the prompt's KV now.
    let answer = ask.send(&bed.engine(Bed::DECODE), &[]).await;
    conclude(bed, &mut line, answer, &expected).await;
    Ok(vec![line])
}
