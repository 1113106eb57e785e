//! The coordinator's HTTP is the engine's: errors, event streams and parameters come through unchanged, and a
//! client that goes away takes its work with it.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use baton_fleet::{Client, Part};
use serde_json::{Map, Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::ask::Ask;
use crate::bed::Bed;
use crate::report::Line;

pub(super) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (name, result) in [
        ("http.errors", errors(bed).await),
        ("http.sse", sse(bed).await),
        ("http.parameters", parameters(bed).await),
        ("http.disconnect", disconnect(bed).await),
    ] {
        lines.push(result.unwrap_or_else(|error| Line::failed(name, &error)));
    }
    Ok(lines)
}

/// Each bad request gets the status that the engine gives it, in OpenAI's shape.
async fn errors(bed: &Bed) -> anyhow::Result<Line> {
    let mut line = Line::new("http.errors");
    let model = bed.model();
    let endless = "word ".repeat(200_000);
    let chat = "/v1/chat/completions";
    let cases = [
        ("unknown model", "/v1/completions", json!({"model": "no-such-model", "prompt": "x"})),
        (
            "unknown model, chat",
            chat,
            json!({"model": "no-such-model", "messages": [{"role": "user", "content": "x"}]}),
        ),
        ("no prompt", "/v1/completions", json!({"model": model})),
        ("no messages", chat, json!({"model": model})),
        ("prompt of a wrong type", "/v1/completions", json!({"model": model, "prompt": {"a": 1}})),
        ("messages of a wrong type", chat, json!({"model": model, "messages": "hello"})),
        (
            "max_tokens of a wrong type",
            "/v1/completions",
            json!({"model": model, "prompt": "x", "max_tokens": "many"}),
        ),
        (
            "max_tokens below zero",
            "/v1/completions",
            json!({"model": model, "prompt": "x", "max_tokens": -1}),
        ),
        (
            "temperature below zero",
            "/v1/completions",
            json!({"model": model, "prompt": "x", "temperature": -1}),
        ),
        (
            "prompt beyond the context",
            "/v1/completions",
            json!({"model": model, "prompt": endless, "max_tokens": 1}),
        ),
        ("no object", "/v1/completions", json!([1, 2])),
    ];
    let mut bodies: Vec<(&str, &str, Vec<u8>)> =
        cases.iter().map(|(name, path, body)| (*name, *path, body.to_string().into_bytes())).collect();
    bodies.push(("malformed JSON", "/v1/completions", b"{\"model\": \"x\", \"prompt\": ".to_vec()));
    bodies.push(("empty body", chat, Vec::new()));
    bodies.push(("invalid UTF-8", "/v1/completions", b"{\"prompt\": \"\xff\xfe\"}".to_vec()));
    bodies.push(("unknown path", "/v1/nothing", b"{}".to_vec()));
    for policy in ["colocated", "disaggregated"] {
        for (name, path, body) in &bodies {
            let (theirs, _) = raw_post(&bed.plain(), path, body, policy).await?;
            let (ours, reply) = raw_post(&bed.coordinator(), path, body, policy).await?;
            line.check(ours == theirs, || {
                format!("{name} ({policy}): HTTP {ours}, the engine says {theirs}")
            });
            let error = &serde_json::from_slice::<Value>(&reply).unwrap_or_default()["error"];
            let shaped = error["message"].as_str().is_some_and(|message| !message.is_empty())
                && error["type"].is_string()
                && error["code"] == ours
                && error.get("param").is_some();
            // Where the engine has nothing against a request, there is no error to look at.
            line.check(shaped || ours < 400, || {
                format!("{name} ({policy}): not OpenAI's shape: {}", String::from_utf8_lossy(&reply))
            });
        }
    }
    line.figure("cases", bodies.len() * 2);
    Ok(line)
}

/// POSTs bytes as they are and returns status and body. The fleet's own client sends well-formed JSON only.
async fn raw_post(server: &Client, path: &str, body: &[u8], policy: &str) -> anyhow::Result<(u16, Vec<u8>)> {
    let address = server.base().trim_start_matches("http://");
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\nx-baton-policy: {policy}\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    // A server may answer, and stop reading, before it has the whole body.
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut answer))
        .await
        .with_context(|| format!("POST {path}: no answer"))??;
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").context("no end of the headers")?;
    let status = std::str::from_utf8(&answer[..end])?.split(' ').nth(1).context("no status")?.parse()?;
    // Chunked or not: the JSON object is from the first to the last brace.
    let body = &answer[end + 4..];
    let from = body.iter().position(|b| *b == b'{').unwrap_or(0);
    let to = body.iter().rposition(|b| *b == b'}').map_or(body.len(), |at| at + 1);
    Ok((status, body[from..to].to_vec()))
}

