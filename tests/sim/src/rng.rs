//! Seeded random numbers whose sequence is a part of this crate, so that results stay equal when a dependency changes.

use crate::mix;

/// SplitMix64 (Steele, Lea and Flood, 2014). Not for secrets.
#[derive(Clone, Debug)]
pub struct Rng {
    state: u64,
}

impl Rng {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Self { state: mix(seed ^ 0x5851_f42d_4c95_7f2d) }
    }

    /// A sequence of its own for a part of the run, so that parts do not disturb each other.
    pub fn fork(&self, part: u64) -> Self {
        Self { state: mix(self.state ^ mix(part.wrapping_add(1))) }
    }

    /// Any 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// At least 0 and below 1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// At least 0 and below `n`; 0 for `n` 0.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u64
    }

    /// At least `low` and at most `high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low).saturating_add(1))
    }

    /// Exponentially distributed with this mean.
    pub fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }

    /// Log-normally distributed with this mean; `sigma` is the standard deviation of its logarithm.
    pub fn log_normal(&mut self, mean: f64, sigma: f64) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        let normal = radius * (std::f64::consts::TAU * self.unit()).cos();
        mean * (sigma * normal - sigma * sigma / 2.0).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distributions_have_their_means() {
        let mut rng = Rng::new(1);
        let n = 200_000;
        let mean = |draw: &mut dyn FnMut() -> f64| (0..n).map(|_| draw()).sum::<f64>() / f64::from(n);
        assert!((mean(&mut || rng.exponential(3.0)) / 3.0 - 1.0).abs() < 0.02);
        assert!((mean(&mut || rng.log_normal(500.0, 0.8)) / 500.0 - 1.0).abs() < 0.02);
        assert!((mean(&mut || rng.between(10, 30) as f64) / 20.0 - 1.0).abs() < 0.02);
    }

    #[test]
    fn forks_differ_and_repeat() {
        let rng = Rng::new(7);
        assert_ne!(rng.fork(0).bits(), rng.fork(1).bits());
        assert_eq!(rng.fork(5).bits(), Rng::new(7).fork(5).bits());
    }
}
