//! How long a step takes on the engine that the mock stands in for.

use std::str::FromStr;
use std::time::Duration;

use crate::scheduler::Row;

/// Three coefficients, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Coefficients(pub [f64; 3]);

/// Not three numbers.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?}: give three numbers of milliseconds, none negative, such as 3.26,0.019,8.17e-7")]
pub struct CoefficientsError(String);

impl FromStr for Coefficients {
    type Err = CoefficientsError;

    fn from_str(text: &str) -> Result<Self, CoefficientsError> {
        let wrong = || CoefficientsError(text.to_owned());
        let numbers: Vec<f64> =
            text.split(',').map(|part| part.trim().parse()).collect::<Result<_, _>>().map_err(|_| wrong())?;
        let numbers: [f64; 3] = numbers.try_into().map_err(|_| wrong())?;
        let sensible = numbers.iter().all(|number| number.is_finite() && *number >= 0.0);
        sensible.then_some(Self(numbers)).ok_or_else(wrong)
    }
}

/// The timing model of a step: prefill and decode parts add up.
///
/// - prefill: a + Σ (b·n + c·(n·p + n²/2)), over chunks of n new tokens after p cached ones;
/// - decode: d + e·B + f·Σ ctx, over B sequences with one new token behind ctx cached ones.
///
/// A part of which the step has nothing costs nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timing {
    /// a, b and c.
    pub prefill: Coefficients,
    /// d, e and f.
    pub decode: Coefficients,
}

impl Timing {
    /// The time that a step with these rows takes.
    pub fn of_step(&self, rows: &[Row]) -> Duration {
        let Coefficients([a, b, c]) = self.prefill;
        let Coefficients([d, e, f]) = self.decode;
        let (mut prefill, mut decode) = (0.0, 0.0);
        for row in rows {
            let (new, before) = (row.len as f64, row.start as f64);
            if row.len == 1 && row.start > 0 {
                decode += if decode == 0.0 { d } else { 0.0 } + e + f * before;
            } else {
                prefill +=
                    if prefill == 0.0 { a } else { 0.0 } + b * new + c * (new * before + new * new / 2.0);
            }
        }
        Duration::from_secs_f64((prefill + decode) / 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(start: usize, len: usize) -> Row {
        Row { running: 0, start, len, samples: true }
    }

    #[test]
    fn parts_add_up_and_absent_parts_are_free() {
        let timing = Timing { prefill: "8,0.5,0.001".parse().unwrap(), decode: "4,1,0.01".parse().unwrap() };
        let ms = |rows: &[Row]| (timing.of_step(rows).as_secs_f64() * 1e6).round() / 1000.0;
        assert_eq!(ms(&[]), 0.0);
        assert_eq!(ms(&[row(100, 40)]), 8.0 + 20.0 + 0.001 * (4000.0 + 800.0));
        assert_eq!(ms(&[row(100, 1), row(200, 1)]), 4.0 + 2.0 + 3.0);
        assert_eq!(ms(&[row(100, 1), row(0, 10), row(0, 10)]), 4.0 + 1.0 + 1.0 + 8.0 + 10.0 + 0.1);
    }

    #[test]
    fn coefficients_are_three_numbers() {
        assert_eq!("1, 2e-3,0".parse(), Ok(Coefficients([1.0, 0.002, 0.0])));
        for bad in ["", "1,2", "1,2,3,4", "1,2,x", "1,-2,3", "1,inf,3", "NaN,0,0"] {
            assert!(bad.parse::<Coefficients>().is_err(), "{bad}");
        }
    }
}
