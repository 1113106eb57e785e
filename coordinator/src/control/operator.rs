//! Operators' read-only calls.

use baton_coordinator_core::fleet::Role;
use baton_coordinator_core::placement::{self, Decider};
use baton_proto::ContentKeys;
use baton_proto::control::v1;
use tonic::Status;

use crate::dispatch::Prompt;
use crate::state::Coordinator;

/// Most options in an answer.
const MAX_OPTIONS: usize = 1024;

/// What the placement would choose.
pub(super) fn route(coordinator: &Coordinator, request: v1::RouteRequest) -> Result<v1::RouteReply, Status> {
    let keys = ContentKeys {
        lora: Some(request.lora).filter(|name| !name.is_empty()),
        salt: Some(request.cache_salt).filter(|salt| !salt.is_empty()),
        multimodal: Vec::new(),
    };
    let max_tokens = Some(u64::from(request.max_tokens)).filter(|tokens| *tokens > 0);
    let prompt = Prompt::of_tokens(request.token_ids, keys);
    let policy = coordinator.config.policy.0;
    let fleet = coordinator.fleet(policy);
    let found = prompt.find(&fleet, &request.model, &coordinator.index);
    let wanted = placement::Request {
        max_tokens,
        splittable: prompt.splittable(),
        seed: coordinator.decisions.next_seed(),
        prefix_key: found.prefix_key,
        fresh_key: found.fresh_key,
        ..placement::Request::new(&request.model, prompt.tokens(), &found.overlaps)
    };
    let mut decider = Decider::new();
    let Some(decision) = decider.decide(policy, &fleet, &wanted) else {
        let reasons: Vec<String> =
            placement::skipped(&fleet, &wanted).iter().map(|(id, why)| format!("{id}: {why:?}")).collect();
        return Err(Status::unavailable(format!("no engine can serve {}: {reasons:?}", request.model)));
    };
    let explained = decider.explain(policy, &fleet, &wanted, &decision, MAX_OPTIONS);
    let options = explained.options.into_iter().map(|option| v1::PlacementOption {
        mode: option.mode.to_owned(),
        prefill_engine: option.prefill.to_string(),
        decode_engine: option.decode.to_string(),
        hit_tokens: option.hit_tokens,
        terms: option
            .priced
            .terms
            .iter()
            .map(|(term, seconds)| v1::CostTerm { name: term.name().to_owned(), seconds })
            .collect(),
        total_seconds: option.priced.seconds,
        why_not: option.why_not.unwrap_or_default(),
    });
    Ok(v1::RouteReply { options: options.collect() })
}

/// The present view of the fleet.
pub(super) fn fleet(coordinator: &Coordinator) -> v1::FleetReply {
    let status = |entry: std::sync::Arc<crate::registry::Entry>| v1::EngineStatus {
        registration: Some(entry.registration().message.clone()),
        load: Some(entry.reported()),
        owned_blocks: coordinator.index.blocks_of(entry.slot),
        healthy: entry.healthy(),
        part: part(coordinator.part(entry.slot)).into(),
    };
    v1::FleetReply { engines: coordinator.registry.entries().into_iter().map(status).collect() }
}

fn part(role: Option<Role>) -> v1::Role {
    match role {
        None => v1::Role::Unspecified,
        Some(Role::Both) => v1::Role::Both,
        Some(Role::Prefill) => v1::Role::Prefill,
        Some(Role::Decode | Role::DecodeOnly) => v1::Role::Decode,
    }
}
