//! One client of the workload.

use std::time::Duration;

use baton_fleet::Policy;
use baton_fleet::http::{Client, HttpError, Streamed};
use serde_json::{Value, json};

use super::workload::{Kind, Script, Turn};
use crate::explanation::Explanation;

/// What came of one request.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) kind: Kind,
    /// Which of the client's requests.
    pub(crate) turn: usize,
    pub(crate) result: Result<Answer, String>,
}

/// An answer and its times.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) ttft: Duration,
    pub(crate) gaps: Vec<Duration>,
    pub(crate) prompt_tokens: u64,
    pub(crate) explanation: Option<Explanation>,
}

/// Plays a script to its end. A failed request ends it: the next would have to quote its answer.
pub(crate) async fn play(
    client: Client,
    model: String,
    script: Script,
    policy: Policy,
    mut done: impl FnMut(),
) -> Vec<Outcome> {
    tokio::time::sleep(script.start).await;
    let mut conversation = Conversation::new(&script);
    let mut outcomes = Vec::with_capacity(script.turns.len());
    for (at, turn) in script.turns.iter().enumerate() {
        if at > 0 {
            tokio::time::sleep(turn.pause).await;
        }
        let result = ask(&client, &model, policy, conversation.ask(turn)).await;
        done();
        let failed = result.is_err();
        if let Ok(answer) = &result {
            conversation.answered(&answer.text);
        }
        outcomes.push(Outcome { kind: script.kind, turn: at, result });
        if failed {
            // Requests that could not be made have failed too.
            for turn in at + 1..script.turns.len() {
                done();
                let result = Err("the request before it failed".to_owned());
                outcomes.push(Outcome { kind: script.kind, turn, result });
            }
            break;
        }
    }
    outcomes
}

/// Sends one streaming request under that policy and reads its answer.
pub(crate) async fn ask(
    client: &Client,
    model: &str,
    policy: Policy,
    (path, mut body): (&str, Value),
) -> Result<Answer, String> {
    let fixed = json!({
        "model": model,
        "temperature": 0,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    body.as_object_mut().expect("bodies are objects").extend(fixed.as_object().cloned().unwrap_or_default());
    let headers = [("x-baton-policy", policy.as_str()), ("x-baton-explain", "1")];
    let streamed = client.stream(path, &body, &headers).await.map_err(|error| match error {
        HttpError::Status { status, body, .. } => format!("HTTP {status}: {body}"),
        error => error.to_string(),
    })?;
    read(&streamed)
}

fn read(streamed: &Streamed) -> Result<Answer, String> {
    if let Some(error) = streamed.error() {
        return Err(format!("within the stream: {error}"));
    }
    let (Some(ttft), Some(_), true) = (streamed.ttft(), streamed.finish_reason(), streamed.done) else {
        return Err("the stream ended early".into());
    };
    let prompt_tokens = streamed.usage().and_then(|usage| usage["prompt_tokens"].as_u64());
    Ok(Answer {
        text: streamed.text(),
        ttft,
        gaps: streamed.gaps().collect(),
        prompt_tokens: prompt_tokens.ok_or("the answer tells no usage")?,
        explanation: streamed.header("x-baton-explain").and_then(|text| serde_json::from_str(text).ok()),
    })
}

/// What a client has said and heard.
enum Conversation {
    Chat(Vec<Value>),
    /// Every question stands alone behind the document.
    Document(String),
}

impl Conversation {
    fn new(script: &Script) -> Self {
        match script.kind {
            Kind::Document => Self::Document(script.opening.clone()),
            Kind::Chat | Kind::Agent => {
                Self::Chat(vec![json!({"role": "system", "content": script.opening})])
            }
        }
    }

    fn ask(&mut self, turn: &Turn) -> (&'static str, Value) {
        match self {
            Self::Chat(messages) => {
                messages.push(json!({"role": "user", "content": turn.text}));
                ("/v1/chat/completions", json!({"messages": messages, "max_tokens": turn.max_tokens}))
            }
            Self::Document(document) => {
                let prompt = format!("{document}\n\nQuestion: {}\nAnswer:", turn.text);
                ("/v1/completions", json!({"prompt": prompt, "max_tokens": turn.max_tokens}))
            }
        }
    }

    fn answered(&mut self, text: &str) {
        if let Self::Chat(messages) = self {
            messages.push(json!({"role": "assistant", "content": text}));
        }
    }
}
