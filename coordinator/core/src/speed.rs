//! What an engine was seen to do per second.
//!
//! # Formulas
//! *Prefill* of `n` tokens after `p` cached ones takes `a + b·n + c·(n·p + n²/2)` seconds: a fixed part, the matrix products of
//! each token, and attention, where token `i` of the new ones looks at `p + i` others (the sum over `i` is `n·p + n²/2`).
//! One *decode step* of `B` sequences with `Σctx` tokens of context takes `d + e·B + f·Σctx`: reading the weights, the
//! products of each sequence, and reading the KV of all of them. Both forms fit the kernel tables of AIConfigurator 0.12 (PyPI,
//! Apache-2.0) for vLLM on nine pairs of model and GPU within 6.4 % and 3.6 % on average (worst point 17 %); the priors here
//! are those of an 8B model on an A100. They give the shape only: the first samples set the level.

use serde::{Deserialize, Serialize};

use crate::regression::Regression;

/// Assumed of an engine that was never measured; see the module's text.
pub const PRIOR: Speed = Speed {
    request_seconds: 8.1e-3,
    token_seconds: 5.4e-5,
    attention_seconds: 3.0e-9,
    step_seconds: 1.15e-2,
    sequence_seconds: 2.5e-5,
    context_seconds: 8.7e-8,
};

/// Most tokens of a prompt that an engine computes in one step: vLLM's default for `max_num_batched_tokens` of its
/// server on GPUs below 70 GB, and the stricter of its defaults here.
pub const CHUNK_TOKENS: u64 = 2048;

/// A stream of fewer tokens after its first says little about a decode step.
const LEAST_DECODE_TOKENS: u64 = 4;

/// Weight of an answer's length in the mean of all, once there are many.
const ANSWER_WEIGHT: f64 = 1.0 / 64.0;
/// The same, of a prompt's tokens.
const PROMPT_WEIGHT: f64 = 1.0 / 256.0;

/// An engine's speed, as one decision uses it: the coefficients of the module's formulas, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Speed {
    /// `a`: any request, besides its prompt.
    pub request_seconds: f64,
    /// `b`: one uncached token.
    pub token_seconds: f64,
    /// `c`: one token looking at another.
    pub attention_seconds: f64,
    /// `d`: any decode step.
    pub step_seconds: f64,
    /// `e`: one sequence in a decode step.
    pub sequence_seconds: f64,
    /// `f`: one token of context in a decode step.
    pub context_seconds: f64,
}

impl Default for Speed {
    fn default() -> Self {
        PRIOR
    }
}

impl Speed {
    /// Predicted seconds to compute `new` tokens after `cached` ones, the fixed part included.
    #[inline]
    pub fn prefill_seconds(&self, new: u64, cached: u64) -> f64 {
        let [one, tokens, pairs] = prefill_features(new, cached);
        self.request_seconds * one + self.token_seconds * tokens + self.attention_seconds * pairs
    }

    /// Predicted seconds of one decode step of so many sequences with so many tokens of context, summed over them.
    #[inline]
    pub fn decode_step_seconds(&self, sequences: f64, context_tokens: f64) -> f64 {
        self.step_seconds + self.mixed_seconds(sequences, context_tokens)
    }

    /// Predicted seconds that so many sequences with so many tokens of context add to a step that computes a part of a prompt. Both go
    /// over the weights together, so `d` is no part of it.
    #[inline]
    pub fn mixed_seconds(&self, sequences: f64, context_tokens: f64) -> f64 {
        self.sequence_seconds * sequences + self.context_seconds * context_tokens
    }
}

#[inline]
fn prefill_features(new: u64, cached: u64) -> [f64; 3] {
    let (new, cached) = (new as f64, cached as f64);
    [1.0, new, new * (cached + new / 2.0)]
}

/// A prefill that met no other prompt on its engine, as it went.
#[derive(Clone, Copy, Debug)]
pub struct PrefillSample {
    /// Tokens that were computed.
    pub new: u64,
    /// Tokens that were cached.
    pub cached: u64,
    /// From dispatch to first token.
    pub seconds: f64,
    /// Sequences that decoded beside it, on average.
    pub sequences: f64,
    /// Their tokens of context, summed.
    pub context_tokens: f64,
}

/// A stream, from its first token to its last.
#[derive(Clone, Copy, Debug)]
pub struct DecodeSample {
    /// Tokens after the first.
    pub tokens: u64,
    /// What they took.
    pub seconds: f64,
    /// Of these, what prefills on the engine took meanwhile ([`crate::load::EngineLoad::prefilled_seconds`]).
    pub stalled_seconds: f64,
    /// Sequences in a step, this one included, on average.
    pub sequences: f64,
    /// Their tokens of context, summed, on average.
    pub context_tokens: f64,
}

