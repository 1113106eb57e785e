//! What was predicted against what was seen, term by term.

use crate::cost::Term;

/// Weight of a new sample in the running means.
const WEIGHT: f64 = 0.05;

/// How well one term is predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TermAccuracy {
    /// Samples, ever.
    pub samples: u64,
    /// Running mean of seen less predicted, seconds: the bias. Positive where predictions are too low.
    pub error_seconds: f64,
    /// Running mean of the error's size, seconds.
    pub absolute_error_seconds: f64,
    /// Running mean of what was seen, seconds; what the errors are measured by.
    pub observed_seconds: f64,
}

/// How well each term is predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Accuracy([TermAccuracy; Term::ALL.len()]);

impl Accuracy {
    /// A term was predicted and then measured, in seconds. What is negative or not finite is dropped.
    pub fn observe(&mut self, term: Term, predicted: f64, observed: f64) {
        let sound = |seconds: f64| seconds.is_finite() && seconds >= 0.0;
        if !sound(predicted) || !sound(observed) {
            return;
        }
        let entry = &mut self.0[term as usize];
        entry.samples = entry.samples.saturating_add(1);
        let weight = WEIGHT.max(1.0 / entry.samples as f64);
        let error = observed - predicted;
        entry.error_seconds += weight * (error - entry.error_seconds);
        entry.absolute_error_seconds += weight * (error.abs() - entry.absolute_error_seconds);
        entry.observed_seconds += weight * (observed - entry.observed_seconds);
    }

    /// One term's.
    pub fn of(&self, term: Term) -> TermAccuracy {
        self.0[term as usize]
    }

    /// Those of terms that were ever measured, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Term, TermAccuracy)> + '_ {
        Term::ALL.into_iter().map(|term| (term, self.of(term))).filter(|(_, entry)| entry.samples > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bias_and_size_of_errors_are_told_apart() {
        let mut accuracy = Accuracy::default();
        for i in 0..400 {
            let off = if i % 2 == 0 { 0.3 } else { -0.1 };
            accuracy.observe(Term::Prefill, 1.0, 1.0 + off);
            accuracy.observe(Term::Transfer, f64::NAN, 1.0);
            accuracy.observe(Term::Transfer, 1.0, -1.0);
        }
        let prefill = accuracy.of(Term::Prefill);
        assert_eq!(prefill.samples, 400);
        assert!((prefill.error_seconds - 0.1).abs() < 0.02, "{prefill:?}");
        assert!((prefill.absolute_error_seconds - 0.2).abs() < 0.02, "{prefill:?}");
        assert_eq!(accuracy.iter().count(), 1);
    }
}
