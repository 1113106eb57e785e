//! Seeded workloads.

use std::collections::HashMap;

use super::{Arrival, Context, Rows, Source, When};
use crate::rng::Rng;
use crate::{Nanos, mix, nanos};

/// A random number of tokens: log-normal, within bounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Length {
    /// Its mean, before the bounds.
    pub mean: f64,
    /// Standard deviation of its logarithm; 0 gives the mean each time.
    pub sigma: f64,
    /// At least.
    pub least: u32,
    /// At most.
    pub most: u32,
}

impl Length {
    /// Always so many.
    pub const fn fixed(tokens: u32) -> Self {
        Self { mean: tokens as f64, sigma: 0.0, least: tokens, most: tokens }
    }

    fn draw(&self, rng: &mut Rng) -> u32 {
        (rng.log_normal(self.mean, self.sigma).round() as u32).clamp(self.least, self.most.max(self.least))
    }
}

/// A kind of session.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// How often it comes, relative to the others of a mix.
    pub weight: f64,
    /// Texts that sessions begin with (system prompts, tool descriptions, documents): one of so many is drawn for each. 0: every session
    /// has one of its own.
    pub prefixes: u64,
    /// How much more often the first of them is drawn than the last: text `i` has the weight `(i+1)^-skew`.
    pub skew: f64,
    /// Their length, drawn once for each text.
    pub prefix: Length,
    /// What the first turn adds to it.
    pub first: Length,
    /// What a later turn adds: a question, or a tool's answer.
    pub later: Length,
    /// Output of a turn.
    pub output: Length,
    /// Turns of a session, at least and at most, all equally likely.
    pub turns: (u32, u32),
    /// Mean pause before a later turn, exponentially distributed, seconds.
    pub pause_seconds: f64,
    /// A session ends before a turn whose prompt and output would be longer than this.
    pub most_context: u32,
}

impl Shape {
    /// Chat: short questions behind one of 8 system prompts, up to 8 turns, half a minute to read and type.
    pub fn chat() -> Self {
        Self {
            weight: 1.0,
            prefixes: 8,
            skew: 1.0,
            prefix: Length { mean: 600.0, sigma: 0.4, least: 100, most: 2000 },
            first: Length { mean: 250.0, sigma: 1.0, least: 5, most: 8000 },
            later: Length { mean: 120.0, sigma: 1.0, least: 5, most: 4000 },
            output: Length { mean: 300.0, sigma: 0.8, least: 5, most: 2000 },
            turns: (1, 8),
            pause_seconds: 30.0,
            most_context: 32_000,
        }
    }

    /// Agent loops: 10 to 30 calls on a growing context, a tool's pause of 3 s between them.
    pub fn agent() -> Self {
        Self {
            weight: 1.0,
            prefixes: 4,
            skew: 0.5,
            prefix: Length { mean: 3500.0, sigma: 0.4, least: 1000, most: 10_000 },
            first: Length { mean: 1500.0, sigma: 0.7, least: 100, most: 10_000 },
            later: Length { mean: 900.0, sigma: 1.1, least: 20, most: 16_000 },
            output: Length { mean: 180.0, sigma: 0.7, least: 10, most: 2000 },
            turns: (10, 30),
            pause_seconds: 3.0,
            most_context: 120_000,
        }
    }

    /// Long documents: 1 to 4 questions on one of 200 documents of 10K to 100K tokens, some of which are asked about often.
    pub fn documents() -> Self {
        Self {
            weight: 1.0,
            prefixes: 200,
            skew: 0.8,
            prefix: Length { mean: 35_000.0, sigma: 0.6, least: 10_000, most: 100_000 },
            first: Length { mean: 80.0, sigma: 0.6, least: 10, most: 1000 },
            later: Length { mean: 60.0, sigma: 0.6, least: 10, most: 1000 },
            output: Length { mean: 350.0, sigma: 0.6, least: 20, most: 2000 },
            turns: (1, 4),
            pause_seconds: 25.0,
            most_context: 120_000,
        }
    }

    /// The three, in the shares of 6 : 3 : 1.
    pub fn mix() -> Vec<Self> {
        let weighted = |weight, shape: Self| Self { weight, ..shape };
        vec![weighted(6.0, Self::chat()), weighted(3.0, Self::agent()), weighted(1.0, Self::documents())]
    }

    /// One request without company: so many tokens in and out, nothing in common with others.
    pub fn single(input: Length, output: Length) -> Self {
        Self {
            weight: 1.0,
            prefixes: 0,
            skew: 0.0,
            prefix: Length::fixed(0),
            first: input,
            later: Length::fixed(1),
            output,
            turns: (1, 1),
            pause_seconds: 0.0,
            most_context: u32::MAX,
        }
    }
}