/// Streams come through event by event.
async fn sse(bed: &mut Bed) -> anyhow::Result<Line> {
    let mut line = Line::new("http.sse");
    let (mut events, mut streams) = (0, 0);
    for policy in ["colocated", "disaggregated"] {
        for chat in [false, true] {
            let ask = bed.fresh_ask(100).await?;
            let ask = if chat {
                let messages = json!([{"role": "user", "content": ask.body["prompt"]}]);
                Ask::chat(bed.model(), messages, bed.scale.answer_tokens)
            } else {
                ask
            };
            let ask = ask.streamed();
            let name = format!("{policy} {}", ask.path());
            let theirs = stream(&bed.plain(), &ask, policy).await?;
            let ours = stream(&bed.coordinator(), &ask, policy).await?;
            events += ours.len();
            streams += 1;
            // A reader that is late may get two tokens at once, but not all of them.
            line.check(2 * ours.len() > theirs.len(), || {
                format!("{name}: {} events instead of {}", ours.len(), theirs.len())
            });
            let outcome = same_events(&joined(&ours), &joined(&theirs));
            line.check(outcome.is_ok(), || format!("{name}: {}", outcome.unwrap_err()));
        }
    }
    line.figure("streams", streams).figure("events", events);
    Ok(line)
}

async fn stream(server: &Client, ask: &Ask, policy: &str) -> anyhow::Result<Vec<Value>> {
    let streamed = server.stream(ask.path(), &ask.wire_body(), &[("x-baton-policy", policy)]).await?;
    ensure!(streamed.done, "{}: the stream ended without [DONE]", server.base());
    Ok(streamed.events.into_iter().map(|event| comparable(event.data)).collect())
}

/// Events whose tokens follow one another, as one: an engine puts several tokens into an event when its reader is late.
fn joined(events: &[Value]) -> Vec<Value> {
    let mut joined: Vec<Value> = Vec::new();
    for event in events {
        match joined.last_mut() {
            Some(last) if follows(last, event) => *last = join(last, event),
            _ => joined.push(event.clone()),
        }
    }
    joined
}

const CHOICE: &str = "/choices/0";
/// Where an event has its text: of a completion, or of a chat.
const TEXTS: [&str; 2] = ["/choices/0/text", "/choices/0/delta/content"];

/// Whether both bring tokens of one answer.
fn follows(before: &Value, event: &Value) -> bool {
    let text = TEXTS.into_iter().find(|text| event.pointer(text).is_some_and(Value::is_string));
    let parts = |event: &Value| -> Vec<String> {
        let parts = event.pointer(CHOICE).and_then(|choice| choice.get("delta")).and_then(Value::as_object);
        parts.map(|parts| parts.keys().cloned().collect()).unwrap_or_default()
    };
    text.is_some_and(|text| before.pointer(text).is_some_and(Value::is_string))
        && parts(before) == parts(event)
}

/// The later one, with what the one before brought in front.
fn join(before: &Value, event: &Value) -> Value {
    let mut one = event.clone();
    for place in TEXTS {
        let both =
            (before.pointer(place).and_then(Value::as_str), event.pointer(place).and_then(Value::as_str));
        if let ((Some(first), Some(then)), Some(text)) = (both, one.pointer_mut(place)) {
            *text = format!("{first}{then}").into();
        }
    }
    let (first, then) = (before.pointer(CHOICE), one.pointer_mut(CHOICE));
    if let (Some(Value::Object(first)), Some(Value::Object(then))) = (first, then) {
        for (key, value) in first {
            match (value, then.get_mut(key)) {
                (Value::Array(first), Some(Value::Array(then))) => {
                    then.splice(0..0, first.iter().cloned());
                }
                (value, None) => {
                    then.insert(key.clone(), value.clone());
                }
                _ => {}
            }
        }
    }
    one
}

fn same_events(ours: &[Value], theirs: &[Value]) -> Result<(), String> {
    let at = ours.iter().zip(theirs).take_while(|(a, b)| same(a, b)).count();
    if at == ours.len() && at == theirs.len() {
        return Ok(());
    }
    let show = |events: &[Value]| events.get(at).map_or("the end".into(), Value::to_string);
    Err(format!("event {at}: {} instead of {}", show(ours), show(theirs)))
}

