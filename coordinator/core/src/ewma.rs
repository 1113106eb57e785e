//! An exponentially weighted mean with guards, for measurements that may be off by a lot.

/// Weight of a new sample.
const WEIGHT: f64 = 0.2;
/// The same, of one that may be too low, below the mean and above it.
const LOW_WEIGHT: f64 = 0.05;
const HIGH_WEIGHT: f64 = 0.5;
/// One sample moves the mean by at most this factor, once enough samples back it.
const LARGEST_STEP: f64 = 4.0;
/// Samples after which a sample counts as an outlier at [`LARGEST_STEP`].
const SETTLED: u32 = 4;

/// The mean of positive samples.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Ewma {
    mean: f64,
    samples: u32,
}

impl Ewma {
    /// Takes a sample. One that is not a positive, finite number is dropped.
    pub(crate) fn observe(&mut self, sample: f64) {
        self.observe_weighted(sample, WEIGHT);
    }

    /// Takes a sample that others may have made lower than it would have been: one below the mean weighs less.
    pub(crate) fn observe_upper(&mut self, sample: f64) {
        self.observe_weighted(sample, if sample < self.mean { LOW_WEIGHT } else { HIGH_WEIGHT });
    }

    fn observe_weighted(&mut self, sample: f64, weight: f64) {
        if !(sample.is_finite() && sample > 0.0) {
            return;
        }
        let sample = match self.samples {
            0 => sample,
            n if n < SETTLED => sample,
            _ => sample.clamp(self.mean / LARGEST_STEP, self.mean * LARGEST_STEP),
        };
        // The first samples weigh as in a plain mean, so that no prior lingers.
        let weight = weight.max(1.0 / (f64::from(self.samples) + 1.0));
        self.mean += weight * (sample - self.mean);
        self.samples = self.samples.saturating_add(1);
    }

    /// The mean, or `None` before the first sample.
    pub(crate) fn mean(&self) -> Option<f64> {
        (self.samples > 0).then_some(self.mean)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_samples_are_averaged_and_nonsense_is_dropped() {
        let mut ewma = Ewma::default();
        assert_eq!(ewma.mean(), None);
        for sample in [f64::NAN, 0.0, -1.0, f64::INFINITY] {
            ewma.observe(sample);
        }
        assert_eq!(ewma.mean(), None);
        ewma.observe(10.0);
        ewma.observe(20.0);
        assert_eq!(ewma.mean(), Some(15.0));
    }

    #[test]
    fn one_wild_sample_moves_a_settled_mean_by_a_bounded_step() {
        let mut ewma = Ewma::default();
        for _ in 0..10 {
            ewma.observe(100.0);
        }
        ewma.observe(1e9);
        assert!(ewma.mean().unwrap() <= 100.0 + WEIGHT * 300.0 + 1e-9);
    }

    #[test]
    fn it_follows_a_lasting_change() {
        let mut ewma = Ewma::default();
        for _ in 0..10 {
            ewma.observe(100.0);
        }
        for _ in 0..40 {
            ewma.observe(10_000.0);
        }
        assert!((ewma.mean().unwrap() - 10_000.0).abs() < 100.0);
    }
}
