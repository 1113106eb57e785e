//! KV that travels as fp8, where the operator of the engine that pulls asks for it: on a fleet of its own, of vLLM engines
//! with bf16 KV. The agents meet through a relay, since within a host nothing is packed.
//!
//! The agent that pulled reads the engine's memory back and packs it anew. That gives the bytes that were sent exactly where the
//! engine has what they stand for, and that is within the error of packing.

use std::net::UdpSocket;

use anyhow::Context as _;
use baton_fleet::{EngineKind, EngineSpec, Fleet, FleetSpec, Part, Role};

use crate::ask::Ask;
use crate::audit;
use crate::bed::Bed;
use crate::relay::{Relay, Weather};
use crate::report::Line;

/// Prompts.
const PROMPTS: usize = 4;

pub(super) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let like = bed.fleet.spec();
    // The KV of mock engines is no numbers.
    let EngineKind::Vllm(mut vllm) = like.engines[Bed::DECODE].kind.clone() else { return Ok(Vec::new()) };
    // Of two the last one counts.
    vllm.args.extend(["--dtype", "bfloat16"].map(str::to_owned));
    let kind = EngineKind::Vllm(vllm);
    let port = UdpSocket::bind("127.0.0.1:0")?.local_addr()?.port();
    let relay = Relay::start(([127, 0, 0, 1], port).into(), Weather::default()).await?;
    let from = EngineSpec {
        transfer_port: Some(port),
        advertise: Some(relay.address().to_string()),
        ..EngineSpec::new("from", kind.clone()).role(Role::Prefill)
    };
    let to = EngineSpec {
        agent_config: "[transfer]\nwire_dtype = \"fp8\"".parse()?,
        ..EngineSpec::new("to", kind).role(Role::Decode)
    };
    let mut spec = FleetSpec::new(vec![from, to], like.model.clone(), &like.served_name);
    spec.bin_dir.clone_from(&like.bin_dir);
    spec.log.clone_from(&like.log);

    let mut asks = Vec::new();
    for i in 0..PROMPTS {
        asks.push(bed.fresh_ask(bed.scale.fault_tokens * (i + 1) / PROMPTS).await?);
    }
    let fleet = Fleet::start(spec).await?;
    let outcome = hand_over(&fleet, &asks).await;
    let stopped = fleet.shutdown().await;
    let line = outcome?;
    stopped?;
    Ok(vec![line])
}

async fn hand_over(fleet: &Fleet, asks: &[Ask]) -> anyhow::Result<Line> {
    const TO: usize = 1;
    let mut line = Line::new("packed");
    let mut ids = Vec::new();
    for (i, ask) in asks.iter().enumerate() {
        let answer = ask.send(&fleet.client(), &[("x-baton-policy", "disaggregated")]).await?;
        let mode = answer.header("x-baton-mode");
        line.check(mode == "disaggregated", || format!("prompt {i}: mode {mode:?}"));
        ids.push(answer.header("x-baton-transfer-id").to_owned());
    }
    let engines = fleet.operator().fleet().await?;
    let registered = engines.iter().filter_map(|status| status.registration.as_ref());
    let to = registered.into_iter().find(|of| of.engine_id == "to").context("the engine is registered")?;
    let (stored, wire) = (to.block_bytes, to.wire_block_bytes);
    line.check(wire * 2 > stored && wire * 100 < stored * 52, || {
        format!("a block of {stored} bytes is said to take {wire} on its way")
    });

    let logs = [0, TO].map(|i| fleet.log_path(Part::Agent(i)));
    let transfers = audit::read(logs)?;
    let (mut equal, mut blocks) = (0, 0);
    for id in &ids {
        let transfer = transfers.get(id).cloned().unwrap_or_default();
        let audit::Transfer { sent, received } = &transfer;
        equal += u64::from(sent == received && !sent.is_empty());
        blocks += received.values().map(|(blocks, _)| *blocks).sum::<u64>();
        line.check(sent == received && !sent.is_empty(), || format!("transfer {id:?}: {transfer:?}"));
    }
    let agent = fleet.metrics(Part::Agent(TO)).await?;
    let counted = |name: &str| agent.sum(name, &[]) as u64;
    let received = counted("baton_agent_received_bytes_total");
    line.check(received == blocks * wire && blocks > 0, || {
        format!("{received} bytes received for {blocks} blocks of {wire}")
    });
    let packed = counted("baton_agent_packed_bytes_total");
    line.check(packed == received, || format!("{packed} of {received} bytes came packed"));
    line.figure("transfers", ids.len()).figure("equal", equal).figure("blocks", blocks);
    line.figure("block_bytes", stored).figure("wire_block_bytes", wire).figure("bytes", received);
    Ok(line)
}
