//! An engine is killed and restarted: once for three cases, since a real one takes a minute.
//!
//! - It was to decode what the coordinator is having prefilled right now: the coordinator retries elsewhere.
//! - It was to decode what is held on the other engine: once restarted it pulls and answers.
//! - It held a prompt itself: a pull for its earlier epoch is refused, and the other engine computes.

use anyhow::Context as _;
use baton_fleet::Part;
use tokio::time::{Duration, Instant, sleep};

use super::{LONG_LEASE_MS, conclude, expect_completed_pull, expect_failed_pull};
use crate::bed::Bed;
use crate::report::Line;

pub(in crate::scenarios) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let tokens = bed.scale.fault_tokens;
    let fresh = [bed.fresh(tokens).await?, bed.fresh(tokens).await?, bed.fresh(bed.scale.longest).await?];
    let [(ask0, expected0), (ask1, expected1), (under_way, expected_under_way)] = fresh;
    let held0 = bed.hold(0, &ask0, LONG_LEASE_MS).await?;
    let held1 = bed.hold(1, &ask1, LONG_LEASE_MS).await?;
    let before = bed.counters().await?;
    let coordinator_before = bed.coordinator_metrics().await?;

    // The coordinator chooses which engine prefills; the other one dies meanwhile.
    let mut lost = Line::new("fault.decode_engine_lost");
    let (coordinator, ask) = (bed.coordinator(), under_way.clone());
    let request =
        tokio::spawn(async move { ask.send(&coordinator, &[("x-baton-policy", "disaggregated")]).await });
    let survivor = prefilling(bed).await?;
    let victim = 1 - survivor;
    bed.fleet.kill(Part::Engine(victim));
    let answer = request.await?;
    if let Ok(answer) = &answer {
        let by = answer.header("x-baton-decode").to_owned();
        lost.figure("answered_by", by.clone());
        lost.check(bed.index_of(&by).is_ok_and(|i| i == survivor), || format!("{by:?} answered"));
    }
    let coordinator_after = bed.coordinator_metrics().await?;
    let counted: f64 = ["baton_retries_total", "baton_handoff_fallbacks_total"]
        .iter()
        .map(|name| coordinator_after.sum(name, &[]) - coordinator_before.sum(name, &[]))
        .sum();
    lost.figure("retries_and_fallbacks", counted);
    lost.check(counted >= 1.0, || {
        "neither baton_retries_total nor baton_handoff_fallbacks_total grew".into()
    });
    let same = answer.as_ref().is_ok_and(|answer| answer.same(&expected_under_way));
    lost.figure("same_tokens", same);
    lost.check(same, || match &answer {
        Ok(answer) => answer.difference(&expected_under_way),
        Err(error) => format!("the request failed: {error:#}"),
    });

    bed.fleet.restart(Part::Engine(victim)).await.context("restart of the engine")?;
    let ((ask, held, expected), (stale_ask, stale, stale_expected)) = if survivor == 0 {
        ((ask0, held0, expected0), (ask1, held1, expected1))
    } else {
        ((ask1, held1, expected1), (ask0, held0, expected0))
    };

    let mut restarted = Line::new("fault.decode_engine_restart");
    let pulling = bed.counters().await?;
    let answer = bed.pull(victim, &ask, &held, bed.transfer_address(survivor)).await;
    let after = bed.counters().await?;
    let (old, new) =
        (before.agent_gauge(victim, "baton_agent_epoch"), after.agent_gauge(victim, "baton_agent_epoch"));
    restarted.check(new > old, || format!("baton_agent_epoch is {new}, it was {old}"));
    restarted.figure("baton_agent_epoch_grew", new > old);
    expect_completed_pull(&mut restarted, &pulling, &after, victim);

    let mut stale_line = Line::new("fault.prefill_engine_restart");
    let pulling = bed.counters().await?;
    let stale_answer = bed.pull(survivor, &stale_ask, &stale, bed.transfer_address(victim)).await;
    let after = bed.counters().await?;
    expect_failed_pull(&mut stale_line, &pulling, &after, survivor);
    let dropped = after.agent(&before, victim, "baton_agent_holds_total", &[("result", "dropped")]);
    stale_line.figure("baton_agent_holds_total.dropped", dropped);
    stale_line.check(dropped >= 1.0, || "the lost hold is not counted as dropped".into());

    conclude(bed, &mut restarted, answer, &expected).await;
    conclude(bed, &mut stale_line, stale_answer, &stale_expected).await;
    let leaked = bed.settled().await;
    lost.figure("leaked", leaked.is_err());
    lost.check(leaked.is_ok(), || format!("{:#}", leaked.unwrap_err()));
    Ok(vec![lost, restarted, stale_line])
}

/// The engine that runs a request now.
async fn prefilling(bed: &Bed) -> anyhow::Result<usize> {
    let deadline = Instant::now() + bed.scale.patience;
    loop {
        for i in [0, 1] {
            let metrics = bed.fleet.metrics(Part::Engine(i)).await?;
            if metrics.sum("vllm:num_requests_running", &[]) > 0.0 {
                return Ok(i);
            }
        }
        anyhow::ensure!(Instant::now() < deadline, "no engine runs the prefill");
        sleep(Duration::from_millis(5)).await;
    }
}
