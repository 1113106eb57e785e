//! What the agents' audit lines say about each transfer: the digest of the KV bytes that left, and of those that arrived.
//!
//! At debug level, target `baton::audit`, each side of a transfer logs one line for each rank that pulled, with `transfer_id`,
//! `side`, `rank`, `blocks` and `digest`. The receiver computes its digest by reading the engine's memory back.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;

/// Both sides of one transfer, as far as they were logged, by the pulling engine's ranks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transfer {
    /// Blocks and digest of what left.
    pub sent: BTreeMap<u32, (u64, String)>,
    /// Blocks and digest of what arrived.
    pub received: BTreeMap<u32, (u64, String)>,
}

/// Reads the audit lines of these logs.
pub fn read<'a>(logs: impl IntoIterator<Item = &'a Path>) -> anyhow::Result<BTreeMap<String, Transfer>> {
    let mut transfers = BTreeMap::new();
    for log in logs {
        let bytes = std::fs::read(log).with_context(|| format!("log {}", log.display()))?;
        for line in String::from_utf8_lossy(&bytes).lines() {
            take(line, &mut transfers);
        }
    }
    Ok(transfers)
}

fn take(line: &str, transfers: &mut BTreeMap<String, Transfer>) -> Option<()> {
    if !line.contains("baton::audit") {
        return None;
    }
    let field = |name: &str| {
        line.split_whitespace()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches(['"', ',']))
    };
    let entry = transfers.entry(field("transfer_id")?.to_owned()).or_default();
    let what = (field("blocks")?.parse().ok()?, field("digest")?.to_owned());
    let side = match field("side")? {
        "sent" => &mut entry.sent,
        "received" => &mut entry.received,
        _ => return None,
    };
    side.insert(field("rank")?.parse().ok()?, what);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_meet_by_transfer_id() {
        let mut transfers = BTreeMap::new();
        for line in [
            "2026-11-21T08:00:00Z DEBUG baton::audit: kv transfer_id=00a1 side=\"sent\" rank=0 blocks=3 digest=ff",
            "2026-11-21T08:00:00Z DEBUG baton::audit: kv transfer_id=00a1 side=received rank=0 blocks=3 digest=\"fe\"",
            "2026-11-21T08:00:00Z DEBUG baton::audit: kv transfer_id=00a1 side=sent rank=1 blocks=3 digest=fd",
            "2026-11-21T08:00:00Z DEBUG baton_agent: transfer_id=00a2 side=sent rank=0 blocks=3 digest=ff",
        ] {
            take(line, &mut transfers);
        }
        assert_eq!(transfers.len(), 1);
        let digests =
            |of: &[(u32, &str)]| of.iter().map(|(rank, digest)| (*rank, (3, (*digest).to_owned()))).collect();
        let expected = Transfer { sent: digests(&[(0, "ff"), (1, "fd")]), received: digests(&[(0, "fe")]) };
        assert_eq!(transfers["00a1"], expected);
    }
}
