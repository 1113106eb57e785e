//! How an engine's layout is named: a readable string for the control plane, in which all ranks take part, and for
//! the wire each rank's own [`LayoutFingerprint`].

use std::collections::BTreeMap;
use std::fmt::Write;

use baton_proto::connector::Layout;
use baton_proto::wire::LayoutFingerprint;

/// Most facts that a layout may have.
pub const MAX_FACTS: usize = 64;
/// Longest name or value of a fact, in bytes.
pub const MAX_FACT: usize = 16 << 10;
/// Longest value that is spelt out to the control plane, in bytes; of longer ones the fingerprint tells.
const MAX_SPELT: usize = 256;

/// Fact that tells ranks apart; no part of what the ranks have in common.
const RANK: &str = "tp_rank";

/// What the control plane needs of one rank's layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankLayout {
    /// For the wire.
    pub fingerprint: LayoutFingerprint,
    facts: BTreeMap<String, String>,
}

/// Facts that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FactsError {
    /// More than [`MAX_FACTS`].
    #[error("layout.facts: {0} of them, at most {MAX_FACTS} may be sent")]
    TooMany(usize),
    /// Longer than [`MAX_FACT`], or with a character that stands between facts.
    #[error(
        "layout.facts: {0:?}: names and values have at most {MAX_FACT} bytes and neither `|` nor control characters"
    )]
    Text(String),
}

impl RankLayout {
    /// Of one worker.
    pub fn new(layout: &Layout) -> Result<Self, FactsError> {
        if layout.facts.len() > MAX_FACTS {
            return Err(FactsError::TooMany(layout.facts.len()));
        }
        let usable = |text: &str| text.len() <= MAX_FACT && !text.chars().any(|c| c == '|' || c.is_control());
        for text in layout.facts.iter().flat_map(|(name, value)| [name, value]) {
            if !usable(text) {
                return Err(FactsError::Text(text.chars().take(MAX_SPELT).collect()));
            }
        }
        Ok(Self { fingerprint: LayoutFingerprint::of(layout), facts: layout.facts.clone() })
    }
}

/// The string that is equal on two engines exactly when blocks of one can be used by the other: `name=value` for
/// each fact that all ranks share, in order of name, and the fingerprint of each rank, joined by `|`.
pub fn describe<'a>(ranks: impl IntoIterator<Item = &'a RankLayout>) -> String {
    let ranks: Vec<_> = ranks.into_iter().collect();
    let mut text = String::new();
    let Some(first) = ranks.first() else { return text };
    for (name, value) in &first.facts {
        let shared = ranks.iter().all(|rank| rank.facts.get(name) == Some(value));
        if shared && name != RANK && value.len() <= MAX_SPELT {
            let _ = write!(text, "{name}={value}|");
        }
    }
    for (i, rank) in ranks.iter().enumerate() {
        let _ = write!(text, "{}{}", if i == 0 { "fingerprint=" } else { "+" }, rank.fingerprint);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_proto::connector::Piece;

    fn layout(rank: u32, dtype: &str, len: u32) -> RankLayout {
        let facts = [("tp_rank", rank.to_string()), ("tp_size", "2".into()), ("dtype", dtype.into())];
        RankLayout::new(&Layout {
            facts: facts.map(|(name, value)| (name.to_owned(), value)).into(),
            pieces: vec![Piece { storage: 0, offset: 0, stride: 64, len }],
        })
        .unwrap()
    }

    #[test]
    fn equal_exactly_when_blocks_can_be_exchanged() {
        let text = describe(&[layout(0, "bf16", 8), layout(1, "bf16", 8)]);
        assert!(text.starts_with("dtype=bf16|tp_size=2|fingerprint="), "{text}");
        assert_eq!(text, describe(&[layout(0, "bf16", 8), layout(1, "bf16", 8)]));
        for other in [
            describe(&[layout(0, "bf16", 8)]),
            describe(&[layout(0, "f16", 8), layout(1, "f16", 8)]),
            describe(&[layout(0, "bf16", 8), layout(1, "bf16", 16)]),
            describe(&[layout(1, "bf16", 8), layout(0, "bf16", 8)]),
        ] {
            assert_ne!(text, other);
        }
        assert_eq!(describe(&[]), "");
    }

    #[test]
    fn facts_are_bounded() {
        let with = |facts: BTreeMap<String, String>| RankLayout::new(&Layout { facts, pieces: vec![] });
        assert!(with((0..65).map(|i| (i.to_string(), String::new())).collect()).is_err());
        assert!(with([("a".into(), "x".repeat(MAX_FACT + 1))].into()).is_err());
        assert!(with([("a".into(), "x|y".into())].into()).is_err());
        assert!(with([("a\n".into(), "x".into())].into()).is_err());
        assert!(with([("inner".into(), "30x 2,32,3,64; 1x 2".into())].into()).is_ok());
    }
}
