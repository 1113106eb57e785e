//! Text of a wanted length in tokens, the same in every run.

use anyhow::{Context as _, ensure};
use baton_fleet::Client;
use serde_json::{Value, json};

const WORDS: &str = "river window quiet engine copper morning letter garden bridge winter stone candle market \
    forest signal paper harbor thunder little orange silver people mountain shadow number kitchen travel doctor \
    story metal yellow island future captain summer pocket bottle question animal perfect weather history \
    machine planet village ocean turning across under between because simple bright early heavy open second \
    carried answered waited opened counted painted listened walked remembered and the of with without before";

/// A source of text, made from one seed.
pub struct Prompts {
    state: u64,
}

impl Prompts {
    /// The source that belongs to this seed.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next random number (splitmix64).
    pub fn number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Sentences of that many words. The first ones are a random number in digits, so that no two texts share
    /// a first block.
    pub fn text(&mut self, words: usize) -> String {
        let all: Vec<&str> = WORDS.split_whitespace().collect();
        let mut text = format!("Note {}:", self.number() % 100_000_000);
        for i in 0..words {
            text.push(' ');
            text.push_str(all[self.number() as usize % all.len()]);
            if i % 11 == 10 {
                text.push('.');
            }
        }
        text
    }

    /// Text of `tokens` tokens, or up to three fewer, by the tokenizer of `server`; and how many it is.
    pub async fn fit(
        &mut self,
        server: &Client,
        model: &str,
        tokens: usize,
    ) -> anyhow::Result<(String, usize)> {
        const SLACK: usize = 3;
        let mut text = self.text(tokens);
        for _ in 0..32 {
            let count = count(server, &json!({"model": model, "prompt": text})).await?;
            let words = text.split(' ').count();
            if count > tokens {
                // Far off: by proportion. Near: word by word, which overshoots by little.
                let keep = if count > tokens + 16 { words * (tokens + 8) / count } else { words - 1 };
                ensure!(keep > 0, "no text of {tokens} tokens");
                text = text.split(' ').take(keep).collect::<Vec<_>>().join(" ");
            } else if count + SLACK < tokens {
                // One or two tokens each.
                text.push_str(&" a".repeat((tokens - count).div_ceil(2)));
            } else {
                return Ok((text, count));
            }
        }
        anyhow::bail!("no text of {tokens} tokens found")
    }
}

/// Tokens of a text or a conversation, by the server's `/tokenize`.
pub async fn count(server: &Client, body: &Value) -> anyhow::Result<usize> {
    let reply = server.post("/tokenize", body, &[]).await?.ok()?;
    Ok(reply.json()?["count"].as_u64().context("/tokenize: no count")? as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_repeat_with_the_seed_and_differ_from_the_start() {
        let (mut a, mut b) = (Prompts::new(7), Prompts::new(7));
        let first = a.text(30);
        assert_eq!(first, b.text(30));
        assert_ne!(first[..12], a.text(30)[..12]);
    }
}
