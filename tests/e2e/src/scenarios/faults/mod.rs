//! Faults on purpose. After each the request has ended with 200 and the plain engine's tokens, the fault is counted in a
//! metric, and no block stays in use.
//!
//! Where something has to happen between the legs of a handoff, or during it, the suite sends both legs itself.

mod agent_killed;
mod client_gone;
mod corrupt;
mod engine_restart;
mod late;
mod lease;

pub(super) use agent_killed::run as agent_killed;
pub(super) use client_gone::run as client_gone;
pub(super) use corrupt::{block as corrupt_block, wire as wire_flip};
pub(super) use engine_restart::run as engine_restart;
pub(super) use late::run as late;
pub(super) use lease::run as lease_expired;

use std::time::Duration;

use crate::ask::{Answer, Ask};
use crate::bed::{Bed, Counters};
use crate::relay::{Relay, Weather};
use crate::report::Line;

/// A lease that does not end during a test.
const LONG_LEASE_MS: u32 = 300_000;

/// Longer than any transfer takes.
const LONG_DEADLINE: Duration = Duration::from_secs(15);

/// How long a whole transfer over a slow link would take: long enough to hit its middle.
const SLOW_TRANSFER: Duration = Duration::from_secs(4);

/// Checks what has to hold after every fault: the same tokens, and nothing left in use.
async fn conclude(bed: &Bed, line: &mut Line, answer: anyhow::Result<Answer>, expected: &Answer) {
    match answer {
        Ok(answer) => {
            line.check(answer.same(expected), || answer.difference(expected));
            line.figure("same_tokens", answer.same(expected));
        }
        Err(error) => {
            line.check(false, || format!("the request failed: {error:#}"));
        }
    }
    let leaked = bed.settled().await;
    line.figure("leaked", leaked.is_err());
    line.check(leaked.is_ok(), || format!("{:#}", leaked.unwrap_err()));
}

/// Notes the failed pulls that the decode side's agent counted, and checks that there is one.
fn expect_failed_pull(line: &mut Line, before: &Counters, after: &Counters, decode: usize) {
    let errors = after.pull_errors(before, decode);
    line.figure("baton_agent_pulls_total.failed", errors.join(","));
    line.check(!errors.is_empty(), || "no failed pull in baton_agent_pulls_total".into());
}

/// Checks that the decode side's agent counted one pull as completed, and none as failed.
fn expect_completed_pull(line: &mut Line, before: &Counters, after: &Counters, decode: usize) {
    let completed = after.agent(before, decode, "baton_agent_pulls_total", &[("result", "completed")]);
    let errors = after.pull_errors(before, decode);
    line.check(completed == 1.0 && errors.is_empty(), || {
        format!("{completed} completed pulls instead of 1; failed: {}", errors.join(","))
    });
}

/// A relay to the prefill side's agent that is so slow that this request's KV takes [`SLOW_TRANSFER`], and how many bytes are
/// the first third of it.
async fn slow_relay(bed: &Bed, prompt_tokens: u64) -> anyhow::Result<(Relay, u64)> {
    let bytes = prompt_tokens.div_ceil(bed.block_size()) * bed.block_bytes().await?;
    let rate = (bytes as f64 / SLOW_TRANSFER.as_secs_f64()) as u64;
    let weather = Weather { bytes_per_second: Some(rate), ..Weather::default() };
    Ok((Relay::start(bed.transfer_address(Bed::PREFILL), weather).await?, bytes / 3))
}

/// Sends the pull leg in the background, with so much time for the transfer.
fn start_pull(
    bed: &Bed,
    ask: &Ask,
    held: &crate::legs::HeldPrompt,
    relay: &Relay,
    deadline: Duration,
) -> anyhow::Result<tokio::task::JoinHandle<anyhow::Result<Answer>>> {
    let deadline_ms = u32::try_from(deadline.as_millis())?;
    let ask = crate::legs::pulling(ask, held, &relay.address().to_string(), deadline_ms)?;
    let engine = bed.engine(Bed::DECODE);
    Ok(tokio::spawn(async move { ask.send(&engine, &[]).await }))
}
