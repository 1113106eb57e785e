//! A handoff: a prefill leg that makes an engine compute the prompt and hold it, and the answer leg of another one that pulls it.
//!
//! The answer leg begins when the prefill leg is over, or before: where the engine computes the prompt in chunks, its agent says when the first
//! one begins, and the cost model how long after that the answer is to be asked for, so that the pull is over soon after the prefill. The
//! agents see to it that no block is pulled before it is computed. If the prefill fails then, the hold goes, with it the pull,
//! and the engine that answers computes the prompt.

use std::pin::pin;
use std::time::Duration;

use baton_proto::plan::Held;
use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::account::Account;
use super::flow::{Answer, Failure, Flow, Placed};
use super::hold::{Holding, PREFILL};
use super::legs;

/// How the prefill leg stands when the answer is to be asked for.
enum Prefill {
    /// It is over: the engine's answer, or a word for the metrics.
    Over(Result<Bytes, &'static str>),
    /// Blocks are held as they are computed.
    UnderWay(Held),
}

/// Waits until it is over, or until `after` behind the moment when the hold was `taken`.
async fn until_asked(
    prefill: impl Future<Output = Result<Bytes, &'static str>>,
    taken: oneshot::Receiver<Held>,
    after: Option<Duration>,
) -> Prefill {
    let asked = async {
        match (after, taken.await) {
            (Some(after), Ok(held)) => {
                sleep(after).await;
                held
            }
            _ => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        answer = prefill => Prefill::Over(answer),
        held = asked => Prefill::UnderWay(held),
    }
}

impl Flow<'_> {
    /// Runs both legs up to the answer's first byte. Gives the hold that was pulled from, unless the answer went on without.
    pub(super) async fn hand_off(
        &self,
        placed: &mut Placed,
        account: &Account,
        (holding, taken): (Holding, oneshot::Receiver<Held>),
    ) -> Result<(Answer, Option<Holding>), Failure> {
        let (answer, transfer_id) = (placed.answer.clone(), holding.transfer_id);
        let lease_ms = self.coordinator.config.limits.hold_lease_ms;
        let body = legs::prefill_body(&self.wanted.body, transfer_id, lease_ms);
        let began = Instant::now();
        let (prefill_engine, endpoint) = (holding.engine.clone(), self.wanted.endpoint);
        let mut prefill = pin!(self.ask_to_hold(&prefill_engine, endpoint, body, &PREFILL));
        let after = placed.priced.answer_after_seconds().filter(|_| prefill_engine.knows_prefill());
        // What no clock can wait for is not overlapped.
        let after = after.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let held = match until_asked(&mut prefill, taken, after).await {
            Prefill::UnderWay(held) => held,
            Prefill::Over(over) => {
                let over = over.and_then(|over| self.prefilled(placed, account, &holding, &over, began));
                return match over {
                    Ok(held) => {
                        let body = self.pull_body(&held, &holding, Duration::ZERO);
                        Ok((self.answer_leg(placed, &answer, body).await?, Some(holding)))
                    }
                    Err(reason) => {
                        self.goes_on_without(placed, reason);
                        let body = self.wanted.body.bytes().clone();
                        Ok((self.answer_leg(placed, &answer, body).await?, None))
                    }
                };
            }
        };
        self.coordinator.metrics.handoffs_overlapped.inc();
        // The pull waits for the prefill.
        let longer =
            Duration::try_from_secs_f64(placed.priced.longer_pull_seconds()).unwrap_or(Duration::MAX);
        let body = self.pull_body(&held, &holding, longer);
        placed.decode_reservation.sent();
        let mut asked = pin!(self.ask_for_answer(&answer, body));
        let (mut holding, mut handed_over) = (Some(holding), None);
        let (response, first) = loop {
            tokio::select! {
                biased;
                over = &mut prefill, if handed_over.is_none() => {
                    handed_over = Some(Instant::now());
                    holding = holding.filter(|holding| {
                        let over = over.and_then(|over| self.prefilled(placed, account, holding, &over, began));
                        over.map_err(|reason| self.goes_on_without(placed, reason)).is_ok()
                    });
                }
                answer = &mut asked => break answer?,
            }
        };
        Ok((Answer { response, first, asked: handed_over }, holding))
    }

    /// The prefill engine has answered: what it holds, and what is learnt from that.
    fn prefilled(
        &self,
        placed: &mut Placed,
        account: &Account,
        holding: &Holding,
        answer: &[u8],
        began: Instant,
    ) -> Result<Held, &'static str> {
        placed.prefill_seen(account, began.elapsed().as_secs_f64());
        if placed.alone {
            let sample = placed.sample(began);
            holding.engine.learn(|speed| speed.observe_prefill(&sample));
        }
        if let Some(reservation) = placed.hold_reservation.take() {
            reservation.computed();
        }
        let held = legs::held(answer, holding.transfer_id).ok_or("no_hold")?;
        if u64::from(held.num_tokens) != self.wanted.prompt.tokens() {
            self.coordinator.metrics.token_mismatches.inc();
            warn!(
                model = self.wanted.model,
                engine = held.num_tokens,
                ours = self.wanted.prompt.tokens(),
                "the engine counts other prompt tokens: is models.path the directory it serves?"
            );
        }
        Ok(held)
    }
}
