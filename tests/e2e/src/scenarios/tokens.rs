//! The coordinator's token ids equal the engine's, on a corpus of prompts and conversations.

use anyhow::Context as _;
use baton_fleet::{Client, EngineKind};
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::report::Line;

const COMPLETIONS: &str = include_str!("../../corpus/completions.json");
const CHATS: &str = include_str!("../../corpus/chats.json");

pub(super) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let mut completions = cases(COMPLETIONS, bed.model())?;
    // A prompt as long as an agent's: 8 KB of words.
    completions
        .push(("8 KB of words".into(), json!({"model": bed.model(), "prompt": bed.prompts.text(1500)})));
    let chats = cases(CHATS, bed.model())?;
    let mut lines = vec![
        compare(bed, "tokens.completion", &completions, "/tokenize", "tokens").await?,
        compare(bed, "tokens.chat", &chats, "/tokenize", "tokens").await?,
    ];
    // What the engine makes of a chat request itself. The mock engine has one code path for both.
    if matches!(bed.fleet.spec().engines[Bed::PLAIN].kind, EngineKind::Vllm(_)) {
        lines.push(compare(bed, "tokens.render", &chats, "/v1/chat/completions/render", "token_ids").await?);
    }
    Ok(lines)
}

/// The corpus's bodies with their names.
fn cases(text: &str, model: &str) -> anyhow::Result<Vec<(String, Value)>> {
    let cases: Vec<Value> = serde_json::from_str(text).context("the corpus is no JSON")?;
    cases
        .into_iter()
        .map(|mut case| {
            let fields = case.as_object_mut().context("a case is no object")?;
            let name = fields.remove("name").context("a case without a name")?;
            fields.insert("model".into(), model.into());
            Ok((name.as_str().unwrap_or_default().to_owned(), case))
        })
        .collect()
}

/// Compares the coordinator's `/tokenize` with the engine's answer at `path`. Where the engine refuses, the coordinator must.
async fn compare(
    bed: &Bed,
    name: &str,
    cases: &[(String, Value)],
    path: &str,
    key: &str,
) -> anyhow::Result<Line> {
    let mut line = Line::new(name);
    let (mut equal, mut refused, mut unsupported, mut tokens) = (0, 0, 0, 0);
    for (case, body) in cases {
        let theirs = ids(&bed.plain(), path, key, body).await.with_context(|| format!("{case}: engine"))?;
        let ours = ids(&bed.coordinator(), "/tokenize", "tokens", body)
            .await
            .with_context(|| format!("{case}: coordinator"))?;
        match (&ours, &theirs) {
            (Ok(ours), Ok(theirs)) => {
                tokens += theirs.len();
                equal += u64::from(ours == theirs);
                let at = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
                line.check(ours == theirs, || {
                    format!(
                        "{case}: {} tokens, the engine has {}; they part at {at}: {:?} and {:?}",
                        ours.len(),
                        theirs.len(),
                        &ours[at..ours.len().min(at + 4)],
                        &theirs[at..theirs.len().min(at + 4)]
                    )
                });
            }
            (Err(_), Err(_)) => refused += 1,
            (Err(ours), Ok(_)) => {
                line.check(false, || format!("{case}: the coordinator refuses it: {ours}"));
            }
            // The mock engine leaves some of vLLM out, and says so.
            (Ok(_), Err(theirs)) if theirs.contains("not supported by the mock engine") => unsupported += 1,
            (Ok(_), Err(theirs)) => {
                line.check(false, || format!("{case}: only the engine refuses it: {theirs}"));
            }
        }
    }
    line.figure("cases", cases.len())
        .figure("equal", equal)
        .figure("refused", refused)
        .figure("unsupported", unsupported)
        .figure("tokens", tokens);
    Ok(line)
}

/// Token ids, or the words of a refusal (a 4xx status).
async fn ids(
    server: &Client,
    path: &str,
    key: &str,
    body: &Value,
) -> anyhow::Result<Result<Vec<u64>, String>> {
    let reply = server.post(path, body, &[]).await?;
    if reply.status.is_client_error() {
        return Ok(Err(format!("HTTP {}: {}", reply.status, String::from_utf8_lossy(&reply.body))));
    }
    let value = reply.ok()?.json()?;
    let ids = value[key].as_array().with_context(|| format!("{path}: no {key}"))?;
    Ok(Ok(ids.iter().filter_map(Value::as_u64).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own() {
        for text in [COMPLETIONS, CHATS] {
            let mut names: Vec<String> = cases(text, "m").unwrap().into_iter().map(|case| case.0).collect();
            let all = names.len();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), all);
            assert!(all >= 40);
        }
    }
}
