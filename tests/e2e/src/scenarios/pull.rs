//! A prefix that a busy engine has cached is pulled by the idle one, which computes the rest alone.
//!
//! That is the best option by far where the rest is long and many streams would wait for it at the engine that has the prefix, provided
//! that the coordinator knows what a long prompt takes. An engine that was given short ones only may be thought to compute any prompt in
//! the same time. So both engines are given long prompts until it knows.

use anyhow::Context as _;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::identity::computed;
use crate::ask::{Answer, Ask};
use crate::bed::Bed;
use crate::report::Line;

/// Streams that decode where the prefix is, each of which a prefill there would hold up: so many more at a time until a
/// pull is clearly better, and so many at most.
const MORE_STREAMS: usize = 8;
const MOST_STREAMS: usize = 64;
/// Their output. One that has ended is replaced.
const STREAM_TOKENS: u32 = 3000;
/// Dry runs before there are more streams, and long prompts. Events of the prefix need some, too.
const TRIES: usize = 25;
/// What the next best option has to cost, as a multiple of the pull.
const CLEARLY: f64 = 1.25;

pub(super) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let mut line = Line::new("pull");
    let (mut prompts, mut pulled, mut streams, mut taught) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for chat in [false, true] {
        let outcome = pull(bed, chat, &mut line).await?;
        prompts.push(outcome.prompt_tokens.to_string());
        pulled.push(outcome.pulled_tokens.to_string());
        streams.push(outcome.streams.to_string());
        taught += outcome.taught;
        let leaked = bed.settled().await;
        line.check(leaked.is_ok(), || format!("{:#}", leaked.unwrap_err()));
    }
    line.figure("prompt_tokens", prompts.join(","))
        .figure("pulled_tokens", pulled.join(","))
        .figure("streams", streams.join(","))
        .figure("long_prompts_before", taught);
    Ok(vec![line])
}

/// What one pull came to.
struct Outcome {
    prompt_tokens: u64,
    pulled_tokens: u64,
    /// Streams at the source meanwhile.
    streams: usize,
    /// Long prompts that the engines were given before.
    taught: usize,
}

async fn pull(bed: &mut Bed, chat: bool, line: &mut Line) -> anyhow::Result<Outcome> {
    let what = if chat { "chat" } else { "completion" };
    let (plain, model, answer_tokens) = (bed.plain(), bed.model().to_owned(), bed.scale.answer_tokens);
    let (prefix, _) = bed.prompts.fit(&plain, &model, bed.scale.longest * 6 / 10).await?;
    let ask = |text: &str| match chat {
        true => Ask::chat(&model, json!([{"role": "user", "content": text}]), answer_tokens).streamed(),
        false => Ask::completion(&model, text, answer_tokens),
    };
    // All of the session goes where its first request went.
    let session = format!("pull {what}");
    let at_home = [("x-baton-policy", "session_sticky"), ("x-session-id", session.as_str())];
    let first = ask(&prefix).send(&bed.coordinator(), &at_home).await?;
    let source = first.header("x-baton-decode").to_owned();
    let (tail, _) = bed.prompts.fit(&plain, &model, bed.scale.longest * 3 / 10).await?;
    let asked = ask(&format!("{prefix} {tail}"));
    let expected = asked.send(&plain, &[]).await?;

    let long = bed.prompts.text(bed.scale.longest / 2);
    let mut busy: JoinSet<anyhow::Result<Answer>> = JoinSet::new();
    let (mut tries, mut streams, mut taught) = (0, 0, 0);
    let body = asked.wire_body();
    bed.until("the coordinator would pull", async || {
        tries += 1;
        if tries % TRIES == 1 {
            streams = MOST_STREAMS.min(streams + MORE_STREAMS);
            if tries > 1 {
                let lesson = Ask::completion(&model, format!("{tries} {long}"), 1).streamed();
                lesson.send(&bed.coordinator(), &[("x-baton-policy", "least_loaded")]).await?;
                lesson.send(&bed.coordinator(), &at_home).await?;
                taught += 2;
            }
        }
        while let Some(ended) = busy.try_join_next() {
            ended.context("a stream")??;
        }
        while busy.len() < streams {
            let stream = Ask::completion(&model, "Count on.", STREAM_TOKENS).streamed();
            let (client, session) = (bed.coordinator(), session.clone());
            busy.spawn(async move {
                let at_home = [("x-baton-policy", "session_sticky"), ("x-session-id", session.as_str())];
                stream.send(&client, &at_home).await
            });
        }
        let reply = bed.coordinator().post("/v1/route", &body, &[]).await?.ok()?.json()?;
        let (best, next) = (&reply["options"][0], &reply["options"][1]);
        let cost = |option: &Value| option["total_ms"].as_f64();
        let times = cost(next).zip(cost(best)).map_or(0.0, |(next, best)| next / best);
        let would = best["mode"] == "pull" && best["source"] == source.as_str() && times >= CLEARLY;
        Ok(if would {
            Ok(())
        } else {
            Err(format!("{streams} streams, {taught} long prompts: {best}, {next}"))
        })
    })
    .await?;

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
    Ok(Outcome { prompt_tokens: answer.prompt_tokens, pulled_tokens: hit_tokens, streams, taught })
}
