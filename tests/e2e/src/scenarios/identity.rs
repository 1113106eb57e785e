//! Twenty prompts through the handoff: token-identical to the plain engine, with the KV that arrived equal to
//! the KV that left, and at most one block of each prompt computed by the decode engine.

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::ask::{Answer, Ask};
use crate::audit;
use crate::bed::{Bed, Counters};
use crate::prompts;
use crate::report::Line;

/// Prompts.
const PROMPTS: usize = 20;

/// Tokens of the shortest prompt.
const SHORTEST: f64 = 40.0;

pub(super) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let mut same = Line::new("identity.tokens");
    let mut bytes = Line::new("identity.kv_bytes");
    let mut one_block = Line::new("identity.one_block");
    let block_size = bed.block_size();
    let asks = asks(bed).await?;
    let started = bed.counters().await?;
    let (mut equal, mut shortest, mut longest, mut most_computed) = (0, u64::MAX, 0, 0.0f64);
    let mut ids = Vec::new();
    for (i, ask) in asks.iter().enumerate() {
        let what = format!(
            "prompt {i} ({}, {})",
            if ask.chat { "chat" } else { "completion" },
            if ask.stream { "streamed" } else { "whole" }
        );
        let expected = ask.send(&bed.plain(), &[]).await.with_context(|| format!("{what}: plain engine"))?;
        let before = bed.counters().await?;
        let answer = ask
            .send(&bed.coordinator(), &[("x-baton-policy", "disaggregated")])
            .await
            .with_context(|| what.clone())?;

        equal += u64::from(answer.same(&expected));
        same.check(answer.same(&expected), || format!("{what}: {}", answer.difference(&expected)));
        let tokens = answer.prompt_tokens;
        same.check(tokens == expected.prompt_tokens && tokens > 0, || {
            format!(
                "{what}: usage counts {tokens} prompt tokens, the plain engine {}",
                expected.prompt_tokens
            )
        });
        shortest = shortest.min(tokens);
        longest = longest.max(tokens);

        let (prefill, decode) = (answer.header("x-baton-prefill"), answer.header("x-baton-decode"));
        same.check(answer.header("x-baton-mode") == "disaggregated" && prefill != decode, || {
            format!(
                "{what}: headers say mode {:?}, prefill {prefill:?}, decode {decode:?}",
                answer.header("x-baton-mode")
            )
        });
        ids.push((what.clone(), answer.header("x-baton-transfer-id").to_owned()));

        let computed = computed(bed, &before, bed.index_of(decode)?, &answer).await?;
        most_computed = most_computed.max(computed);
        one_block.check(computed <= block_size as f64, || {
            format!("{what}: the decode engine computed {computed} of {tokens} tokens")
        });
    }
    same.figure("prompts", PROMPTS)
        .figure("equal", equal)
        .figure("shortest", shortest)
        .figure("longest", longest);
    one_block.figure("most_tokens_computed", most_computed).figure("block_tokens", block_size);
    compare_digests(bed, &ids, &mut bytes).await?;
    let ended = bed.counters().await?;
    let received: f64 =
        [0, 1].iter().map(|&i| ended.agent(&started, i, "baton_agent_received_bytes_total", &[])).sum();
    bytes.figure("bytes", received as u64);
    bytes.check(received > 0.0, || "the agents counted no received bytes".into());
    let leaked = bed.settled().await;
    same.check(leaked.is_ok(), || format!("{:#}", leaked.unwrap_err()));
    Ok(vec![same, bytes, one_block])
}