/// An answer without what differs between any two requests: ids and times.
fn comparable(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let mut kept = Map::new();
            for (key, value) in fields {
                if !matches!(key.as_str(), "id" | "created" | "system_fingerprint" | "request_id") {
                    kept.insert(key, comparable(value));
                }
            }
            Value::Object(kept)
        }
        Value::Array(values) => values.into_iter().map(comparable).collect(),
        other => other,
    }
}

/// Whether two answers are the same. Fractions, which are logarithms of probabilities, may differ by what float32
/// loses when an engine adds in another order: a prompt computed in other batches is.
fn same(ours: &Value, theirs: &Value) -> bool {
    const MOST: f64 = 0.01;
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| same(a, b)))
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Value::Number(a), Value::Number(b)) if a.is_f64() && b.is_f64() => {
            a.as_f64().zip(b.as_f64()).is_some_and(|(a, b)| (a - b).abs() <= MOST)
        }
        (a, b) => a == b,
    }
}

/// vLLM's own parameters reach the engine in both modes, and do there what they do on a plain engine.
async fn parameters(bed: &mut Bed) -> anyhow::Result<Line> {
    let mut line = Line::new("http.parameters");
    let ask = bed.fresh_ask(80).await?;
    let word = ask.body["prompt"].as_str().unwrap_or_default().split(' ').nth(4).unwrap_or("and").to_owned();
    let plain = ask.send(&bed.plain(), &[]).await?;
    let (first, other) = (plain.tokens[0], plain.tokens[0] + 1);
    let cases = [
        ("logprobs", json!({"logprobs": 3})),
        ("n", json!({"n": 2})),
        ("echo", json!({"echo": true})),
        ("stop", json!({"stop": [word], "ignore_eos": false})),
        ("stop_token_ids", json!({"stop_token_ids": [first], "min_tokens": 1})),
        ("allowed_token_ids", json!({"allowed_token_ids": [other]})),
        ("logit_bias", json!({"logit_bias": {(other.to_string()): 100}})),
        ("bad_words", json!({"bad_words": [" and"]})),
        ("repetition_penalty", json!({"repetition_penalty": 1.5})),
        ("min_tokens", json!({"min_tokens": 5, "ignore_eos": false})),
        ("seed", json!({"seed": 7, "temperature": 0.9, "top_k": 20, "min_p": 0.02})),
        ("truncate_prompt_tokens", json!({"truncate_prompt_tokens": 16})),
        ("cache_salt", json!({"cache_salt": "tenant-a"})),
        ("prompt_logprobs", json!({"prompt_logprobs": 1})),
        ("return_tokens_as_token_ids", json!({"logprobs": 1, "return_tokens_as_token_ids": true})),
        ("skip_special_tokens", json!({"skip_special_tokens": false})),
        ("max_completion_tokens of a chat", json!({"max_completion_tokens": 3})),
        ("user", json!({"user": "somebody"})),
        ("list of prompts", json!({"prompt": ["One.", "Two."]})),
    ];
    for policy in ["colocated", "disaggregated"] {
        for (name, extra) in &cases {
            let ask = if name.ends_with("chat") {
                Ask::chat(bed.model(), json!([{"role": "user", "content": word}]), bed.scale.answer_tokens)
            } else {
                ask.clone()
            };
            let mut body = ask.wire_body();
            for (key, value) in extra.as_object().into_iter().flatten() {
                body[key] = value.clone();
            }
            let headers = [("x-baton-policy", policy)];
            let theirs = bed.plain().post(ask.path(), &body, &[]).await?;
            let ours = bed.coordinator().post(ask.path(), &body, &headers).await?;
            line.check(ours.status == theirs.status, || {
                format!("{name} ({policy}): HTTP {}, the engine says {}", ours.status, theirs.status)
            });
            let (ours, theirs) = (comparable(ours.json()?), comparable(theirs.json()?));
            let alike = same(&ours["choices"], &theirs["choices"]) && ours["error"] == theirs["error"];
            line.check(alike, || {
                format!(
                    "{name} ({policy}): {} instead of {}",
                    excerpt(&ours["choices"]),
                    excerpt(&theirs["choices"])
                )
            });
            if *name == "allowed_token_ids" && ours.get("error").is_none() {
                let only = ours["choices"][0]["token_ids"]
                    .as_array()
                    .is_some_and(|ids| ids.iter().all(|id| *id == other));
                line.check(only, || format!("{name} ({policy}): other tokens than {other} came"));
            }
        }
    }
    line.figure("cases", cases.len() * 2);
    bed.settled().await?;
    Ok(line)
}

fn excerpt(value: &Value) -> String {
    value.to_string().chars().take(300).collect()
}

