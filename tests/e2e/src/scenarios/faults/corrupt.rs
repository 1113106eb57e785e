//! Bytes that change on their way: in the source's memory after the hold, and in datagrams.

use anyhow::Context as _;
use baton_fleet::Part;

use super::{LONG_LEASE_MS, conclude, expect_completed_pull, expect_failed_pull};
use crate::bed::Bed;
use crate::memory::Snapshot;
use crate::relay::{Relay, Weather};
use crate::report::Line;

/// Every how many datagrams one has a flipped byte.
const FLIP_EVERY: u64 = 12;

/// One byte, and then every byte, of what the prompt wrote to the prefill engine's memory changes after the
/// hold: the blocks are found out on arrival and computed anew.
pub(in crate::scenarios) async fn block(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (name, everything) in [("fault.corrupt_block", false), ("fault.corrupt_all", true)] {
        let mut line = Line::new(name);
        let (ask, expected) = bed.fresh(bed.scale.fault_tokens).await?;
        let agent = bed.fleet.pid(Part::Agent(Bed::PREFILL)).context("the agent is down")?;
        bed.settled().await?;
        let memory = Snapshot::of_agent(agent)?;
        let before = bed.counters().await?;
        let held = bed.hold(Bed::PREFILL, &ask, LONG_LEASE_MS).await?;
        if everything {
            line.figure("bytes_flipped", memory.corrupt_all()?);
        } else {
            memory.corrupt_one_byte()?;
            line.figure("bytes_flipped", 1);
        }
        let answer = bed.pull(Bed::DECODE, &ask, &held, bed.transfer_address(Bed::PREFILL)).await;
        let after = bed.counters().await?;
        let corrupt = after.agent(&before, Bed::DECODE, "baton_agent_corrupt_blocks_total", &[]);
        let blocks = expected.prompt_tokens.div_ceil(bed.block_size());
        line.figure("blocks", blocks).figure("baton_agent_corrupt_blocks_total", corrupt);
        // A corrupt block is asked for once more before it is given up, and may be counted each time.
        let (least, most) = if everything { (blocks, 2 * blocks) } else { (1, 2) };
        line.check((least as f64..=most as f64).contains(&corrupt), || {
            format!("{corrupt} corrupt blocks counted, {least} to {most} expected")
        });
        expect_failed_pull(&mut line, &before, &after, Bed::DECODE);
        conclude(bed, &mut line, answer, &expected).await;
        // The prefill engine still has the damaged blocks in its prefix cache.
        bed.empty_caches().await?;
        lines.push(line);
    }
    Ok(lines)
}

/// A network that flips bytes: QUIC drops such datagrams and sends their content again.
pub(in crate::scenarios) async fn wire(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let mut line = Line::new("fault.wire_flip");
    let (ask, expected) = bed.fresh(bed.scale.fault_tokens).await?;
    let before = bed.counters().await?;
    let held = bed.hold(Bed::PREFILL, &ask, LONG_LEASE_MS).await?;
    let weather = Weather { flip_every: FLIP_EVERY, ..Weather::default() };
    let relay = Relay::start(bed.transfer_address(Bed::PREFILL), weather).await?;
    let answer = bed.pull(Bed::DECODE, &ask, &held, relay.address()).await;
    let after = bed.counters().await?;
    expect_completed_pull(&mut line, &before, &after, Bed::DECODE);
    let corrupt = after.agent(&before, Bed::DECODE, "baton_agent_corrupt_blocks_total", &[]);
    line.check(corrupt == 0.0, || format!("{corrupt} corrupt blocks passed QUIC"));
    line.check(relay.flipped() > 0, || "no datagram was damaged".into());
    line.figure("datagrams_flipped", relay.flipped()).figure("baton_agent_corrupt_blocks_total", corrupt);
    conclude(bed, &mut line, answer, &expected).await;
    Ok(vec![line])
}
