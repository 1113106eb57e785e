//! A policy on a fleet in a certain shape: what a comparison compares.

use std::fmt;
use std::str::FromStr;

use baton_coordinator_core::placement::{self, POLICIES};

use crate::decision::{Production, Speeds};
use crate::fleet::{Fleet, Role, Split, SplitError};
use crate::sim::{Answer, Placer, Plan, Request};

/// The name of [`Naive`].
const NAIVE: &str = "naive";
/// The policy that a split alone stands for.
const SPLIT_POLICY: &str = "disaggregated";

/// A way to run a fleet.
///
/// Written `POLICY`, all engines taking whole requests and either part; `POLICY@3P5D`, the first three engines for prefill and the
/// others for decode; or `3P5D` alone, which is static disaggregation: `disaggregated@3P5D`. Policies are those of the coordinator,
/// and `naive`: see [`Naive`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    policy: &'static str,
    split: Option<Split>,
}

/// A text that is no mode, or a mode that the fleet cannot run.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ModeError {
    /// There is no such policy.
    #[error("no policy is called `{0}`; there are {names}, naive, and splits like 3P5D", names = POLICIES.map(|policy| policy.name()).join(", "))]
    Policy(String),
    /// What stands behind the `@`.
    #[error(transparent)]
    Split(#[from] SplitError),
    /// Naive disaggregation of a fleet that is not split.
    #[error(
        "naive disaggregation needs engines for prefill and engines for decode; write it like naive@3P5D"
    )]
    Whole,
}

impl Mode {
    /// All engines take whole requests, under the policy of that name.
    pub const COLOCATED: Mode = Mode { policy: "colocated", split: None };
    /// The decision is free.
    pub const ADAPTIVE: Mode = Mode { policy: "adaptive", split: None };

    /// Static disaggregation.
    pub fn split(prefill: u32, decode: u32) -> Self {
        Self { policy: SPLIT_POLICY, split: Some(Split { prefill, decode }) }
    }

    /// Whether it is co-location or disaggregation for every request alike.
    pub fn is_static(&self) -> bool {
        *self == Self::COLOCATED || self.policy == SPLIT_POLICY
    }

    /// The static modes of a fleet of so many engines: co-located, and static disaggregation with a quarter to three
    /// quarters of the engines for prefill, in steps of an eighth.
    pub fn statics(engines: u32) -> Vec<Self> {
        let mut modes = vec![Self::COLOCATED];
        for eighths in 2..=6 {
            let prefill = (engines * eighths).div_ceil(8);
            let mode = Self::split(prefill, engines.saturating_sub(prefill));
            if prefill > 0 && prefill < engines && !modes.contains(&mode) {
                modes.push(mode);
            }
        }
        modes
    }

    /// The static modes, and adaptive.
    pub fn usual(engines: u32) -> Vec<Self> {
        let mut modes = Self::statics(engines);
        modes.push(Self::ADAPTIVE);
        modes
    }

    /// The fleet in this mode's shape.
    ///
    /// # Errors
    /// The split is of another number of engines.
    pub fn fleet(&self, fleet: &Fleet) -> Result<Fleet, ModeError> {
        Ok(match self.split {
            Some(split) => fleet.with_split(split)?,
            None => fleet.clone(),
        })
    }

    /// What decides, on a fleet of [`Mode::fleet`].
    ///
    /// # Errors
    /// [`ModeError::Whole`].
    pub fn placer(
        &self,
        fleet: &Fleet,
        block_tokens: u32,
        speeds: Speeds,
    ) -> Result<Box<dyn Placer>, ModeError> {
        Ok(match self.policy {
            NAIVE => Box::new(Naive::new(fleet).ok_or(ModeError::Whole)?),
            policy => Box::new(
                Production::new(fleet, block_tokens, policy, speeds)
                    .map_err(|unknown| ModeError::Policy(unknown.name))?,
            ),
        })
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.policy, self.split) {
            (SPLIT_POLICY, Some(split)) => write!(f, "{split}"),
            (policy, Some(split)) => write!(f, "{policy}@{split}"),
            (policy, None) => f.write_str(policy),
        }
    }
}

impl FromStr for Mode {
    type Err = ModeError;

    fn from_str(text: &str) -> Result<Self, ModeError> {
        let named = |name: &str| match name {
            NAIVE => Ok(NAIVE),
            name => match placement::policy(name) {
                Some(policy) => Ok(policy.name()),
                None => Err(ModeError::Policy(name.to_owned())),
            },
        };
        match text.split_once('@') {
            Some((policy, split)) => Ok(Self { policy: named(policy)?, split: Some(split.parse()?) }),
            None if text.starts_with(|first: char| first.is_ascii_digit()) => {
                Ok(Self { policy: SPLIT_POLICY, split: Some(text.parse()?) })
            }
            None => Ok(Self { policy: named(text)?, split: None }),
        }
    }
}

/// Disaggregation as it is without a router that knows anything: prefill engines in turn, decode engines in turn, every
/// request on two.
#[derive(Debug)]
pub struct Naive {
    prefill: Vec<u32>,
    decode: Vec<u32>,
}

impl Naive {
    fn new(fleet: &Fleet) -> Option<Self> {
        let of = |role: Role| -> Vec<u32> {
            let members = fleet.members();
            (0..members.len() as u32).filter(|at| members[*at as usize].role == role).collect()
        };
        let naive = Self { prefill: of(Role::Prefill), decode: of(Role::Decode) };
        (!naive.prefill.is_empty() && !naive.decode.is_empty()).then_some(naive)
    }
}

impl Placer for Naive {
    fn place(&mut self, _now: crate::Nanos, request: &Request<'_>) -> Answer {
        // One that failed is tried once more somewhere else: so much every proxy does.
        let number = request.number + request.avoid.len() as u64;
        let turn = |engines: &[u32]| engines[(number % engines.len() as u64) as usize];
        Answer::Goes(Plan::Disaggregated { prefill: turn(&self.prefill), decode: turn(&self.decode) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_read_as_they_are_written() {
        for text in ["colocated", "adaptive", "3P5D", "session_sticky@4P4D", "naive@1P7D"] {
            assert_eq!(text.parse::<Mode>().map(|mode| mode.to_string()), Ok(text.to_owned()));
        }
        assert_eq!("disaggregated@2P2D".parse::<Mode>(), Ok(Mode::split(2, 2)));
        assert!("best".parse::<Mode>().is_err_and(|error| error.to_string().contains("adaptive")));
        assert!("3P".parse::<Mode>().is_err_and(|error| error.to_string().contains("3P5D")));
    }

    #[test]
    fn usual_modes_fit_any_fleet() {
        let names = |engines| -> Vec<String> { Mode::usual(engines).iter().map(Mode::to_string).collect() };
        assert_eq!(names(8), ["colocated", "2P6D", "3P5D", "4P4D", "5P3D", "6P2D", "adaptive"]);
        assert_eq!(names(2), ["colocated", "1P1D", "adaptive"]);
        assert_eq!(names(1), ["colocated", "adaptive"]);
    }
}
