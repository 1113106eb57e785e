//! A session at one server: what it has said and heard, and the request that comes next.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_sim::trace::{Content, Conversation, Prompts, Said as SaidTokens};
use indicatif::ProgressBar;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

use super::ask::{self, Answer, Failure, Input, Prepared, Said};
use super::endpoint::Endpoint;
use super::tally::{Report, Slo, Tally};

/// What both servers of a run have in common.
#[derive(Clone)]
pub(super) struct Common {
    /// What makes prompts where there is no text, or why there are none.
    pub(super) prompts: Result<Prompts, String>,
    pub(super) slo: Slo,
    pub(super) seed: u64,
    /// Most requests under way at one server.
    pub(super) in_flight: u32,
    pub(super) started: Instant,
    /// Turns true when the run is to end early.
    pub(super) stop: watch::Receiver<bool>,
    pub(super) progress: ProgressBar,
}

/// One server and what it did so far.
pub(super) struct Side {
    endpoint: Endpoint,
    common: Common,
    permits: Arc<Semaphore>,
    tally: Mutex<Tally>,
}

impl Side {
    pub(super) fn new(endpoint: Endpoint, common: Common) -> Self {
        let permits = Arc::new(Semaphore::new(common.in_flight as usize));
        Self { endpoint, common, permits, tally: Mutex::default() }
    }

    pub(super) fn report(&self) -> Report {
        self.tally().report(self.endpoint.client.base(), &self.endpoint.model)
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        // Whoever panicked left whole counts.
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until one more request may be sent; `None` where the run ends before, and the request that is due stays without an answer. Who waits
    /// longest is first.
    pub(super) async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() {
            return Some(permit);
        }
        self.tally().held_back();
        let permit = tokio::select! {
            permit = Arc::clone(&self.permits).acquire_owned() => permit.ok(),
            () = stopped(self.common.stop.clone()) => None,
        };
        if permit.is_none() {
            self.tally().unfinished();
        }
        permit
    }

    /// Waits for a time of the run; false where the run ends before.
    pub(super) async fn wait_until(&self, at: Instant) -> bool {
        wait_until(at, &self.common.stop).await
    }
}

/// Waits for a time; false where the run ends before.
pub(super) async fn wait_until(at: Instant, stop: &watch::Receiver<bool>) -> bool {
    tokio::select! {
        biased;
        () = stopped(stop.clone()) => false,
        () = tokio::time::sleep_until(at) => true,
    }
}

/// Resolves when the run is to end early.
async fn stopped(mut stop: watch::Receiver<bool>) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        // Nobody is left who could end it.
        std::future::pending().await
    }
}

/// A session at one server. Its next request is written out before it is due, so that writing it is in nobody's latency.
pub(super) struct Session {
    side: Arc<Side>,
    conversation: Arc<Conversation>,
    /// The turn that comes next; the number of turns where the session is over.
    next: usize,
    tokens: SaidTokens,
    messages: Vec<Said>,
    prepared: Option<Result<Prepared, Failure>>,
}

impl Session {
    pub(super) fn new(side: &Arc<Side>, conversation: &Arc<Conversation>) -> Self {
        let mut session = Self {
            side: Arc::clone(side),
            conversation: Arc::clone(conversation),
            next: 0,
            tokens: SaidTokens::default(),
            messages: Vec::new(),
            prepared: None,
        };
        session.prepare();
        session
    }

    /// The server that it is at.
    pub(super) fn side(&self) -> &Side {
        &self.side
    }

    /// The pause before its next turn; `None` where it is over.
    pub(super) fn pause(&self) -> Option<Duration> {
        let turn = self.conversation.turns.get(self.next)?;
        Some(Duration::from_nanos(turn.pause()))
    }