/// Learns an engine's speed, how long its answers are, and how much of its prompts is cached.
#[derive(Clone, Debug)]
pub struct SpeedEstimate {
    prefill: Regression,
    decode: Regression,
    /// Tokens on average, and how many answers.
    answers: (f64, u32),
    /// Tokens found cached, and all; older ones weigh less.
    prompts: (f64, f64),
}

impl Default for SpeedEstimate {
    fn default() -> Self {
        Self {
            prefill: Regression::new([PRIOR.request_seconds, PRIOR.token_seconds, PRIOR.attention_seconds]),
            decode: Regression::new([PRIOR.step_seconds, PRIOR.sequence_seconds, PRIOR.context_seconds]),
            answers: (0.0, 0),
            prompts: (0.0, 0.0),
        }
    }
}

impl SpeedEstimate {
    /// Learns from a prefill.
    pub fn observe_prefill(&mut self, sample: &PrefillSample) {
        let steps = sample.new.div_ceil(CHUNK_TOKENS) as f64;
        let beside = steps * self.speed().mixed_seconds(sample.sequences, sample.context_tokens);
        // The other part may be overestimated: never take more than half off.
        let seconds = (sample.seconds - beside).max(sample.seconds / 2.0);
        self.prefill.observe(prefill_features(sample.new, sample.cached), seconds);
    }

    /// Learns from a stream. One of fewer than four tokens says nothing about speed.
    pub fn observe_decode(&mut self, sample: &DecodeSample) {
        let (mean, seen) = &mut self.answers;
        // The first ones weigh as in a plain mean.
        let weight = ANSWER_WEIGHT.max(1.0 / (f64::from(*seen) + 1.0));
        *mean += weight * ((sample.tokens + 1) as f64 - *mean);
        *seen = seen.saturating_add(1);
        if sample.tokens < LEAST_DECODE_TOKENS {
            return;
        }
        let seconds = (sample.seconds - sample.stalled_seconds.max(0.0)).max(sample.seconds / 2.0);
        let features = [1.0, sample.sequences.max(1.0), sample.context_tokens.max(0.0)];
        self.decode.observe(features, seconds / sample.tokens as f64);
    }

    /// Learns from a prompt that is sent to the engine: so many tokens, of which so many are cached there, or pulled.
    pub fn observe_prompt(&mut self, tokens: u64, cached: u64) {
        let (found, all) = &mut self.prompts;
        *found += cached.min(tokens) as f64 - PROMPT_WEIGHT * *found;
        *all += tokens as f64 - PROMPT_WEIGHT * *all;
    }

    /// The share of prompts' tokens that are cached, 0 to 1; `None` before the first.
    pub fn reused(&self) -> Option<f64> {
        (self.prompts.1 > 0.0).then(|| self.prompts.0 / self.prompts.1)
    }

    /// Tokens of an answer, on average; `None` before the first.
    pub fn answer_tokens(&self) -> Option<f64> {
        (self.answers.1 > 0).then_some(self.answers.0)
    }

    /// Whether a prefill was measured: until then what is predicted of one has a shape, and no level.
    pub fn knows_prefill(&self) -> bool {
        self.prefill.has_samples()
    }

