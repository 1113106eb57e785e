//! The lease is over before the pull.

use super::{conclude, expect_failed_pull};
use crate::bed::Bed;
use crate::report::Line;

const LEASE_MS: u32 = 300;

pub(in crate::scenarios) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let mut line = Line::new("fault.lease_expired");
    let (ask, expected) = bed.fresh(bed.scale.fault_tokens).await?;
    let before = bed.counters().await?;
    let held = bed.hold(Bed::PREFILL, &ask, LEASE_MS).await?;
    let expired = async || {
        let now = bed.counters().await?;
        let expired = now.agent(&before, Bed::PREFILL, "baton_agent_holds_total", &[("result", "expired")]);
        Ok(if expired >= 1.0 { Ok(()) } else { Err("no expired hold is counted".into()) })
    };
    bed.until("the lease ends", expired).await?;
    let answer = bed.pull(Bed::DECODE, &ask, &held, bed.transfer_address(Bed::PREFILL)).await;
    let after = bed.counters().await?;
    expect_failed_pull(&mut line, &before, &after, Bed::DECODE);
    line.figure("baton_agent_holds_total.expired", 1);
    conclude(bed, &mut line, answer, &expected).await;
    Ok(vec![line])
}
