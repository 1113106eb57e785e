//! How an engine's layout is named: a readable string for the control plane, in which all ranks take part, and for
//! the wire each rank's own [`BlockLayout`].

use std::collections::BTreeMap;
use std::fmt::Write;

use baton_kernels::{BlockLayout, HeadsError, Unpackable};
use baton_proto::connector::Layout;
use baton_proto::wire::WireDtype;

/// Most facts that a layout may have.
pub const MAX_FACTS: usize = 64;
/// Longest name or value of a fact, in bytes.
pub const MAX_FACT: usize = 16 << 10;
/// Longest value that is spelt out to the control plane, in bytes; of longer ones the fingerprint tells.
const MAX_SPELT: usize = 256;

/// Fact that tells ranks apart; no part of what the ranks have in common.
const RANK: &str = "tp_rank";

/// What others need of one rank's layout.
#[derive(Clone, Debug)]
pub struct RankLayout {
    /// For the wire.
    pub blocks: BlockLayout,
    /// Bytes of a block that comes from another host packed, where it is asked for so.
    pub packed_bytes: Option<u64>,
    facts: BTreeMap<String, String>,
    order: BTreeMap<String, String>,
}

/// A layout that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RankLayoutError {
    /// More than [`MAX_FACTS`].
    #[error("layout.facts and layout.order: {0} of them, at most {MAX_FACTS} may be sent")]
    TooMany(usize),
    /// Longer than [`MAX_FACT`], or with a character that stands between facts.
    #[error(
        "layout.facts: {0:?}: names and values have at most {MAX_FACT} bytes and neither `|` nor control characters"
    )]
    Text(String),
    /// Heads that are not where it says.
    #[error(transparent)]
    Heads(#[from] HeadsError),
    /// KV that cannot travel as the agent's configuration says.
    #[error(
        "transfer.wire_dtype = \"fp8\" in the agent's configuration: this engine's KV cannot be packed: {0}; leave the setting out for this engine"
    )]
    WireDtype(#[from] Unpackable),
}

impl RankLayout {
    /// Of one of `ranks` workers, for KV that is to be pulled as `dtype`.
    pub fn new(layout: &Layout, ranks: u32, dtype: WireDtype) -> Result<Self, RankLayoutError> {
        let count = layout.facts.len() + layout.order.len();
        if count > MAX_FACTS {
            return Err(RankLayoutError::TooMany(count));
        }
        let usable = |text: &str| text.len() <= MAX_FACT && !text.chars().any(|c| c == '|' || c.is_control());
        for text in layout.facts.iter().chain(&layout.order).flat_map(|(name, value)| [name, value]) {
            if !usable(text) {
                return Err(RankLayoutError::Text(text.chars().take(MAX_SPELT).collect()));
            }
        }
        let blocks = BlockLayout::of(layout, ranks)?;
        let packed_bytes = match dtype {
            WireDtype::AsStored => None,
            WireDtype::Fp8 => Some(blocks.packed_bytes()? as u64),
        };
        Ok(Self { blocks, packed_bytes, facts: layout.facts.clone(), order: layout.order.clone() })
    }
}

/// The string that is equal on two engines exactly when blocks of one can be used by the other: `name=value` for each fact
/// that all ranks share, in order of name, and a fingerprint, joined by `|`. Where all ranks tell their heads apart, that
/// is the one of the content, and neither the number of ranks nor the order within them is in the string. Else all of
/// it is, with the fingerprint of each rank.
pub fn describe<'a>(ranks: impl IntoIterator<Item = &'a RankLayout>) -> String {
    let ranks: Vec<_> = ranks.into_iter().collect();
    let mut text = String::new();
    let Some(first) = ranks.first() else { return text };
    let same = |rank: &&RankLayout| rank.blocks.content() == first.blocks.content();
    let content = first.blocks.heads.as_ref().filter(|_| ranks.iter().all(same));
    spell(&mut text, &ranks, |rank| &rank.facts);
    if let Some(heads) = content {
        let _ = write!(text, "kv_heads={}|content={}", heads.total(), heads.content());
        return text;
    }
    spell(&mut text, &ranks, |rank| &rank.order);
    for (i, rank) in ranks.iter().enumerate() {
        let _ = write!(text, "{}{}", if i == 0 { "fingerprint=" } else { "+" }, rank.blocks.fingerprint);
    }
    text
}

