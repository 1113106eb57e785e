//! Recursive least squares with forgetting, for the three coefficients of a formula in seconds.
//!
//! The filter is kept in information form: `S ← λS + w·z·zᵀ`, `r ← λr + w·z·y`, and the coefficients solve `(S + κI)ψ = r + κL`.
//! Features `z` are scaled by the prior's coefficients, so that `ψ` is a multiple of the prior. Each sample weighs by the
//! inverse square of its prediction: errors count relative to what is predicted, over prompts of 16 and of 100,000 tokens alike.
//!
//! Guards:
//! - `L`, the mean ratio of what was seen to the prior, is the level that the ridge `κ` pulls to. It is never forgotten, so directions
//!   that the samples do not excite keep the prior's shape at the level seen, and nothing winds up.
//! - Once settled, a sample moves the estimate as if it were off by at most three times what samples are off by on average, and at most
//!   four times. A lasting change raises that average within a few samples, and so gets through.
//! - Coefficients stay between a thousandth and a thousand times their level: the bounded solution is the least squares one,
//!   found over the eight sets of coefficients that may lie at the lower bound.
//! - What is not a positive, finite number is dropped.

use crate::ewma::Ewma;

const N: usize = 3;

/// Memory: a sample's weight is halved after 69 more.
const FORGETTING: f64 = 0.99;
/// Weight of the prior's shape, in samples.
const RIDGE: f64 = 0.02;
/// Least and most of a coefficient, in multiples of the prior at the level seen.
const LEAST: f64 = 1e-3;
const MOST: f64 = 1e3;
/// Samples after which one that is further off than [`LARGEST_STEP`] counts as if it were just so far.
const SETTLED: u32 = 8;
const LARGEST_STEP: f64 = 4.0;
/// What is believed at least, as a part of the prediction.
const SMALLEST_STEP: f64 = 0.1;
/// A sample may be off by so many times the running mean of that.
const SPREAD: f64 = 3.0;
/// Weight of a new sample in that mean.
const SPREAD_WEIGHT: f64 = 0.1;
/// Seconds that are believed.
const BELIEVED: std::ops::RangeInclusive<f64> = 1e-9..=1e5;
/// Largest scaled feature that is believed: a prediction of the prior, in seconds.
const LARGEST_FEATURE: f64 = 1e7;

/// The estimate.
#[derive(Clone, Debug)]
pub(crate) struct Regression {
    prior: [f64; N],
    level: Ewma,
    information: [[f64; N]; N],
    moment: [f64; N],
    /// Multiples of the prior.
    multiples: [f64; N],
    /// Running mean of how far samples are off, as a part of the prediction.
    spread: f64,
    samples: u32,
}

impl Regression {
    /// Whether anything was measured.
    pub(crate) fn has_samples(&self) -> bool {
        self.samples > 0
    }

    /// Starts at these coefficients, which must be positive.
    pub(crate) fn new(prior: [f64; N]) -> Self {
        Self {
            prior,
            level: Ewma::default(),
            information: [[0.0; N]; N],
            moment: [0.0; N],
            multiples: [1.0; N],
            spread: LARGEST_STEP,
            samples: 0,
        }
    }

    /// The coefficients: positive and finite, whatever came in.
    pub(crate) fn coefficients(&self) -> [f64; N] {
        std::array::from_fn(|i| self.prior[i] * self.multiples[i])
    }

    /// With these features it took this many seconds.
    pub(crate) fn observe(&mut self, features: [f64; N], seconds: f64) {
        let scaled: [f64; N] = std::array::from_fn(|i| features[i] * self.prior[i]);
        let believed = |z: &f64| z.is_finite() && (0.0..=LARGEST_FEATURE).contains(z);
        let at_prior: f64 = scaled.iter().sum();
        if !BELIEVED.contains(&seconds) || !scaled.iter().all(believed) || at_prior <= 0.0 {
            return;
        }
        let predicted = match self.samples {
            0 => seconds,
            _ => dot(&self.multiples, &scaled),
        };
        let ratio = seconds / predicted;
        let off = (ratio.max(1.0 / ratio) - 1.0).min(LARGEST_STEP - 1.0);
        let seconds = match self.samples {
            0..SETTLED => seconds,
            _ => {
                let most = 1.0 + (SPREAD * self.spread).clamp(SMALLEST_STEP, LARGEST_STEP - 1.0);
                seconds.clamp(predicted / most, predicted * most)
            }
        };
        let weight = SPREAD_WEIGHT.max(1.0 / (f64::from(self.samples) + 1.0));
        self.spread += weight * (off - self.spread);
        self.level.observe(seconds / at_prior);
        self.samples = self.samples.saturating_add(1);
        let weight = predicted.powi(-2);
        for (i, row) in self.information.iter_mut().enumerate() {
            for (j, cell) in row.iter_mut().enumerate() {
                *cell = FORGETTING * *cell + weight * scaled[i] * scaled[j];
            }
            self.moment[i] = FORGETTING * self.moment[i] + weight * scaled[i] * seconds;
        }
        self.solve();
    }

