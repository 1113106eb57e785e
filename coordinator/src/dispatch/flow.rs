//! Placing a request and running its legs.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use baton_coordinator_core::cost::{Plan, Priced, Term};
use baton_coordinator_core::kv_index::{Attention, Group, MAX_TICKS};
use baton_coordinator_core::load::{
    DecodeReservation, EngineLoad, PrefillReservation, Reserved, TransferReservation,
};
use baton_coordinator_core::speed::PrefillSample;
use baton_proto::EngineId;
use baton_proto::plan::{Held, Source};
use bytes::Bytes;
use http::header::{CONNECTION, HeaderName, TRANSFER_ENCODING};
use http::{HeaderValue, StatusCode};
use http_body::Frame;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tracing::{info, warn};

use super::account::Account;
use super::admit::Turned;
use super::hold::Holding;
use super::legs;
use super::noted::Noted;
use super::place::{Placement, Unplaced, Wanted};
use super::relay::{Ongoing, Relay};
use super::upstream::UpstreamError;
use crate::http::ApiError;
use crate::metrics::{Mode, Outcome};
use crate::registry::Entry;
use crate::state::Coordinator;

/// Most engines that are asked for an answer.
pub const MAX_ATTEMPTS: usize = 3;
/// Seconds from a block's first token to its event, at most: so long it is expected after that.
const EVENT_DELAY_SECONDS: u64 = 2;

/// The paths that are placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`
    Completions,
    /// `/v1/chat/completions`
    Chat,
}

impl Endpoint {
    /// Its path.
    pub fn path(self) -> &'static str {
        match self {
            Endpoint::Completions => "/v1/completions",
            Endpoint::Chat => "/v1/chat/completions",
        }
    }
}

/// Serves a request to its first byte; the rest follows in the answer's body.
///
/// # Cancel safety
/// Dropping the future, or the answer's body, ends the work on every engine.
pub async fn serve(coordinator: Arc<Coordinator>, wanted: Wanted, permit: OwnedSemaphorePermit) -> Response {
    let account = Account::open(coordinator.clone(), &wanted, permit);
    Flow { coordinator: &coordinator, wanted: &wanted, avoid: Vec::new(), noted: None }.run(account).await
}

pub(super) struct Flow<'a> {
    pub(super) coordinator: &'a Arc<Coordinator>,
    pub(super) wanted: &'a Wanted,
    /// Engines that failed it.
    pub(super) avoid: Vec<EngineId>,
    /// As the planner knows it, if it does.
    pub(super) noted: Option<Noted>,
}

/// A decision, with the engines and reservations it stands for.
pub(super) struct Placed {
    pub(super) priced: Priced,
    prefill: Arc<Entry>,
    pub(super) answer: Arc<Entry>,
    /// Who holds blocks for the engine that answers, and is asked before it.
    pub(super) holder: Option<Arc<Entry>>,
    /// Whether the prefill meets an empty queue, so that its time says how fast the engine is.
    pub(super) alone: bool,
    /// What the prefill engine had reserved before.
    reserved: Reserved,
    /// What the engine that answers would take to compute the prompt by itself.
    unaided_seconds: f64,
    /// Until the first leg is over.
    pub(super) hold_reservation: Option<PrefillReservation>,
    /// Until the answer's first byte, where the engine that answers computes the prompt or its rest.
    prefill_reservation: Option<PrefillReservation>,
    pub(super) decode_reservation: DecodeReservation,
    /// Until the answer's first byte: the pull is over then.
    transfer_reservation: Option<TransferReservation>,
    explanation: Option<HeaderValue>,
}

impl Placed {
    /// What a prefill teaches that began then and has its first token now.
    pub(super) fn sample(&self, began: Instant) -> PrefillSample {
        PrefillSample {
            new: self.priced.uncached_tokens,
            cached: self.priced.hit_tokens,
            seconds: began.elapsed().as_secs_f64(),
            sequences: self.reserved.sequences as f64,
            context_tokens: self.reserved.context_tokens as f64,
        }
    }

    /// The prompt was computed in that time: what was predicted of it is measured by that.
    pub(super) fn prefill_seen(&self, account: &Account, seconds: f64) {
        let terms = &self.priced.terms;
        let mut own = terms.get(Term::MixedSteps) + terms.get(Term::Prefill);
        if self.priced.plan.prefill() == self.priced.plan.decode() {
            own += terms.get(Term::RoomWait);
        }
        match self.alone {
            true => account.seen(Term::Prefill, own, seconds),
            // The engine does not say what of it was the queue.
            false => account.seen(Term::QueueWait, terms.get(Term::QueueWait), (seconds - own).max(0.0)),
        }
    }