    /// The estimates; what was never measured has the prior's shape.
    pub fn speed(&self) -> Speed {
        let [request_seconds, token_seconds, attention_seconds] = self.prefill.coefficients();
        let [step_seconds, sequence_seconds, context_seconds] = self.decode.coefficients();
        Speed {
            request_seconds,
            token_seconds,
            attention_seconds,
            step_seconds,
            sequence_seconds,
            context_seconds,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Rows of the fit that [`PRIOR`]'s module text names, in milliseconds: 8B on H100, A100, H200, L40S; 70B on
    /// four H100; a 32B model on two.
    const FITTED: [[f64; 6]; 6] = [
        [3.26, 0.01899, 8.17e-7, 6.42, 0.0103, 4.19e-5],
        [8.13, 0.05447, 2.98e-6, 11.54, 0.0253, 8.65e-5],
        [1.94, 0.01960, 8.22e-7, 4.96, 0.0112, 2.95e-5],
        [11.41, 0.06222, 3.07e-6, 22.23, 0.0302, 1.95e-4],
        [7.56, 0.05989, 1.01e-6, 15.22, 0.0317, 2.65e-5],
        [8.14, 0.04772, 1.64e-6, 13.61, 0.0260, 4.23e-5],
    ];

    fn speed(row: [f64; 6]) -> Speed {
        let [a, b, c, d, e, f] = row.map(|ms| ms / 1e3);
        Speed {
            request_seconds: a,
            token_seconds: b,
            attention_seconds: c,
            step_seconds: d,
            sequence_seconds: e,
            context_seconds: f,
        }
    }

    /// Draws from a generator with its seed printed by proptest: uniform in 0..1.
    struct Draw(u64);

    impl Draw {
        fn unit(&mut self) -> f64 {
            self.0 = crate::mix(self.0.wrapping_add(0x9e37_79b9_7f4a_7c15));
            (self.0 >> 11) as f64 / (1u64 << 53) as f64
        }

        /// Log-uniform.
        fn between(&mut self, low: f64, high: f64) -> f64 {
            low * (high / low).powf(self.unit())
        }

        /// Within ten per cent, and one in fifty off by a factor of up to thirty.
        fn noise(&mut self) -> f64 {
            match self.unit() < 0.02 {
                true => self.between(1.0 / 30.0, 30.0),
                false => 0.9 + 0.2 * self.unit(),
            }
        }
    }

    fn feed(estimate: &mut SpeedEstimate, truth: &Speed, draw: &mut Draw, samples: usize) {
        for _ in 0..samples {
            let (new, cached) = (draw.between(16.0, 60_000.0) as u64, draw.between(1.0, 60_000.0) as u64);
            let seconds = truth.prefill_seconds(new, cached) * draw.noise();
            estimate.observe_prefill(&PrefillSample {
                new,
                cached,
                seconds,
                sequences: 0.0,
                context_tokens: 0.0,
            });
            let sequences = draw.between(1.0, 256.0).floor();
            let context_tokens = sequences * draw.between(512.0, 32_000.0);
            let seconds = 64.0 * truth.decode_step_seconds(sequences, context_tokens) * draw.noise();
            estimate.observe_decode(&DecodeSample {
                tokens: 64,
                seconds,
                stalled_seconds: 0.0,
                sequences,
                context_tokens,
            });
        }
    }

    /// The largest relative error of predictions over the range that matters.
    fn worst(estimate: &Speed, truth: &Speed) -> f64 {
        let off = |ours: f64, theirs: f64| (ours / theirs - 1.0).abs();
        let prefills = [(16, 0), (256, 0), (2048, 0), (2048, 30_000), (32_000, 0), (100_000, 0)];
        let steps = [(1.0, 1000.0), (16.0, 16e3), (64.0, 500e3), (256.0, 1e6), (8.0, 250e3)];
        let prefill = prefills.map(|(new, cached)| {
            off(estimate.prefill_seconds(new, cached), truth.prefill_seconds(new, cached))
        });
        let step = steps.map(|(sequences, context)| {
            off(
                estimate.decode_step_seconds(sequences, context),
                truth.decode_step_seconds(sequences, context),
            )
        });
        prefill.into_iter().chain(step).fold(0.0, f64::max)
    }

    /// Whether it predicts within 15 %, and the coefficients that the samples tell apart well are within 25 %.
    fn is_near(learned: &Speed, truth: &Speed) -> bool {
        let coefficients = [
            (learned.token_seconds, truth.token_seconds),
            (learned.attention_seconds, truth.attention_seconds),
            (learned.step_seconds, truth.step_seconds),
            (learned.context_seconds, truth.context_seconds),
        ];
        let off = coefficients.map(|(ours, theirs)| (ours / theirs - 1.0).abs());
        worst(learned, truth) < 0.15 && off.iter().all(|off| *off < 0.25)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn it_converges_on_fitted_engines_under_noise_and_tracks_a_change(
            from in 0..FITTED.len(), to in 0..FITTED.len(), seed: u64,
        ) {
            let mut draw = Draw(seed);
            let mut estimate = SpeedEstimate::default();
            for row in [FITTED[from], FITTED[to]] {
                let truth = speed(row);
                feed(&mut estimate, &truth, &mut draw, 500);
                // A run of noisy samples can pull it away for a while, and those behind it bring it back: so it is looked at more than once.
                let near = (0..8).any(|_| {
                    feed(&mut estimate, &truth, &mut draw, 100);
                    is_near(&estimate.speed(), &truth)
                });
                prop_assert!(near, "{:?} for {truth:?}", estimate.speed());
            }
        }

        #[test]
        fn nothing_makes_it_negative_or_nonsense(
            samples in prop::collection::vec(
                (any::<u64>(), any::<u64>(), any::<f64>(), any::<f64>(), any::<f64>()), 0..60),
        ) {
            let mut estimate = SpeedEstimate::default();
            for (new, cached, seconds, sequences, context_tokens) in samples {
                estimate.observe_prefill(&PrefillSample { new, cached, seconds, sequences, context_tokens });
                estimate.observe_decode(&DecodeSample {
                    tokens: new, seconds, stalled_seconds: context_tokens, sequences, context_tokens,
                });
                let s = estimate.speed();
                for coefficient in [
                    s.request_seconds, s.token_seconds, s.attention_seconds,
                    s.step_seconds, s.sequence_seconds, s.context_seconds,
                ] {
                    prop_assert!(coefficient.is_finite() && coefficient > 0.0, "{s:?}");
                }
            }
        }

        #[test]
        fn prompts_of_one_length_teach_that_length_and_leave_the_rest_plausible(
            row in 0..FITTED.len(), new in 64u64..20_000, seed: u64,
        ) {
            let truth = speed(FITTED[row]);
            let mut draw = Draw(seed);
            let mut estimate = SpeedEstimate::default();
            for _ in 0..2000 {
                let seconds = truth.prefill_seconds(new, 0) * draw.noise();
                estimate.observe_prefill(&PrefillSample {
                    new, cached: 0, seconds, sequences: 0.0, context_tokens: 0.0,
                });
            }
            let off = |tokens| {
                let ratio = estimate.speed().prefill_seconds(tokens, 0) / truth.prefill_seconds(tokens, 0);
                ratio.max(1.0 / ratio)
            };
            prop_assert!(off(new) < 1.15, "{} at {new}", off(new));
            prop_assert!(off(new * 4) < 3.0 && off(new / 4) < 3.0, "{} {}", off(new * 4), off(new / 4));
        }
    }

    #[test]
    fn answers_are_averaged_short_ones_too_and_a_lasting_change_is_followed() {
        let mut estimate = SpeedEstimate::default();
        let mut answer = |tokens, times| {
            let sample = DecodeSample {
                tokens,
                seconds: 1.0,
                stalled_seconds: 0.0,
                sequences: 1.0,
                context_tokens: 1.0,
            };
            (0..times).for_each(|_| estimate.observe_decode(&sample));
            estimate.answer_tokens()
        };
        assert_eq!(answer(0, 0), None);
        // One token, and the 99 after it.
        assert_eq!(answer(99, 1), Some(100.0));
        assert_eq!(answer(1, 1), Some(51.0));
        assert!((answer(999, 500).unwrap() - 1000.0).abs() < 1.0);
    }

    #[test]
    fn what_is_reused_is_a_share_of_tokens_and_the_latest_weigh_most() {
        let mut estimate = SpeedEstimate::default();
        assert_eq!(estimate.reused(), None);
        estimate.observe_prompt(900, 0);
        assert_eq!(estimate.reused(), Some(0.0));
        estimate.observe_prompt(100, 100);
        assert!((estimate.reused().unwrap() - 0.1).abs() < 1e-3);
        (0..2000).for_each(|_| estimate.observe_prompt(100, 75));
        assert!((estimate.reused().unwrap() - 0.75).abs() < 1e-3);
    }

    #[test]
    fn the_first_sample_sets_the_level() {
        let mut estimate = SpeedEstimate::default();
        let slow = PrefillSample { new: 1000, cached: 0, seconds: 10.0, sequences: 0.0, context_tokens: 0.0 };
        estimate.observe_prefill(&slow);
        assert!((estimate.speed().prefill_seconds(1000, 0) - 10.0).abs() < 0.1);
        assert!(estimate.speed().prefill_seconds(2000, 0) > 15.0);
    }

    #[test]
    fn what_decodes_beside_a_prefill_is_not_its_own() {
        let mut estimate = SpeedEstimate::default();
        let truth = PRIOR;
        for new in (0..400u64).map(|i| 100 + 50 * i) {
            let steps = new.div_ceil(CHUNK_TOKENS) as f64;
            let seconds = truth.prefill_seconds(new, 0) + steps * truth.mixed_seconds(8.0, 8000.0);
            let sample = PrefillSample { new, cached: 0, seconds, sequences: 8.0, context_tokens: 8000.0 };
            estimate.observe_prefill(&sample);
        }
        let ratio = estimate.speed().prefill_seconds(4000, 0) / truth.prefill_seconds(4000, 0);
        assert!((ratio - 1.0).abs() < 0.03, "{ratio}");
    }
}
