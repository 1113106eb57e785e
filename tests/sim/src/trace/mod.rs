//! What arrives at a fleet: recorded traces and seeded generators, in one form.
//!
//! | source | from |
//! |---|---|
//! | [`Mooncake`] | JSON lines with block ids of 512 tokens |
//! | [`Azure`] | CSV with lengths only |
//! | [`Sessions`] | JSON lines of agent calls with their full text |
//! | [`MultiTurn`] | JSON lines of conversations with delays |
//! | [`Generator`] | seeded chat, agent loops, long documents, mixes |
//!
//! [`Scaled`] changes a source's rate, [`First`] ends it early. [`Conversations`] reads sessions whole, and [`Prompts`] makes token ids of
//! blocks, for clients that send a trace to real engines. Readers hold one row at a time, and the state of sessions that are
//! open; [`Sessions`] besides 40 bytes a row, because its rows may stand in any order. A malformed row is left out, counted and
//! reported with its line and field ([`Rows`]).

mod azure;
mod context;
mod conversation;
mod generate;
mod json;
mod mooncake;
mod multiturn;
mod prompt;
mod rows;
mod sessions;
mod text;

pub use self::azure::Azure;
pub use self::context::{Chain, Context};
pub use self::conversation::{Content, Conversation, Conversations, Message, Turn};
pub use self::generate::{Generator, Length, Shape};
pub use self::mooncake::{Mooncake, Row as MooncakeRow, Rows as MooncakeRows};
pub use self::multiturn::{MultiTurn, MultiTurnOptions};
pub use self::prompt::{LEAST_ALPHABET, Prompts, Said};
pub use self::rows::{BadRow, Rows};
pub use self::sessions::{Sessions, SessionsOptions};
pub use self::text::{Approximate, Tokenise};

use std::sync::Arc;

use crate::Nanos;

/// When a request arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// At this time.
    At(Nanos),
    /// This long after the end of the turn before it in its session.
    After(Nanos),
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// When.
    pub when: When,
    /// The session that it is a turn of.
    pub session: Option<u64>,
    /// Its place in the session, from 0.
    pub turn: u32,
    /// Tokens of the prompt, at least 1.
    pub prompt_tokens: u32,
    /// Those of them that the session has not seen, by the trace's own account; all in a first turn.
    pub new_tokens: u32,
    /// Tokens that are generated, at least 1.
    pub output_tokens: u32,
    /// Chained ids of the whole blocks of prompt and output. Equal ids mean equal blocks after equal prefixes.
    pub blocks: Arc<[u64]>,
}

/// A stream of requests.
pub trait Source {
    /// The next request that waits for no other: one without a session, or a session's first. In order of time.
    fn open(&mut self) -> Option<Arrival>;

    /// The turn after the one that this session ended last; `None` where it was the last one.
    fn follow(&mut self, session: u64) -> Option<Arrival>;

    /// What was read so far.
    fn rows(&self) -> &Rows;

    /// What the request says that [`Source::open`] or [`Source::follow`] returned last, where the trace has its text and was told to keep it. Each
    /// text is given once.
    fn content(&mut self) -> Option<Content> {
        None
    }
}

impl<S: Source + ?Sized> Source for Box<S> {
    fn open(&mut self) -> Option<Arrival> {
        (**self).open()
    }

    fn follow(&mut self, session: u64) -> Option<Arrival> {
        (**self).follow(session)
    }

    fn rows(&self) -> &Rows {
        (**self).rows()
    }

    fn content(&mut self) -> Option<Content> {
        (**self).content()
    }
}

/// A source at another rate: what waits for no other comes `rate` times as often. Pauses within sessions stay as they are:
/// a session is somebody who reads and types.
#[derive(Debug)]
pub struct Scaled<S> {
    source: S,
    rate: f64,
}

impl<S: Source> Scaled<S> {
    /// `rate` is positive and finite; anything else counts as 1.
    pub fn new(source: S, rate: f64) -> Self {
        let rate = if rate.is_finite() && rate > 0.0 { rate } else { 1.0 };
        Self { source, rate }
    }
}

impl<S: Source> Source for Scaled<S> {
    fn open(&mut self) -> Option<Arrival> {
        let mut arrival = self.source.open()?;
        if let When::At(at) = &mut arrival.when {
            *at = (*at as f64 / self.rate).round() as Nanos;
        }
        Some(arrival)
    }

    fn follow(&mut self, session: u64) -> Option<Arrival> {
        self.source.follow(session)
    }

    fn rows(&self) -> &Rows {
        self.source.rows()
    }

    fn content(&mut self) -> Option<Content> {
        self.source.content()
    }
}

/// The first requests of a source, later turns included.
#[derive(Debug)]
pub struct First<S> {
    source: S,
    left: u64,
}

impl<S: Source> First<S> {
    /// At most `requests` of them.
    pub fn new(source: S, requests: u64) -> Self {
        Self { source, left: requests }
    }

    fn count(&mut self, arrival: Option<Arrival>) -> Option<Arrival> {
        self.left -= u64::from(arrival.is_some());
        arrival
    }
}

impl<S: Source> Source for First<S> {
    fn open(&mut self) -> Option<Arrival> {
        if self.left == 0 {
            return None;
        }
        let arrival = self.source.open();
        self.count(arrival)
    }

    fn follow(&mut self, session: u64) -> Option<Arrival> {
        if self.left == 0 {
            return None;
        }
        let arrival = self.source.follow(session);
        self.count(arrival)
    }

    fn rows(&self) -> &Rows {
        self.source.rows()
    }

    fn content(&mut self) -> Option<Content> {
        self.source.content()
    }
}