/// The requests: lengths from 40 tokens to the longest in equal ratios, chat and completion, streamed and not,
/// and one prompt as token ids.
async fn asks(bed: &mut Bed) -> anyhow::Result<Vec<Ask>> {
    let (plain, model) = (bed.plain(), bed.model().to_owned());
    let empty = json!({"model": model, "messages": [{"role": "user", "content": ""}]});
    let template = prompts::count(&plain, &empty).await?;
    let mut asks = Vec::new();
    for i in 0..PROMPTS {
        let ratio = (bed.scale.longest as f64 / SHORTEST).powf(i as f64 / (PROMPTS - 1) as f64);
        let tokens = (SHORTEST * ratio).round() as usize;
        let chat = i % 2 == 1;
        let tokens = if chat { tokens.saturating_sub(template).max(8) } else { tokens };
        let (text, _) = bed.prompts.fit(&plain, &model, tokens).await?;
        let mut ask = if chat {
            Ask::chat(&model, json!([{"role": "user", "content": text}]), bed.scale.answer_tokens)
        } else {
            Ask::completion(&model, text, bed.scale.answer_tokens)
        };
        if i == 8 {
            let body = json!({"model": model, "prompt": ask.body["prompt"]});
            let ids: Value = plain.post("/tokenize", &body, &[]).await?.ok()?.json()?["tokens"].clone();
            ensure!(ids.is_array(), "/tokenize: no tokens");
            ask.body["prompt"] = ids;
        }
        asks.push(if i % 4 >= 2 { ask.streamed() } else { ask });
    }
    Ok(asks)
}

/// Tokens of the answer's prompt that engine `i` computed itself: those it counted less local and external hits,
/// or those it says it computed, whichever are more.
pub(super) async fn computed(bed: &Bed, before: &Counters, i: usize, answer: &Answer) -> anyhow::Result<f64> {
    let prompt = answer.prompt_tokens as f64;
    let mut computed = 0.0;
    // The engine counts a request shortly after its first token.
    bed.until("the decode engine counts the prompt in vllm:prompt_tokens_total", async || {
        let now = bed.counters().await?;
        let counted = now.engine(before, i, "vllm:prompt_tokens_total");
        let hits = now.engine(before, i, "vllm:prefix_cache_hits_total")
            + now.engine(before, i, "vllm:external_prefix_cache_hits_total");
        // Two counts of one thing: hits as they are granted, and tokens as they are computed.
        let local = now.engine_labelled(
            before,
            i,
            "vllm:prompt_tokens_by_source_total",
            &[("source", "local_compute")],
        );
        computed = local.max(counted - hits);
        Ok(if counted >= prompt { Ok(()) } else { Err(format!("{counted} of {prompt} tokens counted")) })
    })
    .await?;
    Ok(computed)
}

/// Checks that both sides of each transfer logged one digest.
async fn compare_digests(bed: &Bed, ids: &[(String, String)], line: &mut Line) -> anyhow::Result<()> {
    let complete = bed
        .until("an audit line of either side for each transfer", async || {
            let transfers = audit::read(bed.agent_logs())?;
            // What arrived was logged before the engine was told, and so before it answered.
            let both = |t: &audit::Transfer| !t.received.is_empty() && t.sent.len() >= t.received.len();
            let lacking = ids.iter().find(|(_, id)| !transfers.get(id).is_some_and(both));
            Ok(match lacking {
                None => Ok(()),
                Some((what, id)) => Err(format!("{what}: transfer {id:?}: {:?}", transfers.get(id))),
            })
        })
        .await;
    line.check(complete.is_ok(), || format!("{:#}", complete.unwrap_err()));
    let transfers = audit::read(bed.agent_logs())?;
    let (mut equal, mut blocks) = (0, 0);
    for (what, id) in ids {
        let Some(transfer) = transfers.get(id) else { continue };
        let audit::Transfer { sent, received } = transfer;
        equal += u64::from(sent == received);
        blocks += received.values().map(|(blocks, _)| *blocks).max().unwrap_or(0);
        line.check(sent == received && sent.values().all(|(blocks, _)| *blocks > 0), || {
            format!("{what}: sent {sent:?}, received {received:?}")
        });
    }
    line.figure("transfers", ids.len()).figure("equal", equal).figure("blocks", blocks);
    Ok(())
}