    fn prepare(&mut self) {
        let Some(turn) = self.conversation.turns.get(self.next) else { return };
        let endpoint = &self.side.endpoint;
        let (prompt, output) = (turn.arrival.prompt_tokens, turn.arrival.output_tokens);
        let needed = u64::from(prompt) + u64::from(output);
        if endpoint.longest.is_some_and(|longest| needed > longest) {
            let detail = format!(
                "{prompt} tokens and {output} of answer; the model takes {} in all",
                endpoint.longest.unwrap_or(0)
            );
            self.prepared = Some(Err(Failure::new("too_long", detail)));
            return;
        }
        let said = |role: &str, text: &str| Said { role: role.to_owned(), content: text.to_owned() };
        let input = match &turn.content {
            Some(Content::Prompt(text)) => {
                self.messages = vec![said("user", text)];
                Input::Chat(&self.messages)
            }
            Some(Content::Messages(messages)) => {
                self.messages.extend(messages.iter().map(|message| said(&message.role, &message.text)));
                Input::Chat(&self.messages)
            }
            None => {
                let own = self.conversation.number << 20 | self.next as u64;
                let prompts = match &self.side.common.prompts {
                    Ok(prompts) => prompts,
                    Err(why) => {
                        self.prepared = Some(Err(Failure::new("no_token_ids", why.as_str())));
                        return;
                    }
                };
                let prompt = prompts.next(&mut self.tokens, &turn.arrival, own);
                let answer_ids = self.next + 1 < self.conversation.turns.len();
                Input::Tokens { prompt, answer_ids }
            }
        };
        self.prepared = Some(Ok(Prepared::new(endpoint, input, output)));
    }

    /// Sends its next request, which was due at `due`, and reads the answer. Returns when that ended; `None` where the run is to end. A
    /// failure ends the session: the requests behind it would have to quote an answer that there is not.
    pub(super) async fn ask(&mut self, due: Instant, permit: OwnedSemaphorePermit) -> Option<Instant> {
        let prepared = self.prepared.take()?;
        let (seed, number) = (self.side.common.seed, self.conversation.number);
        let is_session = self.conversation.turns[self.next].arrival.session.is_some();
        let name = is_session.then(|| format!("bench-{seed}-{number}"));
        let sent = Instant::now();
        let lag = sent.saturating_duration_since(due);
        let result = match prepared {
            Err(failure) => Err(failure),
            Ok(request) => {
                self.side.tally().sent(lag);
                let result = tokio::select! {
                    result = ask::ask(&self.side.endpoint, request, name.as_deref()) => Some(result),
                    () = stopped(self.side.common.stop.clone()) => None,
                };
                let mut tally = self.side.tally();
                tally.ended();
                let Some(result) = result else {
                    tally.unfinished();
                    return None;
                };
                result
            }
        };
        let ended = Instant::now();
        drop(permit);
        self.side.common.progress.inc(1);
        let at = ended - self.side.common.started;
        match result {
            Ok(answer) => {
                self.side.tally().answered(at, lag, &answer, self.side.common.slo);
                self.heard(&answer);
                self.next += 1;
                self.prepare();
            }
            Err(failure) => {
                let behind = (self.conversation.turns.len() - self.next - 1) as u64;
                let mut tally = self.side.tally();
                tally.failed(at, &failure);
                tally.behind_a_failure(behind);
                drop(tally);
                self.side.common.progress.inc(behind);
                self.next = self.conversation.turns.len();
            }
        }
        Some(ended)
    }

    /// The answer becomes a part of what was said.
    fn heard(&mut self, answer: &Answer) {
        let turn = &self.conversation.turns[self.next];
        match &turn.content {
            Some(Content::Prompt(_)) => {}
            Some(Content::Messages(_)) => {
                self.messages.push(Said { role: "assistant".to_owned(), content: answer.text.clone() });
            }
            None => {
                let goes_on = self.next + 1 < self.conversation.turns.len();
                if goes_on && answer.ids.is_empty() {
                    self.side.tally().without_ids();
                }
                self.tokens.answered(&answer.ids);
            }
        }
    }
}
