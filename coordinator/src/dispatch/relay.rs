//! An engine's answer on its way to the client: every frame goes on as it came, at once.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use baton_coordinator_core::cost::Term;
use baton_coordinator_core::load::{DecodeReservation, PrefillReservation, Reserved};
use baton_coordinator_core::speed::DecodeSample;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::account::Account;
use super::noted::Begun;
use crate::metrics::Outcome;
use crate::registry::Entry;

/// What lasts as long as the answer, and ends on every way out.
pub(super) struct Ongoing {
    pub(super) account: Account,
    pub(super) engine: Arc<Entry>,
    /// Until the first frame.
    pub(super) prefill: Option<PrefillReservation>,
    pub(super) decode: DecodeReservation,
    /// Predicted between two tokens.
    pub(super) itl_seconds: f64,
    /// As the planner knows the request, if it does.
    pub(super) begun: Option<Begun>,
}

/// The body of the answer.
pub(super) struct Relay {
    first: Option<Frame<Bytes>>,
    inner: Incoming,
    stream: Option<Progress>,
    ongoing: Ongoing,
}

/// What a stream teaches about decoding.
struct Progress {
    began: Instant,
    last: Instant,
    events: u64,
    /// Of the engine, at the first token.
    reserved: Reserved,
    prefilled_seconds: f64,
}

impl Relay {
    /// Begins with a frame that was read already; `None` for an empty body. `streaming` says that each event
    /// is a token, more or less.
    pub(super) fn new(
        first: Option<Frame<Bytes>>,
        inner: Incoming,
        streaming: bool,
        mut ongoing: Ongoing,
    ) -> Self {
        if let Some(reservation) = ongoing.prefill.take() {
            reservation.computed();
        }
        let now = Instant::now();
        let load = &ongoing.engine.load;
        let stream = streaming.then(|| Progress {
            began: now,
            last: now,
            events: 0,
            reserved: load.reserved(),
            prefilled_seconds: load.prefilled_seconds(),
        });
        Self { first, inner, stream, ongoing }
    }

    fn ended(&mut self, outcome: Outcome) {
        // What the engine refused stays so, however its body ends.
        if self.ongoing.account.outcome == Outcome::Cancelled {
            self.ongoing.account.outcome = outcome;
        }
        let Some(progress) = self.stream.take() else { return };
        if outcome == Outcome::Ok {
            let load = &self.ongoing.engine.load;
            let (before, after) = (progress.reserved, load.reserved());
            let mean = |before: u64, after: u64| (before as f64 + after as f64) / 2.0;
            let sample = DecodeSample {
                tokens: progress.events,
                seconds: progress.last.duration_since(progress.began).as_secs_f64(),
                stalled_seconds: load.prefilled_seconds() - progress.prefilled_seconds,
                sequences: mean(before.sequences, after.sequences),
                context_tokens: mean(before.context_tokens, after.context_tokens),
            };
            let predicted = self.ongoing.itl_seconds * sample.tokens as f64;
            if sample.tokens > 0 {
                self.ongoing.account.seen(Term::Decode, predicted, sample.seconds);
            }
            if let Some(begun) = self.ongoing.begun {
                begun.finished(self.ongoing.account.decisions(), sample.tokens, sample.seconds);
            }
            self.ongoing.engine.learn(|speed| speed.observe_decode(&sample));
        }
    }

    fn passed(&mut self, frame: &Frame<Bytes>) {
        if let (Some(progress), Some(data)) = (&mut self.stream, frame.data_ref()) {
            // The last event is no token.
            let data = data.strip_suffix(b"data: [DONE]\n\n").unwrap_or(data);
            let events = data.windows(2).filter(|pair| pair == b"\n\n").count() as u64;
            if events > 0 {
                progress.events += events;
                self.ongoing.decode.grew(events);
                progress.last = Instant::now();
            }
        }
    }
}

impl Body for Relay {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(frame) = self.first.take() {
            return Poll::Ready(Some(Ok(frame)));
        }
        let polled = Pin::new(&mut self.inner).poll_frame(context);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => self.passed(frame),
            Poll::Ready(Some(Err(_))) => self.ended(Outcome::Failed),
            Poll::Ready(None) => self.ended(Outcome::Ok),
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let buffered = self.first.as_ref().and_then(Frame::data_ref).map_or(0, |data| data.len() as u64);
        let inner = self.inner.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(inner.lower() + buffered);
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper + buffered);
        }
        hint
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // A server need not poll once more when the length is reached.
        if self.is_end_stream() && self.ongoing.account.outcome == Outcome::Cancelled {
            self.ended(Outcome::Ok);
        }
    }
}
