//! The two legs of a handoff, sent by the suite in the coordinator's place, so that things can happen between
//! them.

use anyhow::{Context as _, ensure};
use baton_fleet::Client;
use baton_proto::plan::{Action, Held, KvTransferParams, Source, TransferPlan, VERSION};
use baton_proto::{EngineId, TransferId};
use serde_json::Value;

use crate::ask::Ask;

/// A prompt that an engine has computed and holds.
#[derive(Clone, Debug)]
pub struct HeldPrompt {
    /// Who holds it.
    pub engine: EngineId,
    /// What its connector said.
    pub held: Held,
}

fn params(transfer_id: TransferId, action: Action) -> anyhow::Result<Value> {
    let plan = TransferPlan { version: VERSION, transfer_id, action };
    Ok(serde_json::to_value(KvTransferParams { baton: plan })?)
}

/// Has an engine compute the request's prompt and hold it.
pub async fn hold(
    server: &Client,
    engine: EngineId,
    transfer_id: TransferId,
    ask: &Ask,
    lease_ms: u32,
) -> anyhow::Result<HeldPrompt> {
    let mut body = ask.body.clone();
    body["max_tokens"] = 1.into();
    body["stream"] = false.into();
    body["kv_transfer_params"] = params(transfer_id, Action::Hold { lease_ms })?;
    let answer = server.post(ask.path(), &body, &[]).await?.ok().context("hold leg")?.json()?;
    let held: KvTransferParams<Held> = serde_json::from_value(answer["kv_transfer_params"].clone())
        .with_context(|| format!("hold leg: kv_transfer_params {}", answer["kv_transfer_params"]))?;
    let held = held.baton;
    ensure!(held.transfer_id == transfer_id, "hold leg: answered for transfer {}", held.transfer_id);
    Ok(HeldPrompt { engine, held })
}

/// The request with a plan to pull what is held, from `address`.
pub fn pulling(ask: &Ask, held: &HeldPrompt, address: &str, deadline_ms: u32) -> anyhow::Result<Ask> {
    let source =
        Source { engine_id: held.engine.clone(), address: address.to_owned(), epoch: held.held.epoch };
    let action = Action::Pull { source, num_tokens: held.held.num_tokens, deadline_ms };
    Ok(ask.clone().with("kv_transfer_params", params(held.held.transfer_id, action)?))
}
