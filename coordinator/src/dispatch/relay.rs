//! An engine's answer on its way to the client: every frame goes on as it came, at once.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use baton_coordinator_core::load::{DecodeReservation, PrefillReservation};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::account::Account;
use crate::metrics::Outcome;
use crate::registry::Entry;

/// What lasts as long as the answer, and ends on every way out.
pub(super) struct Ongoing {
    pub(super) account: Account,
    pub(super) engine: Arc<Entry>,
    /// Until the first frame.
    pub(super) prefill: Option<PrefillReservation>,
    pub(super) _decode: DecodeReservation,
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
        ongoing.prefill = None;
        let now = Instant::now();
        let stream = streaming.then_some(Progress { began: now, last: now, events: 0 });
        Self { first, inner, stream, ongoing }
    }

    fn ended(&mut self, outcome: Outcome) {
        // What the engine refused stays so, however its body ends.
        if self.ongoing.account.outcome == Outcome::Cancelled {
            self.ongoing.account.outcome = outcome;
        }
        let Some(progress) = self.stream.take() else { return };
        if outcome == Outcome::Ok {
            let seconds = progress.last.duration_since(progress.began).as_secs_f64();
            self.ongoing.engine.learn(|speed| speed.observe_decode(progress.events, seconds));
        }
    }

    fn passed(&mut self, frame: &Frame<Bytes>) {
        if let (Some(progress), Some(data)) = (&mut self.stream, frame.data_ref()) {
            progress.events += data.windows(2).filter(|pair| pair == b"\n\n").count() as u64;
            progress.last = Instant::now();
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
