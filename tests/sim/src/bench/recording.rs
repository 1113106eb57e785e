//! A trace in memory, to be run many times, and in copies.

use std::collections::HashMap;
use std::sync::Arc;

use crate::trace::{Arrival, Rows, Source, When};
use crate::{Nanos, mix, seconds};

/// All requests of a source. Memory: the source's blocks, 8 bytes each, and about 100 bytes a request.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    /// A session, or a request without one, each as its turns.
    chains: Vec<Vec<Arrival>>,
    rows: Rows,
    requests: u64,
}

impl Recording {
    /// Reads a source to its end, or until there are so many requests; sessions are whole.
    pub fn read(source: &mut dyn Source, most: u64) -> Self {
        let (mut chains, mut requests) = (Vec::new(), 0);
        while let Some(first) = if requests < most { source.open() } else { None } {
            let session = first.session;
            let mut chain = vec![first];
            while let Some(next) = session.and_then(|session| source.follow(session)) {
                chain.push(next);
            }
            requests += chain.len() as u64;
            chains.push(chain);
        }
        Self { chains, rows: source.rows().clone(), requests }
    }

    /// Its requests.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// Requests per second of the time in which sessions begin.
    pub fn per_second(&self) -> f64 {
        self.requests as f64 / seconds(self.span()).max(1e-9)
    }

    /// When the last session begins.
    fn span(&self) -> Nanos {
        self.chains.iter().map(|chain| Self::opens_at(chain)).max().unwrap_or(0)
    }

    fn opens_at(chain: &[Arrival]) -> Nanos {
        match chain[0].when {
            When::At(at) | When::After(at) => at,
        }
    }

    /// So many copies (at least one), spread evenly over the time in which the recording's sessions begin. Contents of different copies have nothing in common.
    pub fn replay(self: &Arc<Self>, copies: u32) -> Replay {
        let copies = u64::from(copies.max(1));
        let span = self.span();
        let mut order: Vec<(Nanos, u32, u32)> = Vec::with_capacity(self.chains.len() * copies as usize);
        for copy in 0..copies {
            let shift = (u128::from(span) * u128::from(copy) / u128::from(copies)) as Nanos;
            let opening = |(at, chain): (usize, &Vec<Arrival>)| {
                // What comes behind the end goes on at the beginning: the rate is the same all along.
                let opens_at = Self::opens_at(chain) + shift;
                let opens_at = if opens_at > span { opens_at - span } else { opens_at };
                (opens_at, copy as u32, at as u32)
            };
            order.extend(self.chains.iter().enumerate().map(opening));
        }
        order.sort_unstable();
        Replay { recording: Arc::clone(self), order: order.into_iter(), live: HashMap::new() }
    }
}

/// A recording as a source.
#[derive(Debug)]
pub struct Replay {
    recording: Arc<Recording>,
    order: std::vec::IntoIter<(Nanos, u32, u32)>,
    /// The turn that comes next in sessions that are open.
    live: HashMap<u64, u32>,
}

impl Replay {
    fn arrival(&self, session: u64, turn: u32) -> Option<Arrival> {
        let (copy, chain) = ((session >> 32) as u32, session as u32);
        let mut arrival = self.recording.chains[chain as usize].get(turn as usize)?.clone();
        arrival.session = arrival.session.map(|_| session);
        if copy > 0 {
            let salt = mix(u64::from(copy));
            arrival.blocks = arrival.blocks.iter().map(|id| mix(id ^ salt).max(1)).collect();
        }
        Some(arrival)
    }
}

impl Source for Replay {
    fn open(&mut self) -> Option<Arrival> {
        let (at, copy, chain) = self.order.next()?;
        let session = u64::from(copy) << 32 | u64::from(chain);
        let mut arrival = self.arrival(session, 0)?;
        arrival.when = When::At(at);
        if arrival.session.is_some() {
            self.live.insert(session, 1);
        }
        Some(arrival)
    }

    fn follow(&mut self, session: u64) -> Option<Arrival> {
        let turn = self.live.remove(&session)?;
        let arrival = self.arrival(session, turn)?;
        self.live.insert(session, turn + 1);
        Some(arrival)
    }

    fn abandon(&mut self, session: u64) {
        self.live.remove(&session);
    }

    fn rows(&self) -> &Rows {
        &self.recording.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::{First, Generator, Shape};

    fn all(source: &mut dyn Source) -> Vec<Arrival> {
        let mut arrivals = Vec::new();
        while let Some(first) = source.open() {
            let session = first.session;
            arrivals.push(first);
            while let Some(next) = session.and_then(|session| source.follow(session)) {
                arrivals.push(next);
            }
        }
        arrivals
    }

    #[test]
    fn one_copy_is_the_recording_and_more_share_nothing() {
        let source = || First::new(Generator::new(Shape::mix(), 1.0, 16, 3), 200);
        let recording = Arc::new(Recording::read(&mut source(), u64::MAX));
        assert_eq!(recording.requests(), 200);
        let (once, original) = (all(&mut recording.replay(1)), all(&mut source()));
        let plain = |arrivals: &[Arrival]| -> Vec<_> {
            arrivals.iter().map(|a| (a.when, a.turn, a.prompt_tokens, Arc::clone(&a.blocks))).collect()
        };
        assert_eq!(plain(&once), plain(&original));
        let thrice = all(&mut recording.replay(3));
        assert_eq!(thrice.len(), 600);
        let opens: Vec<Nanos> = thrice
            .iter()
            .filter_map(|a| match a.when {
                When::At(at) => Some(at),
                When::After(_) => None,
            })
            .collect();
        assert!(opens.is_sorted());
        let last = |arrivals: &[Arrival]| -> Vec<u64> {
            arrivals.iter().filter_map(|arrival| arrival.blocks.last().copied()).collect()
        };
        let distinct = |ids: Vec<u64>| ids.into_iter().collect::<std::collections::HashSet<_>>().len();
        assert_eq!(distinct(last(&thrice)), 3 * distinct(last(&once)));
    }
}
