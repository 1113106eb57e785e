//! First legs: what makes an engine hold blocks that the engine that answers will pull.
//!
//! A handoff's first leg computes the prompt ([`super::handoff`]). A pull's first leg asks for one token behind a prefix that the engine has
//! cached: the shortest request whose blocks are that prefix, since an engine computes one token of a prompt in any case.

use std::sync::Arc;
use std::time::Duration;

use baton_proto::TransferId;
use baton_proto::plan::Held;
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::debug;

use super::account::Account;
use super::flow::{Endpoint, Flow, Placed};
use super::legs;
use super::upstream::UpstreamError;
use crate::registry::Entry;

/// Largest answer of a first leg: one token, and the hold.
const MAX_ANSWER: usize = 1 << 20;

/// A hold, or what may become one; released when this is dropped.
pub(super) struct Holding {
    pub(super) engine: Arc<Entry>,
    pub(super) transfer_id: TransferId,
}

impl Holding {
    /// To be made before the engine is asked: from then on there may be a hold, whatever becomes of the request. Tells, too, when
    /// the prompt's blocks are held as they are computed.
    pub(super) fn on(engine: Arc<Entry>) -> (Self, oneshot::Receiver<Held>) {
        let transfer_id = TransferId::from_bytes(rand::random());
        let taken = engine.await_hold(transfer_id);
        (Self { engine, transfer_id }, taken)
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        // After a successful pull the hold is gone already, and the agent ignores this.
        self.engine.release_hold(self.transfer_id);
    }
}

/// What a leg's failures are called in the metrics.
pub(super) struct Words {
    unreachable: &'static str,
    broke_off: &'static str,
    refused: &'static str,
    engine_gone: &'static str,
}

pub(super) const PREFILL: Words = Words {
    unreachable: "prefill_unreachable",
    broke_off: "prefill_broke_off",
    refused: "prefill_refused",
    engine_gone: "prefill_engine_gone",
};
const SOURCE: Words = Words {
    unreachable: "source_unreachable",
    broke_off: "source_broke_off",
    refused: "source_refused",
    engine_gone: "source_engine_gone",
};

impl Flow<'_> {
    /// Makes the source of a pull hold what it has cached of the prompt. It may take no longer than the pull may: the source
    /// may have evicted the blocks, and computes them then.
    pub(super) async fn source_leg(
        &self,
        placed: &mut Placed,
        account: &Account,
        holding: &Holding,
    ) -> Result<Held, &'static str> {
        let limits = &self.coordinator.config.limits;
        let cached = u32::try_from(placed.priced.hit_tokens).map_err(|_| "no_hold")?;
        let tokens = self.wanted.prompt.first_tokens(cached as usize + 1).ok_or("no_hold")?;
        let body = legs::source_body(&self.wanted.body, &tokens, holding.transfer_id, limits.hold_lease_ms);
        let longest = Duration::from_millis(limits.pull_deadline_ms.into());
        let began = Instant::now();
        let ask = self.ask_to_hold(&holding.engine, Endpoint::Completions, body, &SOURCE);
        let answer = tokio::time::timeout(longest, ask).await.map_err(|_| "source_late")??;
        placed.hold_seen(account, began.elapsed().as_secs_f64());
        if let Some(reservation) = placed.hold_reservation.take() {
            reservation.computed();
        }
        let held = legs::held(&answer, holding.transfer_id).filter(|held| held.num_tokens > cached);
        // What is pulled are whole blocks; the one token is computed anew.
        Ok(Held { num_tokens: cached, ..held.ok_or("no_hold")? })
    }

    /// Has an engine answer a leg. An error is a word for the metrics.
    pub(super) async fn ask_to_hold(
        &self,
        engine: &Arc<Entry>,
        endpoint: Endpoint,
        body: Bytes,
        words: &Words,
    ) -> Result<Bytes, &'static str> {
        let upstream = engine.upstream();
        let ask = async {
            let asked = upstream.post(endpoint.path(), &self.wanted.headers, body).await;
            let response = asked.map_err(|error| {
                debug!(engine = %engine.id, %error, "a first leg failed");
                match error {
                    UpstreamError::Connect(_) => {
                        engine.suspect(Instant::now());
                        words.unreachable
                    }
                    UpstreamError::Broken(_) | UpstreamError::Url(_) => words.broke_off,
                }
            })?;
            if !response.status().is_success() {
                return Err(words.refused);
            }
            let answer = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            Ok(answer.map_err(|_| words.broke_off)?.to_bytes())
        };
        let gone = engine.gone();
        tokio::select! {
            answer = ask => answer,
            () = gone.cancelled() => Err(words.engine_gone),
        }
    }
}
