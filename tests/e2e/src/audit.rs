//! What the agents' audit lines say about each transfer: the digest of the KV bytes that left, and of those that arrived.
//!
//! At debug level, target `baton::audit`, each side of a transfer logs one line with `transfer_id`, `side`, `blocks` and
//! `digest`. The receiver computes its digest by reading the engine's memory back.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;

/// Both sides of one transfer, as far as they were logged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transfer {
    /// Blocks and digest of what left.
    pub sent: Option<(u64, String)>,
    /// Blocks and digest of what arrived.
    pub received: Option<(u64, String)>,
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
    let what = Some((field("blocks")?.parse().ok()?, field("digest")?.to_owned()));
    match field("side")? {
        "sent" => entry.sent = what,
        "received" => entry.received = what,
        _ => {}
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_meet_by_transfer_id() {
        let mut transfers = BTreeMap::new();
        for line in [
            "2026-11-21T08:00:00Z DEBUG baton::audit: kv transfer_id=00a1 side=\"sent\" blocks=3 digest=ff",
            "2026-11-21T08:00:00Z DEBUG baton::audit: kv transfer_id=00a1 side=received blocks=3 digest=\"fe\"",
            "2026-11-21T08:00:00Z DEBUG baton_agent: transfer_id=00a2 side=sent blocks=3 digest=ff",
        ] {
            take(line, &mut transfers);
        }
        assert_eq!(transfers.len(), 1);
        assert_eq!(
            transfers["00a1"],
            Transfer { sent: Some((3, "ff".into())), received: Some((3, "fe".into())) }
        );
    }
}
