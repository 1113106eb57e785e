//! An engine that takes time: as long as the coordinator assumes of one that it has not measured.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use baton_coordinator_core::speed::PRIOR;
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{Duration, Instant, sleep_until};
use tokio_stream::wrappers::UnboundedReceiverStream;

/// A request on the engine.
struct Sequence {
    prompt: u64,
    /// Tokens that it has yet to be given.
    left: u64,
    /// Each is a token.
    tokens: UnboundedSender<()>,
    /// Whether the prompt is here already.
    pulled: bool,
}

/// Starts one, and gives its URL. It computes one prompt in a step, and gives each sequence that decodes a token with each step: so these are
/// held up by prompts.
pub async fn start() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (arriving, came) = unbounded_channel();
    tokio::spawn(compute(came));
    let app = Router::new().fallback(answer).with_state(arriving);
    tokio::spawn(async move { axum::serve(listener, app).await });
    url
}

async fn compute(mut arriving: UnboundedReceiver<Sequence>) {
    let (mut prompts, mut decoding) = (VecDeque::new(), Vec::<Sequence>::new());
    // Steps follow one another without a gap, however late the machine wakes this task: what is late by itself is not passed on.
    let mut now = Instant::now();
    loop {
        if prompts.is_empty() && decoding.is_empty() {
            let Some(sequence) = arriving.recv().await else { return };
            now = Instant::now();
            prompts.push_back(sequence);
        }
        prompts.extend(std::iter::from_fn(|| arriving.try_recv().ok()));
        let pulled = prompts.iter().filter(|sequence| sequence.pulled).count();
        decoding.extend((0..pulled).filter_map(|_| {
            let at = prompts.iter().position(|sequence| sequence.pulled)?;
            prompts.remove(at)
        }));
        let mut seconds = 0.0;
        if !decoding.is_empty() {
            let context: u64 = decoding.iter().map(|sequence| sequence.prompt).sum();
            seconds += PRIOR.decode_step_seconds(decoding.len() as f64, context as f64);
        }
        let computed = prompts.pop_front();
        if let Some(sequence) = &computed {
            seconds += PRIOR.prefill_seconds(sequence.prompt, 0);
        }
        now += Duration::from_secs_f64(seconds);
        sleep_until(now).await;
        decoding.extend(computed);
        // Those whose client has left go as well.
        decoding.retain_mut(|sequence| {
            sequence.left -= 1;
            sequence.tokens.send(()).is_ok() && sequence.left > 0
        });
    }
}

async fn answer(State(engine): State<UnboundedSender<Sequence>>, body: Bytes) -> Response {
    let request: Value = serde_json::from_slice(&body).unwrap();
    let plan = &request["kv_transfer_params"]["baton"];
    let prompt = request["prompt"].as_array().map_or(1, Vec::len) as u64;
    let (tokens, given) = unbounded_channel();
    let left = request["max_tokens"].as_u64().unwrap_or(16);
    let pulled = plan["action"] == "pull";
    engine.send(Sequence { prompt, left, tokens, pulled }).unwrap();
    let mut given = UnboundedReceiverStream::new(given);
    if request["stream"] == true {
        let events = given.map(|()| "data: {\"choices\":[{\"index\":0,\"text\":\"t\"}]}\n\n");
        let done = futures::stream::iter(["data: [DONE]\n\n"]);
        let events = events.chain(done).map(|event| Ok::<_, Infallible>(Bytes::from(event)));
        return ([("content-type", "text/event-stream")], Body::from_stream(events)).into_response();
    }
    while given.next().await.is_some() {}
    let mut reply = json!({ "choices": [{ "index": 0, "text": "t", "finish_reason": "length" }] });
    if plan["action"] == "hold" {
        let held = json!({ "transfer_id": plan["transfer_id"], "epoch": 1, "num_tokens": prompt });
        reply["kv_transfer_params"] = json!({ "baton": held });
    }
    axum::Json(reply).into_response()
}