#[derive(Debug)]
struct Live {
    shape: usize,
    rng: Rng,
    context: Context,
    turn: u32,
    turns: u32,
}

/// Endless sessions that begin at random (a Poisson process); cut them with [`super::First`]. Each session draws from
/// a sequence of its own, so what it asks does not depend on when others are served.
#[derive(Debug)]
pub struct Generator {
    shapes: Vec<Shape>,
    /// For each shape, the sums of its texts' weights.
    texts: Vec<Vec<f64>>,
    block_tokens: u32,
    mean_gap: f64,
    seed: u64,
    arrivals: Rng,
    now: f64,
    sessions: u64,
    live: HashMap<u64, Live>,
    rows: Rows,
}

impl Generator {
    /// A mix of shapes for engines with blocks of so many tokens.
    ///
    /// # Panics
    /// Without shapes, or where the rate is not positive.
    pub fn new(shapes: Vec<Shape>, sessions_per_second: f64, block_tokens: u32, seed: u64) -> Self {
        assert!(!shapes.is_empty(), "a generator needs a shape");
        assert!(sessions_per_second > 0.0, "a generator needs a positive rate");
        let sums = |shape: &Shape| {
            let weight = |at: u64| ((at + 1) as f64).powf(-shape.skew);
            let sum = |sum: &mut f64, at: u64| {
                *sum += weight(at);
                Some(*sum)
            };
            (0..shape.prefixes).scan(0.0, sum).collect()
        };
        Self {
            texts: shapes.iter().map(sums).collect(),
            shapes,
            block_tokens,
            mean_gap: 1.0 / sessions_per_second,
            seed,
            arrivals: Rng::new(seed),
            now: 0.0,
            sessions: 0,
            live: HashMap::new(),
            rows: Rows::default(),
        }
    }

    /// The next turn, unless the session ends before it.
    fn advance(&mut self, session: u64, mut live: Live, opens_at: Option<Nanos>) -> Option<Arrival> {
        let shape = &self.shapes[live.shape];
        let new = if live.turn == 0 { &shape.first } else { &shape.later }.draw(&mut live.rng).max(1);
        let output_tokens = shape.output.draw(&mut live.rng).max(1);
        let pause = nanos(live.rng.exponential(shape.pause_seconds));
        let before = live.context.tokens();
        if live.turn > 0 && before + u64::from(new) + u64::from(output_tokens) > u64::from(shape.most_context)
        {
            return None;
        }
        let name = mix(mix(self.seed ^ mix(session + 1)) ^ u64::from(live.turn));
        live.context.append(name, new);
        let prompt_tokens = live.context.tokens() as u32;
        live.context.append(!name, output_tokens);
        let arrival = Arrival {
            when: opens_at.map_or(When::After(pause), When::At),
            session: Some(session),
            turn: live.turn,
            prompt_tokens,
            new_tokens: if live.turn == 0 { prompt_tokens } else { new },
            output_tokens,
            blocks: live.context.ids().into(),
        };
        live.turn += 1;
        if live.turn < live.turns {
            self.live.insert(session, live);
        }
        self.rows.good += 1;
        Some(arrival)
    }
}

/// Where a random number between 0 and the last of these sums falls.
fn pick(sums: &[f64], rng: &mut Rng) -> usize {
    let point = rng.unit() * sums.last().copied().unwrap_or(0.0);
    sums.partition_point(|sum| *sum <= point).min(sums.len() - 1)
}

impl Source for Generator {
    fn open(&mut self) -> Option<Arrival> {
        self.now += self.arrivals.exponential(self.mean_gap);
        let session = self.sessions;
        self.sessions += 1;
        let mut rng = Rng::new(self.seed).fork(session + 1);
        let weights: Vec<f64> = self
            .shapes
            .iter()
            .scan(0.0, |sum, shape| {
                *sum += shape.weight;
                Some(*sum)
            })
            .collect();
        let at = pick(&weights, &mut rng);
        let shape = &self.shapes[at];
        let text = match shape.prefixes {
            0 => mix(!self.seed ^ mix(session + 1)),
            _ => mix(mix(self.seed ^ at as u64) ^ (pick(&self.texts[at], &mut rng) as u64 + 1)),
        };
        let mut context = Context::new(self.block_tokens);
        context.append(text, shape.prefix.draw(&mut Rng::new(text)));
        let turns = rng.between(u64::from(shape.turns.0.max(1)), u64::from(shape.turns.1)) as u32;
        let opens_at = nanos(self.now);
        self.advance(session, Live { shape: at, rng, context, turn: 0, turns }, Some(opens_at))
    }

    fn follow(&mut self, session: u64) -> Option<Arrival> {
        let live = self.live.remove(&session)?;
        self.advance(session, live, None)
    }

    fn rows(&self) -> &Rows {
        &self.rows
    }
}