/// The facts that all ranks share.
fn spell(text: &mut String, ranks: &[&RankLayout], facts: impl Fn(&RankLayout) -> &BTreeMap<String, String>) {
    let Some(first) = ranks.first() else { return };
    for (name, value) in facts(first) {
        let shared = ranks.iter().all(|rank| facts(rank).get(name) == Some(value));
        if shared && name != RANK && value.len() <= MAX_SPELT {
            let _ = write!(text, "{name}={value}|");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_proto::connector::{HeadSpan, Heads, Piece};

    /// A rank of some, with so many heads of 8 bytes, if they can be told apart.
    fn layout(rank: u32, ranks: u32, dtype: &str, heads: u32, told: bool) -> RankLayout {
        let text = |facts: &[(&str, &str)]| {
            facts.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let span = HeadSpan { start: 0, head_stride: 8, dims: vec![], len: 8 };
        let layout = Layout {
            facts: text(&[("dtype", dtype)]),
            order: text(&[("tp_rank", &rank.to_string()), ("tp_size", &ranks.to_string())]),
            pieces: vec![Piece { storage: 0, offset: 0, stride: 64, len: heads * 8 }],
            heads: told.then(|| Heads { total: heads * ranks, count: heads, spans: vec![span] }),
        };
        RankLayout::new(&layout, ranks, WireDtype::AsStored).unwrap()
    }

    #[test]
    fn equal_exactly_when_blocks_can_be_exchanged_as_they_lie() {
        let rank = |rank, dtype, heads| layout(rank, 2, dtype, heads, false);
        let text = describe(&[rank(0, "bf16", 1), rank(1, "bf16", 1)]);
        assert!(text.starts_with("dtype=bf16|tp_size=2|fingerprint="), "{text}");
        assert_eq!(text, describe(&[rank(0, "bf16", 1), rank(1, "bf16", 1)]));
        assert_eq!(
            text,
            describe(&[layout(0, 2, "bf16", 1, true), rank(1, "bf16", 1)]),
            "one rank does not tell"
        );
        for other in [
            describe(&[layout(0, 1, "bf16", 2, false)]),
            describe(&[rank(0, "f16", 1), rank(1, "f16", 1)]),
            describe(&[rank(0, "bf16", 1), rank(1, "bf16", 2)]),
            describe(&[rank(1, "bf16", 1), rank(0, "bf16", 1)]),
            describe(&[layout(0, 2, "bf16", 1, true), layout(1, 2, "bf16", 1, true)]),
        ] {
            assert_ne!(text, other);
        }
        assert_eq!(describe(&[]), "");
    }

    #[test]
    fn equal_exactly_when_heads_can_be_exchanged() {
        let text = describe(&[layout(0, 2, "bf16", 2, true), layout(1, 2, "bf16", 2, true)]);
        assert!(text.starts_with("dtype=bf16|kv_heads=4|content="), "{text}");
        assert_eq!(text, describe(&[layout(0, 1, "bf16", 4, true)]));
        assert_eq!(
            text,
            describe((0..4).map(|rank| layout(rank, 4, "bf16", 1, true)).collect::<Vec<_>>().iter())
        );
        for other in [layout(0, 1, "bf16", 2, true), layout(0, 1, "f16", 4, true)] {
            assert_ne!(text, describe(&[other]));
        }
    }

    #[test]
    fn facts_are_bounded() {
        let with = |facts: BTreeMap<String, String>| {
            let layout = Layout { facts: BTreeMap::new(), order: facts, pieces: vec![], heads: None };
            RankLayout::new(&layout, 1, WireDtype::AsStored)
        };
        assert!(with((0..65).map(|i| (i.to_string(), String::new())).collect()).is_err());
        assert!(with([("a".into(), "x".repeat(MAX_FACT + 1))].into()).is_err());
        assert!(with([("a".into(), "x|y".into())].into()).is_err());
        assert!(with([("a\n".into(), "x".into())].into()).is_err());
        assert!(with([("inner".into(), "30x 2,32,3,64; 1x 2".into())].into()).is_ok());
    }
}
