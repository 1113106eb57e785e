//! A trace in memory, to be run many times, in copies, and in laps without end.

use std::collections::HashMap;
use std::sync::Arc;

use crate::fleet::Slo;
use crate::trace::{Arrival, Rows, Source, When};
use crate::{Nanos, mix, nanos, seconds};

/// All requests of a source. Memory: the source's blocks, 8 bytes each, and about 100 bytes a request.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    /// A session, or a request without one, each as its turns.
    chains: Vec<Vec<Turn>>,
    rows: Rows,
    requests: u64,
}

#[derive(Clone, Debug)]
struct Turn {
    arrival: Arrival,
    /// Leading blocks that other sessions have too.
    common: usize,
}

/// A lap of a copy, and a chain in it, as the order of their beginnings.
type Opening = (Nanos, u32, u32);

impl Recording {
    /// Reads a source to its end, or until there are so many requests; sessions are whole.
    pub fn read(source: &mut dyn Source, most: u64) -> Self {
        let (mut chains, mut requests) = (Vec::new(), 0);
        while let Some(first) = if requests < most { source.open() } else { None } {
            let session = first.session;
            let mut chain = vec![Turn { arrival: first, common: 0 }];
            while let Some(next) = session.and_then(|session| source.follow(session)) {
                chain.push(Turn { arrival: next, common: 0 });
            }
            requests += chain.len() as u64;
            chains.push(chain);
        }
        let mut recording = Self { chains, rows: source.rows().clone(), requests };
        recording.find_common();
        recording
    }

    fn find_common(&mut self) {
        const SEVERAL: usize = usize::MAX;
        let mut owners: HashMap<u64, usize> = HashMap::new();
        for (at, chain) in self.chains.iter().enumerate() {
            if chain[0].arrival.session.is_none() {
                continue;
            }
            for id in chain.iter().flat_map(|turn| turn.arrival.blocks.iter()) {
                let owner = owners.entry(*id).or_insert(at);
                *owner = if *owner == at { at } else { SEVERAL };
            }
        }
        for turn in self.chains.iter_mut().flatten() {
            let is_common = |id: &&u64| owners.get(*id) == Some(&SEVERAL);
            turn.common = turn.arrival.blocks.iter().take_while(is_common).count();
        }
    }

    /// Its requests.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// Whether requests wait for others: some session has several turns.
    pub fn is_closed_loop(&self) -> bool {
        self.chains.iter().any(|chain| chain.len() > 1)
    }

    /// Requests per second of the time in which sessions begin.
    pub fn per_second(&self) -> f64 {
        self.requests as f64 / seconds(self.span()).max(1e-9)
    }

    /// When the last session begins.
    pub fn span(&self) -> Nanos {
        self.chains.iter().map(|chain| Self::opens_at(chain)).max().unwrap_or(0)
    }

    /// How long a session takes on average where each turn takes all the time that the SLOs allow.
    pub fn session_within(&self, slo: &Slo) -> Nanos {
        let turn = |turn: &Turn| {
            let pause = match turn.arrival.when {
                When::At(_) => 0.0,
                When::After(pause) => seconds(pause),
            };
            pause + (slo.ttft_ms + slo.tpot_ms * f64::from(turn.arrival.output_tokens - 1)) / 1e3
        };
        let all: f64 = self.chains.iter().flatten().map(turn).sum();
        nanos(all / self.chains.len().max(1) as f64)
    }

    /// The blocks that several sessions have, some of them more than once.
    pub fn common(&self) -> impl Iterator<Item = u64> {
        self.chains.iter().flatten().flat_map(|turn| &turn.arrival.blocks[..turn.common]).copied()
    }

    fn opens_at(chain: &[Turn]) -> Nanos {
        match chain[0].arrival.when {
            When::At(at) | When::After(at) => at,
        }
    }

    /// So many copies (at least one), spread evenly over the time in which the recording's sessions begin. What several sessions have in
    /// common, those of other copies have too; contents of different copies have nothing else in common.
    pub fn replay(self: &Arc<Self>, copies: u32) -> Replay {
        Replay { last_lap: 0, ..self.laps(copies, 0) }
    }

