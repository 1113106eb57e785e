//! A decision in words.

use std::cmp::Ordering;

use baton_proto::EngineId;
use serde::Serialize;

use super::{Aim, Decider, Decision, Modes, Policy, Request, View};
use crate::cost::{Key, Plan, Priced, Term};
use crate::fleet::Fleet;

/// Engines of each part of a handoff whose pairs are listed: those that are cheapest for that part. The chosen pair is
/// listed in any case.
const LISTED: usize = 32;

/// Why an option lost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Passed {
    /// The policy takes it only where what it aims at is not possible.
    Policy(&'static str),
    /// It costs this many seconds more; most of them in the named term.
    Slower {
        /// Seconds above the chosen option's.
        seconds: f64,
        /// The term that differs most.
        mostly: Term,
    },
    /// It costs the same; mode, home and names settled it.
    Tie,
}

impl std::fmt::Display for Passed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Passed::Policy(reason) => f.write_str(reason),
            Passed::Slower { seconds, mostly } => {
                write!(f, "{} ms more, mostly {}", milliseconds(*seconds), mostly.name())
            }
            Passed::Tie => f.write_str("equal cost; settled by mode, home and name"),
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
    /// Why a handoff or a pull was out of the question.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_splittable: Option<String>,
    /// What is to be known of the choice besides the options: SLOs that are missed, a kind of plan that was not
    /// possible, pairs that were not priced.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// The options, best first; the first was taken.
    pub options: Vec<OptionExplanation>,
    /// Options that are not listed.
    pub options_left_out: usize,
}

