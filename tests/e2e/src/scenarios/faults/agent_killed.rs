//! The prefill engine's agent is killed in the middle of a transfer, and comes back.

use anyhow::Context as _;
use baton_fleet::Part;

use super::{
    LONG_DEADLINE, LONG_LEASE_MS, conclude, expect_completed_pull, expect_failed_pull, slow_relay, start_pull,
};
use crate::bed::Bed;
use crate::report::Line;

pub(in crate::scenarios) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let mut killed = Line::new("fault.agent_killed");
    let (ask, expected) = bed.fresh(bed.scale.fault_tokens).await?;
    let engine = bed.fleet.pid(Part::Engine(Bed::PREFILL));
    let before = bed.counters().await?;
    let held = bed.hold(Bed::PREFILL, &ask, LONG_LEASE_MS).await?;
    let (relay, third) = slow_relay(bed, expected.prompt_tokens).await?;
    let pull = start_pull(bed, &ask, &held, &relay, LONG_DEADLINE)?;
    relay.passed(third, bed.scale.patience).await?;
    bed.fleet.kill(Part::Agent(Bed::PREFILL));
    killed.figure("bytes_before", relay.bytes_to_client());
    let answer = pull.await?;
    let after = bed.counters().await?;
    expect_failed_pull(&mut killed, &before, &after, Bed::DECODE);
    conclude(bed, &mut killed, answer, &expected).await;

    let mut back = Line::new("fault.agent_restarted");
    bed.fleet.restart(Part::Agent(Bed::PREFILL)).await.context("restart of the agent")?;
    let (ask, expected) = bed.fresh(bed.scale.fault_tokens).await?;
    let before = bed.counters().await?;
    let again = bed.hold(Bed::PREFILL, &ask, LONG_LEASE_MS).await?;
    let answer = bed.pull(Bed::DECODE, &ask, &again, bed.transfer_address(Bed::PREFILL)).await;
    let after = bed.counters().await?;
    expect_completed_pull(&mut back, &before, &after, Bed::DECODE);
    back.check(again.held.epoch > held.held.epoch, || {
        format!("epoch {} after the restart, {} before", again.held.epoch, held.held.epoch)
    });
    back.check(engine.is_some() && bed.fleet.pid(Part::Engine(Bed::PREFILL)) == engine, || {
        "the engine was restarted too".into()
    });
    back.figure("epoch_grew", again.held.epoch > held.held.epoch);
    conclude(bed, &mut back, answer, &expected).await;
    Ok(vec![killed, back])
}
