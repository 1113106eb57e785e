//! Held blocks, and their way to the engine that answers.
//!
//! What is computed goes at once, as one flow after another of a request: the next one when the one before has ended and more is there. Where all is computed
//! before it is asked for, that is one flow.

use super::placer::Progress;
use super::{Event, Simulation};
use crate::{Nanos, seconds};

/// What an engine that answers fetches.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Fetching {
    /// Tokens that are to come, while they are.
    pub(super) tokens: u32,
    /// Those that came.
    pub(super) came: u32,
    /// Those on their way.
    going: u32,
    /// Whether the source has heard of it.
    is_asked: bool,
    /// When those on their way began to go.
    since: Nanos,
    /// Time with any on their way, up to then.
    took: Nanos,
}

impl Fetching {
    /// Whether some have not come.
    pub(super) fn lacks(&self) -> bool {
        self.tokens > self.came
    }
}

impl Simulation<'_> {
    pub(super) fn await_transfers(&mut self) {
        if let Some((at, version)) = self.network.next()
            && version != self.awaited_transfers
        {
            self.awaited_transfers = version;
            self.push(at, Event::Transfers { version });
        }
    }

    /// The engine that answers asks for so many tokens.
    pub(super) fn fetch(&mut self, key: u32, tokens: u32) {
        let now = self.now;
        let flight = self.flight(key);
        flight.fetch = Fetching { tokens, ..Fetching::default() };
        let (attempt, more) = (flight.attempt, flight.more_time);
        self.push(now + self.rtt, Event::Send(key, attempt));
        self.push(now + self.pull_deadline + more, Event::Late(key, attempt));
    }

    pub(super) fn send(&mut self, key: u32, attempt: u64) {
        let Some(flight) = self.attempt(key, attempt) else { return };
        // Where its hold has expired meanwhile, or its engine died, there is nothing to fetch.
        if flight.first.is_none() {
            return self.fetched(key, attempt);
        }
        flight.fetch.is_asked = true;
        self.go_on(key);
        self.await_transfers();
    }

    /// What is there and was not sent goes on its way, unless something does already.
    pub(super) fn go_on(&mut self, key: u32) {
        let (now, block_tokens) = (self.now, self.block_tokens);
        let flight = self.flight(key);
        let fetch = &mut flight.fetch;
        let (Some(first), true, 0) = (flight.first, fetch.is_asked && fetch.lacks(), fetch.going) else {
            return;
        };
        let there = match first.ended {
            true => flight.held_tokens,
            false => first.computed / block_tokens * block_tokens,
        };
        // It has the beginning.
        let sent = flight.held_tokens - fetch.tokens + fetch.came;
        let going = there.min(flight.held_tokens).saturating_sub(sent);
        if going == 0 {
            return;
        }
        (fetch.going, fetch.since) = (going, now);
        let (from, to) = flight.plan.transfer().expect("it fetches");
        let bytes = f64::from(going) * self.kv_bytes_per_token;
        let (from, to) = (self.hosts[from as usize], self.hosts[to as usize]);
        self.network.start(now, u64::from(key), from, to, bytes);
    }

    pub(super) fn transfers_ended(&mut self, version: u64) {
        if self.network.next().is_none_or(|next| next.1 != version) {
            return;
        }
        let now = self.now;
        let mut ended = Vec::new();
        self.network.ended(now, &mut ended);
        for key in ended {
            let key = key as u32;
            let flight = self.flight(key);
            let (attempt, fetch) = (flight.attempt, &mut flight.fetch);
            fetch.came += std::mem::take(&mut fetch.going);
            fetch.took += now - fetch.since;
            match fetch.lacks() {
                true => self.go_on(key),
                false => self.push(now + self.rtt, Event::Fetched(key, attempt)),
            }
        }
        self.await_transfers();
    }

    /// A transfer ends before its time; the whole blocks that have come are used. Returns the bytes that had come.
    pub(super) fn cut_short(&mut self, key: u32) -> Option<f64> {
        let left = self.network.cancel(self.now, u64::from(key))?;
        let (now, bytes_per_token, block_tokens) = (self.now, self.kv_bytes_per_token, self.block_tokens);
        let fetch = &mut self.flight(key).fetch;
        let came = f64::from(fetch.came + std::mem::take(&mut fetch.going)) - left / bytes_per_token;
        let came = came.max(0.0);
        fetch.came = came as u32 / block_tokens * block_tokens;
        fetch.took += now - fetch.since;
        self.await_transfers();
        Some(came * bytes_per_token)
    }

    /// Blocks have been on their way for as long as they may.
    pub(super) fn late(&mut self, key: u32, attempt: u64) {
        let Some(flight) = self.attempt(key, attempt) else { return };
        if flight.fetch.lacks() {
            let came = self.cut_short(key);
            let flight = self.flight(key);
            if let (Some(bytes), Some((source, destination))) = (came, flight.plan.transfer()) {
                let (bytes, seconds) = (bytes as u64, seconds(flight.fetch.took));
                let given_up = Progress::GivenUp { source, destination, bytes, seconds };
                self.placer.progress(self.now, key, &given_up);
            }
            self.fetched(key, attempt);
        }
    }

    /// All that will come has come.
    pub(super) fn fetched(&mut self, key: u32, attempt: u64) {
        let (now, rtt) = (self.now, self.rtt);
        let kv_bytes_per_token = self.kv_bytes_per_token;
        let Some(flight) = self.attempt(key, attempt) else { return };
        if flight.fetch.tokens == 0 {
            return;
        }
        let handle = flight.handle.expect("it was submitted");
        let Fetching { tokens, came, took, .. } = std::mem::take(&mut flight.fetch);
        flight.fetch_is_over = true;
        flight.fetched_tokens += came;
        let (plan, measured) = (flight.plan, flight.asked.measured);
        if came == tokens {
            let (source, destination) = plan.transfer().expect("it fetched");
            let transferred = Progress::Transferred {
                source,
                destination,
                bytes: (kv_bytes_per_token * f64::from(tokens)).round() as u64,
                seconds: seconds(took + 2 * rtt),
                rtt_seconds: seconds(rtt),
            };
            self.metrics.transfers += u64::from(measured);
            self.placer.progress(now, key, &transferred);
        } else {
            self.metrics.failed_transfers += u64::from(measured);
        }
        self.engines[plan.decode() as usize].fetched(now, handle, came);
        let released = self.let_go(key);
        self.attend(plan.decode());
        released.into_iter().for_each(|engine| self.attend(engine));
    }

    /// The source of a request's transfer may free its blocks, if it has computed them all. Returns which engine that is.
    pub(super) fn let_go(&mut self, key: u32) -> Option<u32> {
        let flight = self.flights[key as usize].as_mut().expect("it is under way");
        match flight.first {
            Some(first) if first.ended => self.leave(key),
            _ => None,
        }
    }

    /// Nobody asks for a request's first part any more: its blocks are freed, and what is not computed will not be. Returns on which engine.
    pub(super) fn leave(&mut self, key: u32) -> Option<u32> {
        let now = self.now;
        let flight = self.flights[key as usize].as_mut().expect("it is under way");
        let (source, _) = flight.plan.transfer()?;
        let first = flight.first.take()?;
        let engine = &mut self.engines[source as usize];
        match first.ended {
            true => engine.release(now, first.handle),
            false => engine.abort(now, first.handle),
        }
        Some(source)
    }

    /// Held blocks were not asked for in time.
    pub(super) fn expire(&mut self, key: u32, attempt: u64) {
        let Some(flight) = self.attempt(key, attempt) else { return };
        if flight.fetch.tokens == 0 && flight.first.is_some() {
            let measured = flight.asked.measured;
            self.metrics.expired_holds += u64::from(measured);
            let released = self.let_go(key);
            released.into_iter().for_each(|engine| self.attend(engine));
        }
    }
}
