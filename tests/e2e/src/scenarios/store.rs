//! The coordinator's memory: a restart keeps who owns what, in either store, and etcd may go away for a while.

use anyhow::{Context as _, ensure};
use baton_fleet::{Fleet, FleetSpec, Part, Store};
use serde_json::Value;
use tokio::time::{Duration, Instant, sleep};

use crate::ask::Ask;
use crate::bed::Bed;
use crate::prompts::Prompts;
use crate::report::Line;

/// Hit tokens of the option that a dry run would take.
pub(super) fn predicted_hit(reply: &Value) -> anyhow::Result<u64> {
    reply["options"][0]["hit_tokens"]
        .as_u64()
        .with_context(|| format!("/v1/route: no options[0].hit_tokens in {reply}"))
}

pub(super) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    let embedded = embedded(bed).await;
    lines.push(embedded.unwrap_or_else(|error| Line::failed("store.embedded_restart", &error)));
    if bed.fleet.spec().store == Store::Etcd {
        let restart =
            restart(&mut bed.fleet, &mut bed.prompts, bed.scale.fault_tokens, "store.etcd_restart").await;
        lines.push(restart.unwrap_or_else(|error| Line::failed("store.etcd_restart", &error)));
        lines.push(etcd_down(bed).await.unwrap_or_else(|error| Line::failed("store.etcd_down", &error)));
    }
    Ok(lines)
}

/// On a fleet of its own: the store does not depend on the kind of engine.
async fn embedded(bed: &mut Bed) -> anyhow::Result<Line> {
    let mut fleet = Fleet::start(FleetSpec::mock(2)).await?;
    let line = restart(&mut fleet, &mut bed.prompts, 1000, "store.embedded_restart").await;
    fleet.shutdown().await?;
    line
}

/// Kills the coordinator and starts it again while the agents are frozen: what it knows then, it has from its store.
async fn restart(
    fleet: &mut Fleet,
    prompts: &mut Prompts,
    tokens: usize,
    name: &str,
) -> anyhow::Result<Line> {
    let mut line = Line::new(name);
    let ask = serve_one(fleet, prompts, tokens, &mut line).await?;
    let before = predicted(fleet, &ask).await?;
    let blocks = index_blocks(fleet).await?;
    // The store is written in batches.
    sleep(Duration::from_secs(2)).await;

    fleet.kill(Part::Coordinator);
    let agents: Vec<Part> = fleet.parts().into_iter().filter(|part| matches!(part, Part::Agent(_))).collect();
    for agent in &agents {
        fleet.pause(*agent);
    }
    fleet.start_part(Part::Coordinator)?;
    let restored = within(Duration::from_secs(10), async || {
        let now = index_blocks(fleet).await?;
        ensure!(now >= blocks, "{now} of {blocks} blocks");
        Ok(now)
    })
    .await;
    for agent in &agents {
        fleet.resume(*agent);
    }
    line.check(restored.is_ok(), || format!("before any agent spoke: {:#}", restored.as_ref().unwrap_err()));
    fleet.wait_ready().await?;
    let after = predicted(fleet, &ask).await?;
    line.check(after >= before && before > 0, || {
        format!("a hit of {after} tokens predicted after the restart, {before} before")
    });
    line.figure("blocks_before", blocks)
        .figure("blocks_restored", restored.unwrap_or_default())
        .figure("hit_tokens_before", before)
        .figure("hit_tokens_after", after);
    Ok(line)
}

/// Requests are served while etcd is down, and what they leave is kept once it is back.
async fn etcd_down(bed: &mut Bed) -> anyhow::Result<Line> {
    let mut line = Line::new("store.etcd_down");
    bed.fleet.kill(Part::Etcd);
    let mut served = 0;
    let mut asks = Vec::new();
    for policy in ["adaptive", "colocated", "disaggregated"] {
        let (ask, expected) = bed.fresh(200).await?;
        let answer = ask
            .send(&bed.coordinator(), &[("x-baton-policy", policy)])
            .await
            .context("while etcd is down")?;
        line.check(answer.same(&expected), || format!("{policy}: {}", answer.difference(&expected)));
        line.check(policy == "adaptive" || answer.header("x-baton-mode") == policy, || {
            format!("{policy} was asked for, the answer says {:?}", answer.header("x-baton-mode"))
        });
        served += 1;
        asks.push(ask);
    }
    bed.fleet.restart(Part::Etcd).await?;
    let prompts = &mut bed.prompts;
    let again = restart(&mut bed.fleet, prompts, 200, "again").await?;
    line.check(again.ok, || format!("after etcd's return: {}", again.why));
    let kept = predicted(&bed.fleet, &asks[0]).await?;
    line.check(kept > 0, || "what was computed while etcd was down is forgotten after a restart".into());
    line.figure("served", served).figure("hit_tokens_kept", kept);
    Ok(line)
}

/// Serves a fresh prompt, and waits until the coordinator predicts a hit for it.
async fn serve_one(
    fleet: &Fleet,
    prompts: &mut Prompts,
    tokens: usize,
    line: &mut Line,
) -> anyhow::Result<Ask> {
    let client = fleet.client();
    let (text, count) = prompts.fit(&client, fleet.model(), tokens).await?;
    let ask = Ask::completion(fleet.model(), text, 4);
    ask.send(&client, &[]).await?;
    line.figure("prompt_tokens", count);
    within(Duration::from_secs(10), async || {
        let hit = predicted(fleet, &ask).await?;
        ensure!(hit + 64 >= count as u64, "{hit} of {count} tokens predicted");
        Ok(())
    })
    .await?;
    Ok(ask)
}

async fn predicted(fleet: &Fleet, ask: &Ask) -> anyhow::Result<u64> {
    predicted_hit(&fleet.client().post("/v1/route", &ask.wire_body(), &[]).await?.ok()?.json()?)
}

async fn index_blocks(fleet: &Fleet) -> anyhow::Result<u64> {
    let metrics = fleet.metrics(Part::Coordinator).await?;
    Ok(metrics.get("baton_index_blocks", &[]).context("no baton_index_blocks")? as u64)
}

/// Tries until it succeeds, or returns the last error.
async fn within<T>(
    patience: Duration,
    mut attempt: impl AsyncFnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}
