//! How long an engine's steps take.
//!
//! *Prefill* of `n` tokens after `p` cached ones takes `a + b·n + c·(n·p + n²/2)`, a *decode step* of `B` sequences with `Σctx` tokens of context
//! `d + e·B + f·Σctx`. The constants of [`TABLE`] are fits to the output of AIConfigurator 0.12 (PyPI, Apache-2.0) for vLLM 0.24's kernel tables:
//! modelled figures, fitted for `n` of 256 to 131K, `B` of 1 to 256, contexts of 512 to 32K; mean errors 1 to 6 %, worst point 17 %.
//!
//! # A step that mixes both
//! takes `max(a + b·n, d) + c·Σ(n·p + n²/2) + e·B + f·Σctx`, with `n` summed over the prompts in it. `a + b·n` and `d` both contain
//! one pass over the weights and one round of kernel launches, which a mixed step makes once: its matrix products take all tokens of the step
//! together, and cost what the longer of the two does. So the base is counted once, and the rest (attention of the chunks, and of the sequences
//! that decode, and what each of those adds) in full. Without decoding sequences it is the prefill formula in all of its fitted range, where
//! `a + b·n > d`; below it, no step is shorter than reading the weights takes.

use serde::{Deserialize, Serialize};

/// The constants, in milliseconds, and the size of KV.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Speed {
    /// Any prefill.
    pub a: f64,
    /// One new token.
    pub b: f64,
    /// One new token looking at another.
    pub c: f64,
    /// Any decode step.
    pub d: f64,
    /// One sequence of a decode step.
    pub e: f64,
    /// One token of context of a decode step.
    pub f: f64,
    /// KV of a token over all layers and ranks, KiB.
    pub kv_kib: f64,
}

/// What a step computes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Step {
    /// New tokens of prompts, over all prompts in the step.
    pub new: u64,
    /// `n·p + n²/2`, summed over those prompts.
    pub pairs: f64,
    /// Sequences that decode.
    pub sequences: u64,
    /// Their tokens of context, summed.
    pub context: u64,
}

impl Speed {
    /// Seconds that a prefill takes that nothing else runs beside.
    pub fn prefill_seconds(&self, new: u64, cached: u64) -> f64 {
        (self.a + self.b * new as f64 + self.c * pairs(new, cached)) / 1e3
    }

    /// Seconds of a decode step.
    pub fn decode_seconds(&self, sequences: u64, context: u64) -> f64 {
        (self.d + self.e * sequences as f64 + self.f * context as f64) / 1e3
    }

    /// Seconds of any step; see the module's text.
    pub fn step_seconds(&self, step: &Step) -> f64 {
        let base = if step.new == 0 { self.d } else { (self.a + self.b * step.new as f64).max(self.d) };
        let decode = self.e * step.sequences as f64 + self.f * step.context as f64;
        (base + self.c * step.pairs + decode) / 1e3
    }

    /// Bytes of KV of so many tokens.
    pub fn kv_bytes(&self, tokens: u64) -> f64 {
        self.kv_kib * 1024.0 * tokens as f64
    }
}

/// How often a new token looks at another, `new` tokens after `cached` ones.
pub fn pairs(new: u64, cached: u64) -> f64 {
    let (new, cached) = (new as f64, cached as f64);
    new * (cached + new / 2.0)
}

/// Model, GPU, constants.
pub const TABLE: [(&str, &str, Speed); 9] = [
    row("8B", "H100", [3.26, 0.01899, 8.17e-7, 6.42, 0.0103, 4.19e-5, 128.0]),
    row("8B", "A100", [8.13, 0.05447, 2.98e-6, 11.54, 0.0253, 8.65e-5, 128.0]),
    row("8B", "H200", [1.94, 0.01960, 8.22e-7, 4.96, 0.0112, 2.95e-5, 128.0]),
    row("8B", "L40S", [11.41, 0.06222, 3.07e-6, 22.23, 0.0302, 1.95e-4, 128.0]),
    row("70B", "H100x4", [7.56, 0.05989, 1.01e-6, 15.22, 0.0317, 2.65e-5, 320.0]),
    row("70B", "H100x8", [6.50, 0.03857, 4.82e-7, 9.98, 0.0236, 1.33e-5, 320.0]),
    row("70B", "A100x4", [17.45, 0.15413, 3.59e-6, 27.75, 0.0995, 5.63e-5, 320.0]),
    row("70B", "A100x8", [12.50, 0.10084, 1.68e-6, 17.43, 0.0687, 2.63e-5, 320.0]),
    row("Qwen3-32B", "H100x2", [8.14, 0.04772, 1.64e-6, 13.61, 0.0260, 4.23e-5, 256.0]),
];

const fn row(
    model: &'static str,
    gpu: &'static str,
    [a, b, c, d, e, f, kv_kib]: [f64; 7],
) -> (&'static str, &'static str, Speed) {
    (model, gpu, Speed { a, b, c, d, e, f, kv_kib })
}

/// The constants of a model on a GPU.
pub fn known(model: &str, gpu: &str) -> Option<Speed> {
    TABLE.iter().find(|row| (row.0, row.1) == (model, gpu)).map(|row| row.2)
}
