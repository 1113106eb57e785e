//! Connections to other agents, kept for the next pull.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quinn::Connection;
use quinn::crypto::rustls::QuicClientConfig;

use super::api::{Limits, Peer, PullError};
use super::{socket, transport};
use crate::direct::{self, Link};

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(3);

/// One connection for each peer, opened when first needed and again when it broke.
pub(crate) struct Peers {
    quic: quinn::Endpoint,
    tls: Arc<QuicClientConfig>,
    limits: Limits,
    slots: Mutex<HashMap<Peer, Slot>>,
}

/// Locked while connecting, so that pulls that come meanwhile share the connection.
type Slot = Arc<tokio::sync::Mutex<Option<Link>>>;

impl Peers {
    pub(super) fn new(quic: quinn::Endpoint, tls: Arc<QuicClientConfig>, limits: Limits) -> Self {
        Self { quic, tls, limits, slots: Mutex::default() }
    }

    /// The connection to a peer, and whether it was there before.
    ///
    /// # Cancel safety
    /// Safe to drop.
    pub(crate) async fn get(&self, peer: &Peer) -> Result<(Link, bool), PullError> {
        let unreachable = |reason: String| PullError::Unreachable {
            peer: peer.engine_id.clone(),
            address: peer.address.clone(),
            reason,
        };
        let slot = self.slot(peer).ok_or_else(|| {
            unreachable(format!("connected to {} others, the most allowed", self.limits.max_connections))
        })?;
        let mut slot = slot.lock().await;
        if let Some(link) = slot.as_ref().filter(|link| link.connection.close_reason().is_none()) {
            return Ok((link.clone(), true));
        }
        *slot = None;
        match tokio::time::timeout(CONNECT, self.connect(peer)).await {
            Ok(Ok(connection)) => {
                let link = direct::ask(connection, self.limits.direct).await;
                *slot = Some(link.clone());
                Ok((link, false))
            }
            Ok(Err(reason)) => Err(unreachable(reason)),
            Err(_) => Err(unreachable(format!("no answer within {} s", CONNECT.as_secs()))),
        }
    }

    fn slot(&self, peer: &Peer) -> Option<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get(peer) {
            return Some(slot.clone());
        }
        if slots.len() >= self.limits.max_connections {
            slots.retain(|_, slot| {
                let connection = slot.try_lock();
                connection.is_ok_and(|slot| {
                    slot.as_ref().is_some_and(|open| open.connection.close_reason().is_none())
                })
            });
        }
        if slots.len() >= self.limits.max_connections {
            return None;
        }
        Some(slots.entry(peer.clone()).or_default().clone())
    }

    async fn connect(&self, peer: &Peer) -> Result<Connection, String> {
        let addresses =
            tokio::net::lookup_host(&peer.address).await.map_err(|error| format!("address: {error}"))?;
        let mut reason = "the address resolves to nothing".to_owned();
        for address in addresses {
            let mut config = quinn::ClientConfig::new(self.tls.clone());
            let payload = socket::route_payload(address);
            config.transport_config(transport::transport(&self.limits, payload, false));
            match self.quic.connect_with(config, address, peer.engine_id.as_str()) {
                Ok(connecting) => match connecting.await {
                    Ok(connection) => return Ok(connection),
                    Err(error) => reason = error.to_string(),
                },
                Err(error) => reason = error.to_string(),
            }
        }
        Err(reason)
    }
}