/// A client that goes away, while prefill runs or while tokens come, leaves nothing running.
async fn disconnect(bed: &mut Bed) -> anyhow::Result<Line> {
    const LONG_ANSWER: u32 = 3000;
    let mut line = Line::new("http.disconnect");
    let mut most = 0.0f64;
    for policy in ["colocated", "disaggregated"] {
        let ask = bed.fresh_ask(100).await?.with("max_tokens", LONG_ANSWER).streamed();
        let before = bed.counters().await?;
        let coordinator = bed.coordinator();
        let headers = [("x-baton-policy", policy)];
        let mut stream = coordinator.open_stream(ask.path(), &ask.wire_body(), &headers).await?;
        ensure!(stream.next().await?.is_some(), "no first event");
        drop(stream);
        bed.settled().await.with_context(|| format!("{policy}, while tokens came"))?;
        let after = bed.counters().await?;
        let generated: f64 =
            [0, 1].iter().map(|&i| after.engine(&before, i, "vllm:generation_tokens_total")).sum();
        most = most.max(generated);
        line.check(generated < f64::from(LONG_ANSWER) / 2.0, || {
            format!("{policy}: {generated} of {LONG_ANSWER} tokens were still generated")
        });
    }
    // During the prefill leg: no hold stays, and the decode engine, if it has been asked already, gets nothing.
    let ask = bed.fresh_ask(bed.scale.longest).await?;
    let before = bed.counters().await?;
    let (coordinator, sent) = (bed.coordinator(), ask.clone());
    let request =
        tokio::spawn(async move { sent.send(&coordinator, &[("x-baton-policy", "disaggregated")]).await });
    let prefill = bed
        .until("an engine runs the prefill", async || {
            for i in [Bed::PREFILL, Bed::DECODE] {
                if bed.fleet.metrics(Part::Engine(i)).await?.sum("vllm:num_requests_running", &[]) > 0.0 {
                    return Ok(Ok(()));
                }
            }
            Ok(Err("nothing runs".into()))
        })
        .await;
    request.abort();
    prefill?;
    bed.settled().await.context("after a disconnect during prefill")?;
    let after = bed.counters().await?;
    let completed = [("result", "completed")];
    let pulls: f64 =
        [0, 1].iter().map(|&i| after.agent(&before, i, "baton_agent_pulls_total", &completed)).sum();
    line.check(pulls == 0.0, || {
        format!("{pulls} pulls were completed for a client that left during prefill")
    });
    line.figure("most_tokens_generated", most).figure("of", LONG_ANSWER);
    bed.empty_caches().await?;
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fractions_may_differ_and_only_a_little() {
        let answer = |logprob: f64, offset: u32| json!([{"logprobs": [logprob], "text_offset": offset}]);
        assert!(same(&answer(-1.855, 3), &answer(-1.8549, 3)));
        assert!(!same(&answer(-1.855, 3), &answer(-1.83, 3)));
        assert!(!same(&answer(-1.855, 3), &answer(-1.855, 4)));
        assert!(!same(&json!([{"a": 1}]), &json!([{"a": 1, "b": 2}])));
        assert!(!same(&json!([1, 2]), &json!([1])));
        assert!(!same(&json!(1.0), &json!(1)));
    }

    #[test]
    fn events_are_the_same_however_many_tokens_each_has() {
        let event = |text: &str, tokens: &[u64], end: Option<&str>| json!({"model": "m", "choices": [{"index": 0, "delta": {"content": text}, "token_ids": tokens, "finish_reason": end}]});
        let begin =
            json!({"model": "m", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]});
        let usage = json!({"model": "m", "choices": [], "usage": {"completion_tokens": 3}});
        let of = |middle: Vec<Value>| [vec![begin.clone()], middle, vec![usage.clone()]].concat();
        let single =
            of(vec![event("a", &[1], None), event("b", &[2], None), event("c", &[3], Some("length"))]);
        let two = of(vec![event("a", &[1], None), event("bc", &[2, 3], Some("length"))]);
        assert_eq!(same_events(&joined(&single), &joined(&two)), Ok(()));
        assert_eq!(joined(&two), of(vec![event("abc", &[1, 2, 3], Some("length"))]));
        let others = [
            event("b", &[2, 3], Some("length")),
            event("bc", &[3, 2], Some("length")),
            event("bc", &[2, 3], Some("stop")),
        ];
        for other in others {
            let other = of(vec![event("a", &[1], None), other]);
            assert!(same_events(&joined(&single), &joined(&other)).is_err());
        }
    }
}
