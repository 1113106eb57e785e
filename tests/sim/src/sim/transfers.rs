//! Held blocks, and their way to the engine that answers.

use super::placer::Progress;
use super::{Event, Simulation};
use crate::seconds;

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
        flight.fetching = tokens;
        flight.came = 0;
        flight.fetch_began = now;
        let attempt = flight.attempt;
        self.push(now + self.rtt, Event::Send(key, attempt));
        self.push(now + self.pull_deadline, Event::Late(key, attempt));
    }

    pub(super) fn send(&mut self, key: u32, attempt: u64) {
        let now = self.now;
        let Some(flight) = self.attempt(key, attempt) else { return };
        let (from, to) = flight.plan.transfer().expect("it fetches");
        // Where its hold has expired meanwhile, there is nothing to fetch.
        if flight.held.is_none() {
            return self.fetched(key, attempt);
        }
        let bytes = f64::from(flight.fetching) * self.kv_bytes_per_token;
        let (from, to) = (self.hosts[from as usize], self.hosts[to as usize]);
        self.network.start(now, u64::from(key), from, to, bytes);
        self.await_transfers();
    }

    pub(super) fn transfers_ended(&mut self, version: u64) {
        if self.network.next().is_none_or(|next| next.1 != version) {
            return;
        }
        let mut ended = Vec::new();
        self.network.ended(self.now, &mut ended);
        for key in ended {
            let flight = self.flight(key as u32);
            flight.came = flight.fetching;
            let attempt = flight.attempt;
            self.push(self.now + self.rtt, Event::Fetched(key as u32, attempt));
        }
        self.await_transfers();
    }

    /// A transfer ends before its time; the whole blocks that have come are used.
    pub(super) fn cut_short(&mut self, key: u32) {
        let Some(left) = self.network.cancel(self.now, u64::from(key)) else { return };
        let (bytes_per_token, block_tokens) = (self.kv_bytes_per_token, self.block_tokens);
        let flight = self.flight(key);
        let came = f64::from(flight.fetching) - left / bytes_per_token;
        flight.came = came.max(0.0) as u32 / block_tokens * block_tokens;
        self.await_transfers();
    }

    /// Blocks have been on their way for as long as they may.
    pub(super) fn late(&mut self, key: u32, attempt: u64) {
        let Some(flight) = self.attempt(key, attempt) else { return };
        if flight.fetching > flight.came {
            self.cut_short(key);
            self.fetched(key, attempt);
        }
    }

    /// All that will come has come.
    pub(super) fn fetched(&mut self, key: u32, attempt: u64) {
        let (now, rtt) = (self.now, self.rtt);
        let kv_bytes_per_token = self.kv_bytes_per_token;
        let Some(flight) = self.attempt(key, attempt) else { return };
        if flight.fetching == 0 {
            return;
        }
        let handle = flight.handle.expect("it was submitted");
        let (tokens, came) = (std::mem::take(&mut flight.fetching), std::mem::take(&mut flight.came));
        flight.fetched_tokens += came;
        let (plan, measured, began) = (flight.plan, flight.asked.measured, flight.fetch_began);
        if came == tokens {
            let (source, destination) = plan.transfer().expect("it fetched");
            let transferred = Progress::Transferred {
                source,
                destination,
                bytes: (kv_bytes_per_token * f64::from(tokens)).round() as u64,
                seconds: seconds(now - began),
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

    /// The source of a request's transfer may free its blocks. Returns which engine that is.
    pub(super) fn let_go(&mut self, key: u32) -> Option<u32> {
        let now = self.now;
        let flight = self.flights[key as usize].as_mut().expect("it is under way");
        let (source, _) = flight.plan.transfer()?;
        let handle = flight.held.take()?;
        self.engines[source as usize].release(now, handle);
        Some(source)
    }

    /// Held blocks were not asked for in time.
    pub(super) fn expire(&mut self, key: u32, attempt: u64) {
        let Some(flight) = self.attempt(key, attempt) else { return };
        if flight.fetching == 0 && flight.held.is_some() {
            let measured = flight.asked.measured;
            self.metrics.expired_holds += u64::from(measured);
            let released = self.let_go(key);
            released.into_iter().for_each(|engine| self.attend(engine));
        }
    }
}
