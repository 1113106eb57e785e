//! Engines split between the parts of requests: xPyD.

use std::fmt;
use std::str::FromStr;

use super::{Fleet, Kind, Role};

/// So many engines for prefill, so many for decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// x.
    pub prefill: u32,
    /// y.
    pub decode: u32,
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}P{}D", self.prefill, self.decode)
    }
}

/// A text that is no split, or one that a fleet has not the engines for.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum SplitError {
    /// Not of the form.
    #[error("`{0}` is no split of engines; write it like 3P5D, both at least 1")]
    Form(String),
    /// Other than the fleet's number of engines.
    #[error("{split} is {} engines, but the fleet has {engines}; give a split of {engines}", .split.prefill + .split.decode)]
    Count {
        /// What was asked for.
        split: Split,
        /// What there is.
        engines: u32,
    },
}

impl FromStr for Split {
    type Err = SplitError;

    fn from_str(text: &str) -> Result<Self, SplitError> {
        let upper = text.to_ascii_uppercase();
        let parts = upper.strip_suffix('D').and_then(|rest| rest.split_once('P'));
        let parse = |part: &str| part.parse::<u32>().ok().filter(|count| (1..=1000).contains(count));
        let split = parts.and_then(|(x, y)| Some(Self { prefill: parse(x)?, decode: parse(y)? }));
        split.ok_or_else(|| SplitError::Form(text.to_owned()))
    }
}

impl Fleet {
    /// The same engines in their order, the first x for prefill and the others for decode. Which engine stands on which host does not change
    /// where x is a multiple of a kind's `per_host`; else the host between the parts counts as two.
    ///
    /// # Errors
    /// The split has another number of engines.
    pub fn with_split(&self, split: Split) -> Result<Self, SplitError> {
        let engines = self.len() as u32;
        if split.prefill + split.decode != engines {
            return Err(SplitError::Count { split, engines });
        }
        let mut left = split.prefill;
        let mut kinds = Vec::new();
        for kind in &self.engines {
            let prefill = left.min(kind.count);
            left -= prefill;
            for (count, role) in [(prefill, Role::Prefill), (kind.count - prefill, Role::Decode)] {
                if count > 0 {
                    kinds.push(Kind { count, role, ..kind.clone() });
                }
            }
        }
        Ok(Self { engines: kinds, ..self.clone() })
    }
}