/// One option.
#[derive(Clone, Debug, Serialize)]
pub struct OptionExplanation {
    /// `colocated`, `append`, `pull` or `disaggregated`.
    pub mode: &'static str,
    /// Where a pulled prefix comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<EngineId>,
    /// Where the prompt is computed.
    pub prefill: EngineId,
    /// Where the answer is.
    pub decode: EngineId,
    /// Prompt tokens that the prefill engine holds, or pulls.
    pub hit_tokens: u64,
    /// Bytes over the link.
    pub transfer_bytes: u64,
    /// Predicted milliseconds by name.
    #[serde(serialize_with = "as_map")]
    pub terms_ms: Vec<(&'static str, f64)>,
    /// Their sum.
    pub total_ms: f64,
    /// Predicted time to the first token.
    pub ttft_ms: f64,
    /// Predicted mean time between tokens.
    pub itl_ms: f64,
    /// By how much it is predicted to miss its SLOs; absent where it meets them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub late_ms: Option<f64>,
    /// Why it was not taken; absent on the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why_not: Option<String>,
    /// The option itself.
    #[serde(skip)]
    pub priced: Priced,
}

fn as_map<S: serde::Serializer>(terms: &[(&'static str, f64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(terms.iter().copied())
}

fn is_pair(plan: &Plan) -> bool {
    matches!(plan, Plan::Disaggregated { .. })
}

impl Decider {
    /// Puts a decision in words, with at most `limit` options. It must be this decider's last, for this policy, fleet and
    /// request.
    pub fn explain(
        &self,
        policy: &dyn Policy,
        fleet: &Fleet,
        request: &Request<'_>,
        decision: &Decision,
        limit: usize,
    ) -> Explanation {
        let options = self.options(policy, fleet, request, decision);
        let name = |at: u32| fleet.engines()[at as usize].info.id.clone();
        let best = &decision.chosen;
        let listed = options.iter().enumerate().take(limit).map(|(at, (aimed, option))| OptionExplanation {
            mode: option.plan.mode(),
            source: match option.plan {
                Plan::Pull { source, .. } => Some(name(source)),
                _ => None,
            },
            prefill: name(option.plan.prefill()),
            decode: name(option.plan.decode()),
            hit_tokens: option.hit_tokens,
            transfer_bytes: option.transfer_bytes,
            terms_ms: option
                .terms
                .iter()
                .map(|(term, seconds)| (term.name(), milliseconds(seconds)))
                .collect(),
            total_ms: milliseconds(option.seconds),
            ttft_ms: milliseconds(option.ttft_seconds),
            itl_ms: milliseconds(option.itl_seconds),
            late_ms: (option.late_seconds > 0.0).then(|| milliseconds(option.late_seconds)),
            why_not: (at > 0).then(|| match aimed {
                true => passed(best, option).to_string(),
                false if self.scratch.last_resort && !is_pair(&option.plan) => {
                    Passed::Policy("its engine only decodes for the time being").to_string()
                }
                false => Passed::Policy(policy.reason()).to_string(),
            }),
            priced: *option,
        });
        Explanation {
            policy: decision.policy,
            prompt_tokens: request.prompt_tokens,
            not_splittable: request.splittable.err().map(str::to_owned),
            notes: notes(decision),
            options: listed.collect(),
            options_left_out: options.len().saturating_sub(limit),
        }
    }

    /// All options, the chosen one first, then those that the policy aims at, by cost; with whether it does.
    fn options(
        &self,
        policy: &dyn Policy,
        fleet: &Fleet,
        request: &Request<'_>,
        decision: &Decision,
    ) -> Vec<(bool, Priced)> {
        let pricing = self.pricing(fleet, request);
        let view = View { request, pricing: &pricing, scratch: &self.scratch };
        let aim = match policy.aim(&view) {
            Aim::Best(_) if decision.fell_back => Aim::Best(Modes::WHOLE),
            // Unless one of them gives way.
            Aim::Best(modes) if self.scratch.last_resort && is_pair(&decision.chosen.plan) => {
                Aim::Best(Modes { whole: false, pulls: false, ..modes })
            }
            aim => aim,
        };
        let hot = fleet.hot();
        let mut plans: Vec<Plan> = self.scratch.whole.iter().map(|at| pricing.whole_plan(*at)).collect();
        if request.prompt_tokens > 0 {
            let pullers =
                |at: &&u32| hot[**at as usize].can_pull_cached && hot[**at as usize].exchange.is_some();
            for source in self.sources().iter().copied() {
                for engine in self.scratch.whole.iter().filter(pullers).copied() {
                    if source != engine
                        && hot[source as usize].exchange == hot[engine as usize].exchange
                        && pricing.pulled(source, engine).is_some()
                    {
                        plans.push(Plan::Pull { source, engine });
                    }
                }
            }
        }
        if request.prompt_tokens > 0 && request.splittable.is_ok() {
            let cost = |at: u32| &self.scratch.costs[at as usize];
            let firsts =
                self.cheapest(|at| hot[at as usize].role.prefills(), fleet, |at| cost(at).prefill.seconds);
            let seconds = self.cheapest(
                |at| hot[at as usize].role.decodes(),
                fleet,
                |at| cost(at).decode.handoff_seconds,
            );
            for prefill in firsts {
                for decode in seconds.iter().copied().filter(|decode| *decode != prefill) {
                    if hot[prefill as usize].exchange == hot[decode as usize].exchange {
                        plans.push(Plan::Disaggregated { prefill, decode });
                    }
                }
            }
        }
        let chosen = decision.chosen.plan;
        plans.retain(|plan| *plan != chosen);
        let aimed = |plan: &Plan| match (aim, plan) {
            (Aim::Engine(engine), Plan::Colocated { engine: at } | Plan::Append { engine: at }) => {
                engine == *at
            }
            (Aim::Engine(_), _) => false,
            (Aim::Best(modes), Plan::Colocated { .. } | Plan::Append { .. }) => modes.whole,
            (Aim::Best(modes), Plan::Pull { .. }) => modes.pulls,
            (Aim::Best(modes), Plan::Disaggregated { .. }) => modes.pairs,
        };
        let mut options: Vec<(bool, Priced)> =
            plans.iter().map(|plan| (aimed(plan), pricing.price(*plan))).collect();
        options.sort_by(|a, b| b.0.cmp(&a.0).then(order(&a.1, &b.1)).then(a.1.plan.cmp(&b.1.plan)));
        options.insert(0, (true, decision.chosen));
        options
    }

    /// The engines that fit and can exchange blocks, the cheapest where there are many.
    fn cheapest(&self, fits: impl Fn(u32) -> bool, fleet: &Fleet, seconds: impl Fn(u32) -> f64) -> Vec<u32> {
        let able = self.scratch.able.iter().copied();
        let mut fitting: Vec<u32> =
            able.filter(|at| fits(*at) && fleet.hot()[*at as usize].exchange.is_some()).collect();
        if fitting.len() > LISTED {
            fitting.sort_by(|a, b| seconds(*a).total_cmp(&seconds(*b)).then(a.cmp(b)));
            fitting.truncate(LISTED);
        }
        fitting
    }
}

fn order(a: &Priced, b: &Priced) -> Ordering {
    let key = |of: &Priced| Key { seconds: of.seconds, ttft: of.ttft_seconds };
    key(a).order(&key(b))
}

fn passed(best: &Priced, option: &Priced) -> Passed {
    let seconds = option.seconds - best.seconds;
    if seconds <= 0.0 {
        return Passed::Tie;
    }
    let above = |term: Term| option.terms.get(term) - best.terms.get(term);
    let most = |a: Term, b: Term| if above(b) > above(a) { b } else { a };
    Passed::Slower { seconds, mostly: Term::ALL.into_iter().fold(Term::QueueWait, most) }
}

fn notes(decision: &Decision) -> Vec<String> {
    let mut notes = Vec::new();
    if !decision.meets_slo() {
        let late = milliseconds(decision.chosen.late_seconds);
        notes.push(format!("predicted to miss its SLOs by {late} ms"));
    }
    if decision.fell_back {
        notes.push("no plan of the kind that the policy aims at is possible".to_owned());
    }
    if decision.cut {
        notes.push(format!("more pairs than {} would have had to be priced", super::MAX_PAIRS));
    }
    notes
}
