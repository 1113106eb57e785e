//! What an engine was seen to do per second.
//!
//! Two numbers for prefill: seconds that any request costs, and uncached tokens per second on top. Only requests that met
//! an empty queue teach: with a queue before them, the time is not theirs.

use crate::ewma::Ewma;

/// Assumed of an engine that was never seen to prefill.
pub const PRIOR_PREFILL_TOKENS_PER_SECOND: f64 = 10_000.0;
/// Assumed seconds of any request besides its prompt: HTTP, the engine's own tokenising, one scheduler step.
pub const PRIOR_REQUEST_SECONDS: f64 = 0.01;
/// Assumed seconds of one decode step.
pub const PRIOR_DECODE_STEP_SECONDS: f64 = 0.01;
/// Assumed seconds that each further sequence adds to a decode step.
pub const DECODE_STEP_SECONDS_PER_SEQUENCE: f64 = 2e-5;

/// With at least this many uncached tokens a request teaches tokens per second.
const LARGE: u64 = 256;
/// With at most this many it teaches the fixed part.
const SMALL: u64 = 64;

/// An engine's speed, as one decision uses it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Uncached prompt tokens per second.
    pub prefill_tokens_per_second: f64,
    /// Seconds of any request besides its prompt.
    pub request_seconds: f64,
    /// Seconds of one decode step with one sequence.
    pub decode_step_seconds: f64,
}

impl Default for Speed {
    fn default() -> Self {
        SpeedEstimate::default().speed()
    }
}

impl Speed {
    /// Predicted seconds to compute this many uncached tokens, without the fixed part.
    pub fn prefill_seconds(&self, tokens: u64) -> f64 {
        tokens as f64 / self.prefill_tokens_per_second
    }
}

/// Learns an engine's speed.
#[derive(Clone, Copy, Debug, Default)]
pub struct SpeedEstimate {
    prefill_tokens_per_second: Ewma,
    request_seconds: Ewma,
    decode_step_seconds: Ewma,
}

impl SpeedEstimate {
    /// A request that met an empty queue had its first token after `seconds`, with this many uncached tokens.
    pub fn observe_first_token(&mut self, uncached_tokens: u64, seconds: f64) {
        let speed = self.speed();
        if uncached_tokens >= LARGE {
            // The fixed part may be overestimated: never take more than half off.
            let computing = (seconds - speed.request_seconds).max(seconds / 2.0);
            self.prefill_tokens_per_second.observe(uncached_tokens as f64 / computing);
        } else if uncached_tokens <= SMALL {
            let fixed = (seconds - speed.prefill_seconds(uncached_tokens)).max(seconds / 2.0);
            self.request_seconds.observe(fixed);
        }
    }

    /// A stream of `tokens` after the first took `seconds`.
    pub fn observe_decode(&mut self, tokens: u64, seconds: f64) {
        if tokens >= 4 {
            self.decode_step_seconds.observe(seconds / tokens as f64);
        }
    }

    /// The estimates, or the stated priors.
    pub fn speed(&self) -> Speed {
        Speed {
            prefill_tokens_per_second: self
                .prefill_tokens_per_second
                .mean()
                .unwrap_or(PRIOR_PREFILL_TOKENS_PER_SECOND),
            request_seconds: self.request_seconds.mean().unwrap_or(PRIOR_REQUEST_SECONDS),
            decode_step_seconds: self.decode_step_seconds.mean().unwrap_or(PRIOR_DECODE_STEP_SECONDS),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_learns_both_parts_of_prefill() {
        let mut estimate = SpeedEstimate::default();
        for _ in 0..50 {
            estimate.observe_first_token(10, 0.02 + 10.0 / 400.0);
            estimate.observe_first_token(3000, 0.02 + 3000.0 / 400.0);
        }
        let speed = estimate.speed();
        assert!((speed.prefill_tokens_per_second - 400.0).abs() < 4.0, "{speed:?}");
        assert!((speed.request_seconds - 0.02).abs() < 0.005, "{speed:?}");
    }

    #[test]
    fn the_first_sample_replaces_the_prior() {
        let mut estimate = SpeedEstimate::default();
        estimate.observe_first_token(1000, 10.01);
        assert!((estimate.speed().prefill_tokens_per_second - 100.0).abs() < 0.1);
    }
}
