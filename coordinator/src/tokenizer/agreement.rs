//! Whether an engine makes the same tokens of a text as we do.
//!
//! Other tokens do not harm a request: the engine computes its own. But nothing of it is ever found in the index, and no cost is
//! right, so whoever runs the fleet is told when an engine registers.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use http_body_util::{BodyExt, Limited};
use serde_json::{Value, json};
use tracing::{debug, warn};

use super::Model;
use crate::dispatch::Endpoint;
use crate::http::{RequestBody, token_ids};
use crate::registry::Entry;
use crate::state::Coordinator;

/// An engine that takes longer to answer is not checked.
const PATIENCE: Duration = Duration::from_secs(20);
/// Largest answer.
const MAX_ANSWER: usize = 1 << 20;

/// Asks an engine that registered, in a task of its own.
pub fn check(coordinator: Arc<Coordinator>, entry: Arc<Entry>) {
    tokio::spawn(async move {
        let names = entry.registration().message.models.clone();
        let Some((name, model)) =
            names.iter().find_map(|name| Some((name.clone(), coordinator.models.get(name)?.clone())))
        else {
            return;
        };
        for (endpoint, probe) in probes(&name, &model) {
            let asked = tokio::time::timeout(PATIENCE, ask(&entry, &probe)).await;
            let Some(theirs) = asked.ok().flatten() else {
                debug!(engine = %entry.id, "its tokens were not compared with ours");
                continue;
            };
            let body = RequestBody::parse(probe.to_string().into()).expect("a probe is an object");
            let ours = token_ids(&model, endpoint, &body).unwrap_or_default();
            if ours != theirs {
                coordinator.metrics.token_mismatches.inc();
                warn!(
                    engine = %entry.id,
                    model = name,
                    path = endpoint.path(),
                    ours = ours.len(),
                    engines = theirs.len(),
                    "the engine makes other tokens of the same text, so nothing is found in its cache: \
                     models.path must hold the tokenizer and chat template that it serves"
                );
            }
        }
    });
}

fn probes(name: &str, model: &Model) -> Vec<(Endpoint, Value)> {
    let text = "The 2nd probe:  Größe, naïve, 你好 🙂\n\tx = f(1.25, 'it''s')\r\n";
    let mut probes = vec![(Endpoint::Completions, json!({ "model": name, "prompt": text }))];
    if model.can_chat().is_ok() {
        let messages = json!([
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": text },
            { "role": "assistant", "content": "Yes." },
            { "role": "user", "content": "Why?" },
        ]);
        probes.push((Endpoint::Chat, json!({ "model": name, "messages": messages })));
    }
    probes
}

/// The engine's own token ids, where it tells them.
async fn ask(entry: &Entry, probe: &Value) -> Option<Vec<u32>> {
    let body = probe.to_string().into();
    let response = entry.upstream().post("/tokenize", &HeaderMap::new(), body).await.ok()?;
    if !response.status().is_success() {
        return None;
    }
    let answer = Limited::new(response.into_body(), MAX_ANSWER).collect().await.ok()?.to_bytes();
    let mut answer: Value = serde_json::from_slice(&answer).ok()?;
    serde_json::from_value(answer["tokens"].take()).ok()
}
