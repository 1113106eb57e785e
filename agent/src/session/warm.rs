//! Keeps connections to the agents that this one may pull from, so that no pull waits for a handshake.

use std::collections::BTreeSet;
use std::time::Duration;

use baton_kv_transfer::{Endpoint, Peer};
use baton_proto::EngineId;
use baton_proto::control::v1;
use futures::StreamExt;
use rand::Rng;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// Most peers that are kept connected.
pub(super) const MAX_PEERS: usize = 256;
/// Connections that are opened at a time.
const CONCURRENCY: usize = 4;
/// Longest time until all connections are looked after again.
const AGAIN: Duration = Duration::from_secs(20);

/// The peers that a list names, this engine left out.
pub(super) fn peers(own: &EngineId, list: v1::Peers) -> Vec<Peer> {
    let mut seen = BTreeSet::new();
    list.peers
        .into_iter()
        .take(MAX_PEERS)
        .filter_map(|peer| {
            let engine_id: EngineId = peer.engine_id.parse().ok()?;
            let new =
                engine_id != *own && peer.transfer_address.len() <= 300 && seen.insert(engine_id.clone());
            new.then_some(Peer { engine_id, address: peer.transfer_address })
        })
        .collect()
}

/// Connects to the peers named last, again and again, until `stop` is cancelled. A peer that does not answer costs
/// nothing but its own turn.
pub(super) async fn keep(endpoint: Endpoint, mut peers: watch::Receiver<Vec<Peer>>, stop: CancellationToken) {
    loop {
        let listed = peers.borrow_and_update().clone();
        let warmed = futures::stream::iter(listed).for_each_concurrent(CONCURRENCY, |peer| {
            let endpoint = &endpoint;
            async move {
                match endpoint.warm(&peer).await {
                    Ok(path) => {
                        tracing::debug!(peer = %peer.engine_id, rtt = ?path.rtt, mtu = path.mtu, "warm")
                    }
                    Err(error) => tracing::debug!(%error, "a peer is not reached"),
                }
            }
        });
        // Agents of one fleet start together; let them not knock together for ever.
        let again = AGAIN.mul_f64(rand::rng().random_range(0.5..1.0));
        tokio::select! {
            () = stop.cancelled() => return,
            changed = peers.changed() => if changed.is_err() { return },
            () = async { warmed.await; sleep(again).await } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_cut_and_cleaned() {
        let peer =
            |id: &str, address: &str| v1::Peer { engine_id: id.into(), transfer_address: address.into() };
        let mut list = vec![peer("own", "a:1"), peer("B", "a:1"), peer("b", "a:1"), peer("b", "a:2")];
        list.extend((0..300).map(|i| peer(&format!("p{i}"), "a:1")));
        let peers = peers(&"own".parse().unwrap(), v1::Peers { peers: list });
        assert_eq!(peers[0], Peer { engine_id: "b".parse().unwrap(), address: "a:1".into() });
        assert_eq!(peers.len(), MAX_PEERS - 3);
    }
}