    /// The blocks were pulled and the second leg's first token came in that time.
    fn handoff_seen(&self, account: &Account, seconds: f64) {
        let terms = &self.priced.terms;
        let before = [Term::TransferWait, Term::Transfer, Term::DecodeQueueWait, Term::RoomWait];
        let before: f64 = before.iter().map(|term| terms.get(*term)).sum();
        account.seen(Term::FirstStep, terms.get(Term::FirstStep), (seconds - before).max(0.0));
    }

    /// The source came to hold what is to be pulled in that time.
    pub(super) fn hold_seen(&self, account: &Account, seconds: f64) {
        let terms = &self.priced.terms;
        account.seen(Term::Hold, terms.get(Term::Hold), (seconds - terms.get(Term::QueueWait)).max(0.0));
    }

    /// The answer's first token came, and from `asked` on there was nothing but the engine that answers to wait for.
    fn answer_seen(&self, account: &Account, pulled: bool, asked: Instant) {
        let seconds = asked.elapsed().as_secs_f64();
        match self.priced.plan {
            Plan::Disaggregated { .. } if pulled => self.handoff_seen(account, seconds),
            Plan::Pull { .. } if pulled => self.pull_seen(account, seconds),
            // The first leg failed: this was not what was predicted.
            Plan::Disaggregated { .. } | Plan::Pull { .. } => {}
            Plan::Colocated { .. } | Plan::Append { .. } => self.prefill_seen(account, seconds),
        }
        // A time with a transfer in it says little about the engine.
        if self.alone && self.holder.is_none() {
            let sample = self.sample(asked);
            self.answer.learn(|speed| speed.observe_prefill(&sample));
        }
    }

    /// The blocks were pulled, and the rest computed, in that time.
    fn pull_seen(&self, account: &Account, seconds: f64) {
        let terms = &self.priced.terms;
        if self.alone {
            let before = terms.get(Term::TransferWait) + terms.get(Term::Transfer);
            self.prefill_seen(account, (seconds - before).max(0.0));
        }
    }
}

/// An answer that has begun.
pub(super) struct Answer {
    pub(super) response: http::response::Parts,
    /// Its first frame, and the rest.
    pub(super) first: (Option<Frame<Bytes>>, Incoming),
    /// From when on there was nothing but this engine to wait for, where that is known.
    pub(super) asked: Option<Instant>,
}

/// An answer leg that did not begin.
pub(super) enum Failure {
    Unreachable(UpstreamError),
    Status(StatusCode),
    BrokeOff(Option<hyper::Error>),
    Gone,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Unreachable(error) => error.fmt(f),
            Failure::Status(status) => write!(f, "answered {status}"),
            Failure::BrokeOff(Some(error)) => write!(f, "broke off before the first byte: {error}"),
            Failure::BrokeOff(None) => f.write_str("ended before the first byte"),
            Failure::Gone => f.write_str("its agent was not heard from"),
        }
    }
}

