//! Whole sessions, for whoever has to know what comes next: a client that sends them.

use super::{Arrival, Source, When};
use crate::rng::Rng;
use crate::{Nanos, nanos};

/// What a request says, where its trace has text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Its whole prompt.
    Prompt(String),
    /// What it adds to what was said in its session before it, answers included.
    Messages(Vec<Message>),
}

/// A message of a chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who says it.
    pub role: String,
    /// What.
    pub text: String,
}

/// A request of a session, with what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Its lengths, and what its blocks hold. Its [`Arrival::when`] is `After` in all turns but a session's first.
    pub arrival: Arrival,
    /// Its text; `None` where only the shape is known.
    pub content: Option<Content>,
}

impl Turn {
    /// The pause before it: 0 in a session's first turn.
    pub fn pause(&self) -> Nanos {
        match self.arrival.when {
            When::After(pause) => pause,
            When::At(_) => 0,
        }
    }
}

/// A session, or a request without one, from its first turn to its last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// Counts them from 0.
    pub number: u64,
    /// When it begins.
    pub opens_at: Nanos,
    /// Its requests, at least one.
    pub turns: Vec<Turn>,
}

/// The conversations of a source, one at a time, in the order in which they begin.
#[derive(Debug)]
pub struct Conversations<S> {
    source: S,
    /// At least so many requests are left; the session that reaches the end is whole.
    left: u64,
    number: u64,
    random: Option<Random>,
}

/// Beginnings of a Poisson process.
#[derive(Debug)]
struct Random {
    rng: Rng,
    mean_seconds: f64,
    now: f64,
}

impl<S: Source> Conversations<S> {
    /// All of a source, or those with its first `most` requests; the last one is whole all the same.
    pub fn new(source: S, most: u64) -> Self {
        Self { source, left: most, number: 0, random: None }
    }

    /// The same ones, but they begin at random, `per_second` of them on average (a Poisson process), whenever the source says that they begin.
    /// Pauses within them stay. What is not positive counts as 1.
    pub fn at_random(mut self, per_second: f64, seed: u64) -> Self {
        let per_second = if per_second.is_finite() && per_second > 0.0 { per_second } else { 1.0 };
        let rng = Rng::new(seed).fork(OPENINGS);
        self.random = Some(Random { rng, mean_seconds: 1.0 / per_second, now: 0.0 });
        self
    }

    /// The source, for how its reading went.
    pub fn source(&self) -> &S {
        &self.source
    }
}

/// The part of the random numbers that beginnings are drawn from.
const OPENINGS: u64 = 0x6f70_656e;

impl<S: Source> Iterator for Conversations<S> {
    type Item = Conversation;

    fn next(&mut self) -> Option<Conversation> {
        if self.left == 0 {
            return None;
        }
        let first = self.source.open()?;
        let session = first.session;
        let recorded = match first.when {
            When::At(at) | When::After(at) => at,
        };
        let opens_at = match &mut self.random {
            None => recorded,
            Some(random) => {
                random.now += random.rng.exponential(random.mean_seconds);
                nanos(random.now)
            }
        };
        let mut turns = vec![Turn { arrival: first, content: self.source.content() }];
        while let Some(arrival) = session.and_then(|session| self.source.follow(session)) {
            turns.push(Turn { arrival, content: self.source.content() });
        }
        self.left = self.left.saturating_sub(turns.len() as u64);
        self.number += 1;
        Some(Conversation { number: self.number - 1, opens_at, turns })
    }
}