    fn solve(&mut self) {
        let Some(level) = self.level.mean() else { return };
        // In units of the level, so that the system is well scaled whatever the engine: x = ψ / L - least.
        let ridge = RIDGE;
        let mut matrix = self.information.map(|row| row.map(|cell| cell * level * level));
        let mut right: [f64; N] = self.moment.map(|moment| moment * level);
        for i in 0..N {
            matrix[i][i] += ridge;
            right[i] += ridge;
        }
        for i in 0..N {
            right[i] -= LEAST * matrix[i].iter().sum::<f64>();
        }
        let best = (0..1u8 << N)
            .filter_map(|fixed| solve_free(&matrix, &right, fixed))
            .filter(|x| x.iter().all(|x| x.is_finite() && *x >= 0.0))
            .map(|x| (objective(&matrix, &right, &x), x))
            .min_by(|a, b| a.0.total_cmp(&b.0));
        if let Some((_, x)) = best {
            let multiples = x.map(|x| (x + LEAST).min(MOST) * level);
            let sound = |(multiple, prior): (&f64, &f64)| (multiple * prior).is_normal() && *multiple > 0.0;
            if multiples.iter().zip(&self.prior).all(sound) {
                self.multiples = multiples;
            }
        }
    }
}

fn dot(a: &[f64; N], b: &[f64; N]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Half the quadratic form that the solution minimises.
fn objective(matrix: &[[f64; N]; N], right: &[f64; N], x: &[f64; N]) -> f64 {
    let product: [f64; N] = std::array::from_fn(|i| dot(&matrix[i], x));
    dot(&product, x) / 2.0 - dot(right, x)
}

/// Solves with the unknowns in `fixed` (a set of bits) at zero, by elimination with pivots.
fn solve_free(matrix: &[[f64; N]; N], right: &[f64; N], fixed: u8) -> Option<[f64; N]> {
    let (mut a, mut b) = (*matrix, *right);
    for i in (0..N).filter(|i| fixed & (1 << i) != 0) {
        a[i] = [0.0; N];
        a.iter_mut().for_each(|row| row[i] = 0.0);
        a[i][i] = 1.0;
        b[i] = 0.0;
    }
    for column in 0..N {
        let pivot = (column..N).max_by(|i, j| a[*i][column].abs().total_cmp(&a[*j][column].abs()))?;
        a.swap(column, pivot);
        b.swap(column, pivot);
        if a[column][column] == 0.0 {
            return None;
        }
        let above = a[column];
        for row in column + 1..N {
            let factor = a[row][column] / above[column];
            a[row].iter_mut().zip(above).for_each(|(cell, above)| *cell -= factor * above);
            b[row] -= factor * b[column];
        }
    }
    let mut x = [0.0; N];
    for i in (0..N).rev() {
        let known: f64 = (i + 1..N).map(|j| a[i][j] * x[j]).sum();
        x[i] = (b[i] - known) / a[i][i];
    }
    Some(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_negative_fit_becomes_the_bounded_one() {
        // Seconds that fall with the second feature: its coefficient goes to its lower bound, not below.
        let mut regression = Regression::new([1.0, 1.0, 1.0]);
        for i in 0..300 {
            let x = f64::from(i % 10);
            regression.observe([1.0, x, 0.0], 20.0 - x);
        }
        let [fixed, slope, _] = regression.coefficients();
        assert!(slope < 0.05 && slope > 0.0, "{slope}");
        assert!((13.0..18.0).contains(&fixed), "{fixed}");
    }

    #[test]
    fn one_wild_sample_moves_a_settled_estimate_little() {
        let mut regression = Regression::new([1.0, 1.0, 1.0]);
        for i in 0..200 {
            let (x, y) = (f64::from(i % 13), f64::from(i % 7));
            regression.observe([1.0, x, y], 1.0 + x + y);
        }
        regression.observe([1.0, 5.0, 5.0], 1e5);
        let predicted: f64 = dot(&regression.coefficients(), &[1.0, 5.0, 5.0]);
        assert!((predicted / 11.0 - 1.0).abs() < 0.1, "{predicted}");
    }
}
