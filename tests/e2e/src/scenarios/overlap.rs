//! Handoffs of prompts that are computed in chunks, over QUIC, on a fleet of its own: the answer is asked for while the prompt is
//! computed, its KV travels chunk by chunk, and a client that leaves meanwhile leaves nothing behind.

use std::net::UdpSocket;
use std::time::Duration;

use anyhow::Context as _;
use baton_fleet::{EngineKind, EngineSpec, Fleet, FleetSpec, Part, Role};

use crate::ask::{Answer, Ask};
use crate::audit;
use crate::bed::{self, Bed};
use crate::relay::{Relay, Weather};
use crate::report::Line;

/// Prompts.
const PROMPTS: usize = 4;
/// Tokens that the engines compute in a step: the prompts take several.
const CHUNK: usize = 64;
/// Of the link between the agents: a prompt's KV takes about as long on it as on the way through the engine.
const BYTES_PER_SECOND: u64 = 30_000_000;

pub(super) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let like = bed.fleet.spec();
    let mut kind = like.engines[Bed::DECODE].kind.clone();
    let args = match &mut kind {
        EngineKind::Vllm(vllm) => &mut vllm.args,
        EngineKind::Mock(mock) => &mut mock.args,
    };
    args.extend(["--max-num-batched-tokens".to_owned(), CHUNK.to_string()]);
    args.extend(["--max-num-seqs", "8"].map(str::to_owned));
    let port = UdpSocket::bind("127.0.0.1:0")?.local_addr()?.port();
    // Within a host the blocks would be copied from memory to memory.
    let weather = Weather { bytes_per_second: Some(BYTES_PER_SECOND), ..Weather::default() };
    let relay = Relay::start(([127, 0, 0, 1], port).into(), weather).await?;
    let from = EngineSpec {
        transfer_port: Some(port),
        advertise: Some(relay.address().to_string()),
        ..EngineSpec::new("from", kind.clone()).role(Role::Prefill)
    };
    let to = EngineSpec::new("to", kind).role(Role::Decode);
    let mut spec = FleetSpec::new(vec![from, to], like.model.clone(), &like.served_name);
    spec.bin_dir.clone_from(&like.bin_dir);
    spec.log.clone_from(&like.log);

    let mut asks = Vec::new();
    for i in 0..PROMPTS {
        let ask = bed.fresh_ask(bed.scale.longest - i * CHUNK / 2).await?.streamed();
        let expected = ask.send(&bed.plain(), &[]).await.context("the plain engine")?;
        asks.push((ask, expected));
    }
    let left = bed.fresh_ask(bed.scale.longest).await?;
    let fleet = Fleet::start(spec).await?;
    let outcome = hand_over(&fleet, &asks, &left, bed.scale.patience).await;
    let stopped = fleet.shutdown().await;
    let line = outcome?;
    stopped?;
    Ok(vec![line])
}

async fn hand_over(
    fleet: &Fleet,
    asks: &[(Ask, Answer)],
    left: &Ask,
    patience: Duration,
) -> anyhow::Result<Line> {
    const TO: usize = 1;
    let mut line = Line::new("overlap");
    let (mut ids, mut last) = (Vec::new(), Duration::ZERO);
    for (i, (ask, expected)) in asks.iter().enumerate() {
        let answer = ask.send(&fleet.client(), &[("x-baton-policy", "disaggregated")]).await?;
        let mode = answer.header("x-baton-mode");
        line.check(mode == "disaggregated", || format!("prompt {i}: mode {mode:?}"));
        line.check(answer.same(expected), || format!("prompt {i}: {}", answer.difference(expected)));
        ids.push(answer.header("x-baton-transfer-id").to_owned());
        last = answer.ttft;
    }
    // Once the link is known to be slow, nothing is to be waited for.
    let coordinator = fleet.metrics(Part::Coordinator).await?;
    let overlapped = coordinator.sum("baton_handoffs_overlapped_total", &[]);
    line.check(overlapped > 0.0, || "every answer was asked for behind the prefill".to_owned());
    let agent = fleet.metrics(Part::Agent(TO)).await?;
    let bytes = agent.sum("baton_agent_received_bytes_total", &[]);

    // One that leaves while its prompt is computed.
    let headers = [("x-baton-policy", "disaggregated")];
    let gone = tokio::time::timeout(Duration::from_millis(100), left.send(&fleet.client(), &headers)).await;
    line.check(gone.is_err(), || "the prompt that was to be left was answered before".to_owned());
    bed::settled(fleet, patience).await.context("behind a client that left")?;

    let transfers = audit::read([0, TO].map(|i| fleet.log_path(Part::Agent(i))))?;
    let mut equal = 0;
    for id in &ids {
        let transfer = transfers.get(id).cloned().unwrap_or_default();
        let audit::Transfer { sent, received } = &transfer;
        equal += u64::from(sent == received && !sent.is_empty());
        line.check(sent == received && !sent.is_empty(), || format!("transfer {id:?}: {transfer:?}"));
    }
    // Of the last one, by when the link and the engine are known. Its prefill takes what the plain engine takes, or longer.
    let plain = asks.last().map_or(Duration::ZERO, |(_, expected)| expected.ttft);
    let alone = bytes / asks.len() as f64 / BYTES_PER_SECOND as f64;
    line.figure("transfers", ids.len()).figure("equal", equal).figure("overlapped", overlapped);
    line.figure("plain_ms", plain.as_millis() as u64).figure("transfer_alone_ms", (alone * 1e3) as u64);
    line.figure("handoff_ms", last.as_millis() as u64);
    Ok(line)
}
