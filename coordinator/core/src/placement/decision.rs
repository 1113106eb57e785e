//! A decision and its explanation.

use baton_proto::EngineId;
use serde::Serialize;

use super::{Policy, Rank, Request};
use crate::cost::{Plan, Priced, Term};
use crate::fleet::Fleet;

/// Why an engine was not considered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Skipped {
    /// It serves other models.
    OtherModel,
    /// Its agent's lease ran out.
    Unhealthy,
    /// It failed this request already.
    Failed,
}

/// Why an option lost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Passed {
    /// The policy takes it only where nothing better is possible.
    Policy(&'static str),
    /// It costs this many seconds more; most of them in the named term.
    Slower {
        /// Seconds above the chosen option's.
        seconds: f64,
        /// The term that differs most.
        mostly: Term,
    },
    /// It costs the same; mode and names settled it.
    Tie,
}

/// What was chosen, and everything it was chosen from.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    policy: &'static str,
    ranked: Vec<(Rank, Priced)>,
    class_reason: &'static str,
    unsplittable: Option<&'static str>,
    prompt_tokens: u64,
}

impl Decision {
    pub(super) fn new(
        policy: &dyn Policy,
        request: &Request<'_>,
        ranked: Vec<(Rank, Priced)>,
    ) -> Option<Self> {
        let last = ranked.last()?;
        Some(Self {
            policy: policy.name(),
            class_reason: policy.reason(last.0.class),
            unsplittable: request.splittable.err(),
            prompt_tokens: request.prompt_tokens,
            ranked,
        })
    }

    /// The option that was taken.
    pub fn chosen(&self) -> &Priced {
        &self.ranked[0].1
    }

    /// All options, best first.
    pub fn options(&self) -> impl ExactSizeIterator<Item = &Priced> {
        self.ranked.iter().map(|entry| &entry.1)
    }

    /// Why the option at this place lost; `None` for the first.
    pub fn passed(&self, at: usize) -> Option<Passed> {
        if at == 0 {
            return None;
        }
        let (best_rank, best) = &self.ranked[0];
        let (rank, option) = &self.ranked[at];
        if rank.class != best_rank.class {
            return Some(Passed::Policy(self.class_reason));
        }
        let seconds = option.terms.total() - best.terms.total();
        if seconds <= 0.0 {
            return Some(Passed::Tie);
        }
        let above = |term: Term| option.terms.get(term) - best.terms.get(term);
        let mostly = Term::ALL.into_iter().max_by(|a, b| above(*a).total_cmp(&above(*b)))?;
        Some(Passed::Slower { seconds, mostly })
    }

    /// The decision in words, with at most `limit` options.
    pub fn explain(&self, fleet: &Fleet, limit: usize) -> Explanation {
        let name = |at: u32| fleet.engines()[at as usize].info.id.clone();
        let option = |(at, priced): (usize, &Priced)| OptionExplanation {
            mode: priced.plan.mode(),
            prefill: name(priced.plan.prefill()),
            decode: name(priced.plan.decode()),
            hit_tokens: priced.hit_tokens,
            transfer_bytes: priced.transfer_bytes,
            terms_ms: priced
                .terms
                .iter()
                .map(|(term, seconds)| (term.name(), milliseconds(seconds)))
                .collect(),
            total_ms: milliseconds(priced.terms.total()),
            why_not: self.passed(at).map(|passed| passed.to_string()),
        };
        Explanation {
            policy: self.policy,
            prompt_tokens: self.prompt_tokens,
            not_splittable: self.unsplittable,
            options: self.options().enumerate().take(limit).map(option).collect(),
            options_left_out: self.ranked.len().saturating_sub(limit),
        }
    }

    /// The plan that was taken.
    pub fn plan(&self) -> Plan {
        self.chosen().plan
    }
}

impl std::fmt::Display for Passed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Passed::Policy(reason) => f.write_str(reason),
            Passed::Slower { seconds, mostly } => {
                write!(f, "{} ms more, mostly {}", milliseconds(*seconds), mostly.name())
            }
            Passed::Tie => f.write_str("equal cost; settled by mode and name"),
        }
    }
}

/// To the microsecond: what is below is noise, and would make explanations long.
fn milliseconds(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e3
}

/// A decision, ready to be shown.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// The policy that chose.
    pub policy: &'static str,
    /// Prompt tokens, as counted or estimated.
    pub prompt_tokens: u64,
    /// Why a handoff was out of the question.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_splittable: Option<&'static str>,
    /// The options, best first; the first was taken.
    pub options: Vec<OptionExplanation>,
    /// Options that are not listed.
    pub options_left_out: usize,
}

/// One option.
#[derive(Clone, Debug, Serialize)]
pub struct OptionExplanation {
    /// `colocated` or `disaggregated`.
    pub mode: &'static str,
    /// Where the prompt is computed.
    pub prefill: EngineId,
    /// Where the answer is.
    pub decode: EngineId,
    /// Prompt tokens that the prefill engine holds.
    pub hit_tokens: u64,
    /// Bytes over the link.
    pub transfer_bytes: u64,
    /// Predicted milliseconds by name.
    #[serde(serialize_with = "as_map")]
    pub terms_ms: Vec<(&'static str, f64)>,
    /// Their sum.
    pub total_ms: f64,
    /// Why it was not taken; absent on the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why_not: Option<String>,
}

fn as_map<S: serde::Serializer>(terms: &[(&'static str, f64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(terms.iter().copied())
}
