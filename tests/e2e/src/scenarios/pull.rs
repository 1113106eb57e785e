//! A prefix that a busy engine has cached is pulled by the idle one, which computes the rest alone.

use serde_json::json;
use tokio::task::JoinSet;

use super::identity::computed;
use crate::ask::{Answer, Ask};
use crate::bed::Bed;
use crate::report::Line;

/// Streams that decode where the prefix is, each of which a prefill there would hold up: so many more at a time until a
/// pull is clearly better, and so many at most.
const MORE_BUSY: usize = 8;
const MOST_BUSY: usize = 96;
/// Dry runs between that.
const TRIES: u32 = 25;
/// Their output: more than comes while the scenario lasts.
const BUSY_TOKENS: u32 = 3000;
/// What the next best option has to cost, as a multiple of the pull.
const CLEARLY: f64 = 1.25;
/// Words behind the prefix.
const TAIL_WORDS: usize = 120;

pub(super) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let mut line = Line::new("pull");
    let (mut prompts, mut pulled, mut busy) = (Vec::new(), Vec::new(), Vec::new());
    for chat in [false, true] {
        let (prompt_tokens, hit_tokens, streams) = pull(bed, chat, &mut line).await?;
        busy.push(streams.to_string());
        prompts.push(prompt_tokens.to_string());
        pulled.push(hit_tokens.to_string());
        let leaked = bed.settled().await;
        line.check(leaked.is_ok(), || format!("{:#}", leaked.unwrap_err()));
    }
    line.figure("prompt_tokens", prompts.join(","))
        .figure("pulled_tokens", pulled.join(","))
        .figure("busy_streams", busy.join(","));
    Ok(vec![line])
}

/// One pull. Returns the prompt's tokens, how many of them were pulled, and the streams that ran beside it.
async fn pull(bed: &mut Bed, chat: bool, line: &mut Line) -> anyhow::Result<(u64, u64, usize)> {
    let what = if chat { "chat" } else { "completion" };
    let (plain, model, answer_tokens) = (bed.plain(), bed.model().to_owned(), bed.scale.answer_tokens);
    let (prefix, _) = bed.prompts.fit(&plain, &model, bed.scale.longest - 2 * TAIL_WORDS).await?;
    let ask = |text: &str| match chat {
        true => Ask::chat(&model, json!([{"role": "user", "content": text}]), answer_tokens).streamed(),
        false => Ask::completion(&model, text, answer_tokens),
    };
    // All of the session goes where its first request went.
    let session = format!("pull {what}");
    let at_home = [("x-baton-policy", "session_sticky"), ("x-session-id", session.as_str())];
    let first = ask(&prefix).send(&bed.coordinator(), &at_home).await?;
    let source = first.header("x-baton-decode").to_owned();
    let asked = ask(&format!("{prefix} {}", bed.prompts.text(TAIL_WORDS)));
    let expected = asked.send(&plain, &[]).await?;

    let mut busy: JoinSet<anyhow::Result<Answer>> = JoinSet::new();
    let mut tries = 0;
    let body = asked.wire_body();
    // The engine's KV events take a moment to reach the coordinator, too.
    bed.until("the coordinator would pull", async || {
        if tries % TRIES == 0 && busy.len() < MOST_BUSY {
            for _ in 0..MORE_BUSY {
                let stream = Ask::completion(&model, "Count on.", BUSY_TOKENS).streamed();
                let (client, session) = (bed.coordinator(), session.clone());
                busy.spawn(async move {
                    let at_home = [("x-baton-policy", "session_sticky"), ("x-session-id", session.as_str())];
                    stream.send(&client, &at_home).await
                });
            }
        }
        tries += 1;
        let reply = bed.coordinator().post("/v1/route", &body, &[]).await?.ok()?.json()?;
        let (best, next) = (&reply["options"][0], &reply["options"][1]);
        let times =
            next["total_ms"].as_f64().unwrap_or(0.0) / best["total_ms"].as_f64().unwrap_or(f64::INFINITY);
        let would = best["mode"] == "pull" && best["source"] == source.as_str() && times >= CLEARLY;
        Ok(if would { Ok(()) } else { Err(format!("{} streams; {best}, {next}", busy.len())) })
    })
    .await?;
    let streams = busy.len();

    let (before, counted) = (bed.counters().await?, bed.coordinator_metrics().await?);
    let answer = asked.send(&bed.coordinator(), &[]).await?;
    drop(busy);
    line.check(answer.same(&expected), || format!("{what}: {}", answer.difference(&expected)));
    let (mode, decode) = (answer.header("x-baton-mode"), answer.header("x-baton-decode"));
    line.check(mode == "pull" && answer.header("x-baton-source") == source && decode != source, || {
        format!(
            "{what}: headers say mode {mode:?}, source {:?}, decode {decode:?}",
            answer.header("x-baton-source")
        )
    });

    // The first request's prompt, but for the blocks that its last tokens and the template's share with the tail.
    let hit_tokens: u64 = answer.header("x-baton-hit-tokens").parse().unwrap_or_default();
    line.check(hit_tokens + 2 * bed.block_size() >= first.prompt_tokens, || {
        format!("{what}: {hit_tokens} of {} known tokens were to be pulled", first.prompt_tokens)
    });
    let puller = bed.index_of(decode)?;
    let computed = computed(bed, &before, puller, &answer).await?;
    line.check(computed as u64 + hit_tokens == answer.prompt_tokens, || {
        format!(
            "{what}: {decode} computed {computed} of {} tokens, {hit_tokens} were pulled",
            answer.prompt_tokens
        )
    });
    let shown = bed
        .until("all parts count the pull", async || {
            let (now, metrics) = (bed.counters().await?, bed.coordinator_metrics().await?);
            let grown =
                |name: &str, labels: &[(&str, &str)]| metrics.sum(name, labels) - counted.sum(name, labels);
            let counts = [
                (
                    "tokens found cached by the source",
                    now.engine(&before, bed.index_of(&source)?, "vllm:prefix_cache_hits_total"),
                    hit_tokens,
                ),
                (
                    "tokens from elsewhere",
                    now.engine(&before, puller, "vllm:external_prefix_cache_hits_total"),
                    hit_tokens,
                ),
                (
                    "pulls",
                    now.agent(&before, puller, "baton_agent_pulls_total", &[("result", "completed")]),
                    1,
                ),
                ("requests", grown("baton_requests_total", &[("mode", "pull"), ("outcome", "ok")]), 1),
                ("transfers", grown("baton_transfers_total", &[("result", "completed")]), 1),
            ];
            let wrong = counts.iter().find(|(_, count, expected)| *count != *expected as f64);
            Ok(match wrong {
                None => Ok(()),
                Some((name, count, expected)) => Err(format!("{count} {name} instead of {expected}")),
            })
        })
        .await;
    line.check(shown.is_ok(), || format!("{what}: {:#}", shown.unwrap_err()));
    Ok((answer.prompt_tokens, hit_tokens, streams))
}
