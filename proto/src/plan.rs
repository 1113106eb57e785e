//! The transfer plan: what the coordinator tells an engine's connector about one request, inside the request's
//! `kv_transfer_params`, and what the connector says back in the answer's.
//!
//! ```json
//! {"baton": {"version": 1, "transfer_id": "…", "action": "hold", "lease_ms": 30000}}
//! {"baton": {"version": 1, "transfer_id": "…", "action": "pull", "num_tokens": 3000, "deadline_ms": 10000,
//!            "source": {"engine_id": "p0", "address": "10.0.0.7:7420", "epoch": 1763712345678}}}
//! ```
//!
//! The answer to a `hold` carries a [`Held`] under the same key, or nothing where the engine could not hold: then
//! the other engine is simply not given a plan, and computes.
//!
//! In a handoff the prompt itself is held, and pulled whole. To pull what an engine merely has cached, the prompt's cached
//! beginning and one token more are held there, and whole blocks are pulled.

use serde::{Deserialize, Serialize};

use crate::ids::{EngineId, Epoch, TransferId};

/// Version of the plan that this build writes and accepts.
pub const VERSION: u32 = 1;

/// The value of `kv_transfer_params`, in both directions: everything of ours lies under one key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvTransferParams<T> {
    /// Baton's part.
    pub baton: T,
}

/// What one leg of a handoff or a pull does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferPlan {
    /// [`VERSION`].
    pub version: u32,
    /// Names the handoff on both engines.
    pub transfer_id: TransferId,
    /// This engine's part.
    #[serde(flatten)]
    pub action: Action,
}

/// An engine's part in a handoff or a pull.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum Action {
    /// Keep the prompt's blocks as they are computed, until they were pulled or the lease is over.
    Hold {
        /// Counted on the agent's own clock from the last block that was computed.
        lease_ms: u32,
    },
    /// Fetch the blocks of the prompt, or of its beginning, before the request runs.
    Pull {
        /// Who holds them.
        source: Source,
        /// Leading prompt tokens to fetch: all of them, or those of whole blocks; the engine computes the rest.
        num_tokens: u32,
        /// Counted from the moment the pull starts; past it the engine computes what is missing.
        deadline_ms: u32,
    },
}

/// The holding side of a pull.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The holding engine; its agent's certificate must carry this name.
    pub engine_id: EngineId,
    /// host:port of its agent's QUIC endpoint.
    pub address: String,
    /// Its epoch when the blocks were held.
    pub epoch: Epoch,
}

/// The connector's answer to a hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// As in the plan.
    pub transfer_id: TransferId,
    /// The engine's epoch.
    pub epoch: Epoch,
    /// Leading prompt tokens whose KV is held.
    pub num_tokens: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_read_as_documented() {
        let hold = r#"{"baton":{"version":1,"transfer_id":"000000000000000000000000000000a1","action":"hold","lease_ms":30000}}"#;
        let plan: KvTransferParams<TransferPlan> = serde_json::from_str(hold).unwrap();
        assert_eq!(plan.baton.action, Action::Hold { lease_ms: 30_000 });
        assert_eq!(serde_json::to_string(&plan).unwrap(), hold);

        let pull = r#"{"baton":{"version":1,"transfer_id":"000000000000000000000000000000a1","action":"pull","source":{"engine_id":"p0","address":"10.0.0.7:7420","epoch":5},"num_tokens":3000,"deadline_ms":10000}}"#;
        let plan: KvTransferParams<TransferPlan> = serde_json::from_str(pull).unwrap();
        assert!(matches!(&plan.baton.action, Action::Pull { source, .. } if source.epoch == Epoch(5)));
        assert_eq!(serde_json::to_string(&plan).unwrap(), pull);
    }
}
