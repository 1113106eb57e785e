//! The second turn of a conversation finds the first one's KV on the engine chosen for it.

use serde_json::json;

use crate::ask::Ask;
use crate::bed::Bed;
use crate::report::Line;

/// Conversations.
const CONVERSATIONS: usize = 3;

pub(super) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let mut line = Line::new("second_turn");
    let (plain, model) = (bed.plain(), bed.model().to_owned());
    let block_size = bed.block_size();
    let (mut share_least, mut engines) = (1.0f64, Vec::new());
    for conversation in 0..CONVERSATIONS {
        let (question, _) = bed.prompts.fit(&plain, &model, bed.scale.fault_tokens / 2).await?;
        let mut messages = json!([{"role": "user", "content": question}]);
        let first = Ask::chat(&model, messages.clone(), bed.scale.answer_tokens)
            .streamed()
            .send(&bed.coordinator(), &[])
            .await?;
        // What the engine has computed after the first turn: its prompt and all tokens of the answer but the last.
        // The second turn's prompt repeats the prompt; the answer's text may come back as other tokens.
        let known = first.prompt_tokens / block_size * block_size;
        messages.as_array_mut().unwrap().extend([
            json!({"role": "assistant", "content": first.text}),
            json!({"role": "user", "content": "And what follows from that?"}),
        ]);
        let second = Ask::chat(&model, messages, bed.scale.answer_tokens).streamed();

        // The engine's KV events take a moment to reach the coordinator.
        let body = second.wire_body();
        bed.until("the coordinator predicts a hit", async || {
            let reply = bed.coordinator().post("/v1/route", &body, &[]).await?.ok()?.json()?;
            let predicted = super::store::predicted_hit(&reply)?;
            Ok(if predicted + 2 * block_size >= known {
                Ok(())
            } else {
                Err(format!("{predicted} of {known} tokens"))
            })
        })
        .await?;

        let before = bed.counters().await?;
        let answer = second.send(&bed.coordinator(), &[]).await?;
        let expected = second.send(&bed.plain(), &[]).await?;
        line.check(answer.same(&expected), || {
            format!("conversation {conversation}: {}", answer.difference(&expected))
        });
        let chosen = bed.index_of(answer.header("x-baton-decode"))?;
        let mut hits = 0.0;
        let counted = bed
            .until("the engine counts its prefix hits", async || {
                hits = bed.counters().await?.engine(&before, chosen, "vllm:prefix_cache_hits_total");
                let enough = hits + 2.0 * block_size as f64 >= known as f64;
                Ok(if enough { Ok(()) } else { Err(format!("{hits} of {known}")) })
            })
            .await;
        line.check(counted.is_ok(), || {
            format!(
                "conversation {conversation}: engine {} ({}) counted {hits} local hit tokens of {known} known ones",
                answer.header("x-baton-decode"),
                answer.header("x-baton-mode"),
            )
        });
        share_least = share_least.min(hits / known as f64);
        engines.push(answer.header("x-baton-decode").to_owned());
    }
    line.figure("conversations", CONVERSATIONS)
        .figure("least_local_hit_share", share_least)
        .figure("engines", engines.join(","));
    let leaked = bed.settled().await;
    line.check(leaked.is_ok(), || format!("{:#}", leaked.unwrap_err()));
    Ok(vec![line])
}