impl Flow<'_> {
    async fn run(mut self, mut account: Account) -> Response {
        let mut last = String::new();
        for attempt in 0..MAX_ATTEMPTS {
            let placement = match attempt {
                0 => self.wait_for_room().await,
                _ => self.decide().map_err(Turned::Away),
            };
            let placed = match placement.and_then(|placement| self.reserve(placement)) {
                Ok(placed) => placed,
                Err(turned) => {
                    account.outcome = match turned {
                        Turned::Away(Unplaced::NoEngine(_)) if attempt == 0 => Outcome::NoEngine,
                        Turned::Away(Unplaced::NoEngine(_)) => Outcome::Failed,
                        Turned::Away(Unplaced::Full) | Turned::NoRoom(_) => Outcome::NoRoom,
                    };
                    if account.outcome == Outcome::NoRoom
                        && let Some(noted) = self.noted.take()
                    {
                        noted.turned_away(&self.coordinator.decisions);
                    }
                    return self.refusal(turned).into_response();
                }
            };
            if attempt > 0 {
                self.coordinator.metrics.retries.inc();
            }
            let engine = placed.answer.clone();
            account = match self.attempt(placed, account).await {
                Ok(response) => return response,
                Err((failure, account)) => {
                    warn!(engine = %engine.id, %failure, "an engine failed a request");
                    if matches!(failure, Failure::Unreachable(UpstreamError::Connect(_))) {
                        engine.suspect(Instant::now());
                    }
                    last = format!("{} {failure}", engine.id);
                    account
                }
            };
            self.avoid.push(engine.id.clone());
        }
        account.outcome = Outcome::Failed;
        ApiError::of(StatusCode::BAD_GATEWAY, format!("Every engine that was tried failed; last {last}"))
            .into_response()
    }

    /// Takes what a decision needs.
    fn reserve(&self, placement: Placement) -> Result<Placed, Turned> {
        let Placement { fleet, decision, reserved, hashes, explanation, .. } = placement;
        let priced = decision.chosen;
        let entry = |at: u32| {
            let id = &fleet.engines()[at as usize].info.id;
            let left = || Turned::Away(Unplaced::NoEngine(format!("{id} just left")));
            self.coordinator.registry.get(id).ok_or_else(left)
        };
        let (prefill, answer) = (entry(priced.plan.prefill())?, entry(priced.plan.decode())?);
        let holder = priced.plan.transfer().map(|(holder, _)| entry(holder)).transpose()?;
        if let Some(session) = self.wanted.session {
            self.coordinator.decisions.pin(session, answer.slot);
        }
        let until = (priced.ttft_seconds.ceil() as u64).saturating_add(EVENT_DELAY_SECONDS).min(MAX_TICKS);
        let epoch = fleet.engines()[priced.plan.prefill() as usize].info.epoch;
        // Of several caches, or one of a window, nothing is expected: what stays there of a prompt is the engine's own affair.
        if prefill.registration().groups == [Group::new(Attention::Full)] {
            let until = self.coordinator.decisions.tick() + until;
            // Where it came to a new epoch meanwhile, nothing is expected either.
            let _ = self.coordinator.index.expect(prefill.slot, epoch, &hashes, until);
        }
        let metrics = &self.coordinator.metrics;
        metrics.prompt_tokens.inc_by(self.wanted.prompt.tokens());
        metrics.hit_tokens.inc_by(priced.hit_tokens);
        let explanation = explanation.and_then(|explanation| {
            serde_json::to_string(&explanation).ok().and_then(|json| HeaderValue::try_from(json).ok())
        });
        let tokens = self.wanted.prompt.tokens();
        prefill.learn(|speed| speed.observe_prompt(tokens, priced.hit_tokens));
        let speed = |at: u32| fleet.engines()[at as usize].speed;
        let prefill_reservation =
            prefill.load.reserve_prefill(priced.uncached_tokens, priced.prefill_seconds);
        let (hold_reservation, prefill_reservation) = match (priced.plan, &holder) {
            (Plan::Disaggregated { .. }, _) => (Some(prefill_reservation), None),
            (Plan::Pull { source, .. }, Some(holder)) => {
                let seconds = speed(source).prefill_seconds(1, priced.hit_tokens);
                (Some(holder.load.reserve_prefill(1, seconds)), Some(prefill_reservation))
            }
            _ => (None, Some(prefill_reservation)),
        };
        let transfer_reservation = holder.as_ref().map(|holder| {
            EngineLoad::reserve_transfer((holder.slot, &holder.load), &answer.load, priced.transfer_bytes)
        });
        Ok(Placed {
            alone: decision.alone && self.wanted.prompt.is_known(),
            reserved,
            unaided_seconds: speed(priced.plan.decode()).prefill_seconds(tokens, 0),
            hold_reservation,
            prefill_reservation,
            decode_reservation: answer.load.reserve_decode(tokens),
            transfer_reservation,
            explanation,
            priced,
            prefill,
            answer,
            holder,
        })
    }

    async fn attempt(
        &self,
        mut placed: Placed,
        mut account: Account,
    ) -> Result<Response, (Failure, Account)> {
        account.mode = Mode::Colocated;
        let answer = placed.answer.clone();
        let answered = match placed.holder.clone().map(Holding::on) {
            None => {
                let body = self.wanted.body.bytes().clone();
                self.answer_leg(&mut placed, &answer, body).await.map(|answered| (answered, None))
            }
            Some((holding, _)) if matches!(placed.priced.plan, Plan::Pull { .. }) => {
                let (body, holding) = match self.source_leg(&mut placed, &account, &holding).await {
                    Ok(held) => (self.pull_body(&held, &holding, Duration::ZERO), Some(holding)),
                    Err(reason) => {
                        self.goes_on_without(&mut placed, reason);
                        (self.wanted.body.bytes().clone(), None)
                    }
                };
                self.answer_leg(&mut placed, &answer, body).await.map(|answered| (answered, holding))
            }
            Some(hold) => self.hand_off(&mut placed, &account, hold).await,
        };
        match answered {
            Ok((answered, holding)) => Ok(self.respond(placed, account, holding, answered)),
            Err(failure) => Err((failure, account)),
        }
    }

    /// What the engine that answers is asked where it is to pull, which may take so much longer.
    pub(super) fn pull_body(&self, held: &Held, holding: &Holding, longer: Duration) -> Bytes {
        let source = Source {
            engine_id: holding.engine.id.clone(),
            address: holding.engine.registration().message.transfer_address.clone(),
            epoch: held.epoch,
        };
        let longer_ms = u32::try_from(longer.as_millis()).unwrap_or(u32::MAX);
        let deadline_ms = self.coordinator.config.limits.pull_deadline_ms.saturating_add(longer_ms);
        legs::pull_body(&self.wanted.body, held, source, deadline_ms)
    }

    /// The first leg failed: the engine that answers computes the prompt.
    pub(super) fn goes_on_without(&self, placed: &mut Placed, reason: &'static str) {
        let mode = placed.priced.plan.mode();
        info!(engine = %placed.answer.id, mode, reason, "an answer goes on without a plan");
        self.coordinator.metrics.handoff_fallbacks.inc(reason);
        placed.hold_reservation = None;
        placed.transfer_reservation = None;
        let (tokens, seconds) = (self.wanted.prompt.tokens(), placed.unaided_seconds);
        placed.prefill_reservation = Some(placed.answer.load.reserve_prefill(tokens, seconds));
    }

    /// Asks for the answer, with nothing left to wait for but this engine, and waits for its first byte.
    pub(super) async fn answer_leg(
        &self,
        placed: &mut Placed,
        engine: &Arc<Entry>,
        body: Bytes,
    ) -> Result<Answer, Failure> {
        placed.decode_reservation.sent();
        let asked = Some(Instant::now());
        let (response, first) = self.ask_for_answer(engine, body).await?;
        Ok(Answer { response, first, asked })
    }

    /// Asks for the answer and waits for its first byte.
    pub(super) async fn ask_for_answer(
        &self,
        engine: &Arc<Entry>,
        body: Bytes,
    ) -> Result<(http::response::Parts, (Option<Frame<Bytes>>, Incoming)), Failure> {
        let upstream = engine.upstream();
        let gone = engine.gone();
        let ask = async {
            let response = upstream
                .post(self.wanted.endpoint.path(), &self.wanted.headers, body)
                .await
                .map_err(Failure::Unreachable)?;
            if response.status().is_server_error() {
                return Err(Failure::Status(response.status()));
            }
            let (parts, mut body) = response.into_parts();
            let first = match body.frame().await {
                Some(Ok(frame)) => Some(frame),
                Some(Err(error)) => return Err(Failure::BrokeOff(Some(error))),
                None if self.wanted.stream && parts.status.is_success() => {
                    return Err(Failure::BrokeOff(None));
                }
                None => None,
            };
            Ok((parts, (first, body)))
        };
        tokio::select! {
            begun = ask => begun,
            () = gone.cancelled() => Err(Failure::Gone),
        }
    }

    fn respond(
        &self,
        placed: Placed,
        mut account: Account,
        holding: Option<Holding>,
        answer: Answer,
    ) -> Response {
        let Answer { response: mut parts, first: (first, inner), asked } = answer;
        if holding.is_some() {
            account.mode = match placed.priced.plan {
                Plan::Pull { .. } => Mode::Pull,
                _ => Mode::Disaggregated,
            };
        }
        let streaming = self.wanted.stream && parts.status.is_success();
        if streaming {
            account.first_token();
            if let Some(asked) = asked {
                placed.answer_seen(&account, holding.is_some(), asked);
            }
        }
        for name in [CONNECTION, TRANSFER_ENCODING, HeaderName::from_static("keep-alive")] {
            parts.headers.remove(name);
        }
        let text = |value: &str| HeaderValue::from_str(value).expect("engine ids and modes are plain ASCII");
        let prefill = if holding.is_some() { &placed.prefill } else { &placed.answer };
        for (name, value) in [
            ("x-baton-mode", text(account.mode.as_str())),
            ("x-baton-prefill", text(prefill.id.as_str())),
            ("x-baton-decode", text(placed.answer.id.as_str())),
            ("x-baton-hit-tokens", HeaderValue::from(placed.priced.hit_tokens)),
        ] {
            parts.headers.insert(name, value);
        }
        if let Some(holding) = &holding {
            parts.headers.insert("x-baton-transfer-id", text(&holding.transfer_id.to_string()));
            if account.mode == Mode::Pull {
                parts.headers.insert("x-baton-source", text(holding.engine.id.as_str()));
            }
        }
        if let Some(explanation) = placed.explanation {
            parts.headers.insert("x-baton-explain", explanation);
        }
        if parts.status.is_client_error() {
            account.outcome = Outcome::EngineRefused;
        }
        // With the first byte the pull is over, well or not: the hold goes with `holding`.
        drop(holding);
        let ongoing = Ongoing {
            account,
            engine: placed.answer,
            prefill: placed.prefill_reservation,
            decode: placed.decode_reservation,
            itl_seconds: placed.priced.itl_seconds,
            begun: self.noted.as_ref().map(Noted::begun),
        };
        Response::from_parts(parts, Body::new(Relay::new(first, inner, streaming, ongoing)))
    }
}