    /// The same lap after lap, without end, each with contents of its own as copies have. It begins in the midst of a lap, so that another one begins
    /// after the time `before`.
    pub fn laps(self: &Arc<Self>, copies: u32, before: Nanos) -> Replay {
        let copies = copies.max(1);
        let span = self.span();
        let mut order: Vec<Opening> = Vec::with_capacity(self.chains.len() * copies as usize);
        for copy in 0..copies {
            let shift = (u128::from(span) * u128::from(copy) / u128::from(copies)) as Nanos;
            let opening = |(at, chain): (usize, &Vec<Turn>)| {
                // What comes behind the end goes on at the beginning: the rate is the same all along.
                let opens_at = Self::opens_at(chain) + shift;
                let opens_at = if opens_at > span { opens_at - span } else { opens_at };
                (opens_at, copy, at as u32)
            };
            order.extend(self.chains.iter().enumerate().map(opening));
        }
        order.sort_unstable();
        let left_out = (span - before % span.max(1)) % span.max(1);
        Replay {
            recording: Arc::clone(self),
            copies,
            next: order.partition_point(|(at, ..)| *at < left_out),
            order,
            lap: 0,
            last_lap: u32::MAX,
            span,
            left_out,
            live: HashMap::new(),
        }
    }
}

/// A recording as a source.
#[derive(Debug)]
pub struct Replay {
    recording: Arc<Recording>,
    copies: u32,
    /// Of one lap.
    order: Vec<Opening>,
    /// The place there of the session that begins next.
    next: usize,
    lap: u32,
    last_lap: u32,
    span: Nanos,
    /// How much of the first lap is left out.
    left_out: Nanos,
    /// The turn that comes next in sessions that are open.
    live: HashMap<u64, u32>,
}

impl Replay {
    fn arrival(&self, session: u64, turn: u32) -> Option<Arrival> {
        let (copy, chain) = ((session >> 32) as u32, session as u32);
        let Turn { arrival, common } = self.recording.chains[chain as usize].get(turn as usize)?;
        let mut arrival = arrival.clone();
        arrival.session = arrival.session.map(|_| session);
        if copy > 0 {
            let salt = mix(u64::from(copy));
            let own = |(at, id): (usize, &u64)| if at < *common { *id } else { mix(id ^ salt).max(1) };
            arrival.blocks = arrival.blocks.iter().enumerate().map(own).collect();
        }
        Some(arrival)
    }
}

impl Source for Replay {
    fn open(&mut self) -> Option<Arrival> {
        if self.next == self.order.len() {
            if self.lap == self.last_lap || self.order.is_empty() {
                return None;
            }
            (self.next, self.lap) = (0, self.lap + 1);
        }
        let (at, copy, chain) = self.order[self.next];
        self.next += 1;
        let copy = self.lap.wrapping_mul(self.copies).wrapping_add(copy);
        let session = u64::from(copy) << 32 | u64::from(chain);
        let mut arrival = self.arrival(session, 0)?;
        arrival.when = When::At(u64::from(self.lap) * self.span + at - self.left_out);
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
    #[test]
    fn copies_share_what_sessions_share() {
        let shape = Shape { prefixes: 2, ..Shape::agent() };
        let recording =
            Arc::new(Recording::read(&mut First::new(Generator::new(vec![shape], 1.0, 16, 3), 300), 300));
        assert!(recording.is_closed_loop());
        let ids = |copies| -> std::collections::HashSet<u64> {
            all(&mut recording.replay(copies)).iter().flat_map(|arrival| arrival.blocks.to_vec()).collect()
        };
        let common: std::collections::HashSet<u64> = recording.common().collect();
        let (once, thrice) = (ids(1), ids(3));
        assert!(common.len() > 100 && common.len() < once.len() / 2);
        assert_eq!(thrice.len(), 3 * (once.len() - common.len()) + common.len());
    }

    #[test]
    fn laps_follow_each_other_at_the_same_rate() {
        let source = || First::new(Generator::new(vec![Shape::chat()], 1.0, 64, 3), 200);
        let recording = Arc::new(Recording::read(&mut source(), u64::MAX));
        let span = recording.span();
        let first_of = |copies, before| {
            let mut laps = recording.laps(copies, before);
            let mut opens = Vec::new();
            while opens.len() < 1000 {
                opens.extend(
                    laps.open().map(|arrival| (arrival.when, arrival.session, arrival.prompt_tokens)),
                );
            }
            opens
        };
        let at = |when: When| match when {
            When::At(at) | When::After(at) => at,
        };
        let whole = first_of(2, 0);
        assert!(whole.iter().map(|opening| at(opening.0)).is_sorted());
        let sessions: std::collections::HashSet<Option<u64>> =
            whole.iter().map(|opening| opening.1).collect();
        assert_eq!(sessions.len(), 1000);
        for before in [span / 3, 2 * span + 7] {
            let later = first_of(2, before);
            // A lap begins after that time, in the order of the first.
            let from = later.iter().position(|opening| at(opening.0) > before).expect("it goes on");
            for (here, there) in later[from..].iter().zip(whole.iter().filter(|opening| at(opening.0) > 0)) {
                assert_eq!((at(here.0) - before, here.2), (at(there.0), there.2));
            }
        }
    }
}
