//! A small mixed workload: chats, agent loops and questions about long documents. The same seed gives the same
//! scripts, so that each mode sees the same requests.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

/// What a client does, from its first request to its last.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(crate) kind: Kind,
    /// When it comes.
    pub(crate) start: Duration,
    /// What every request of it begins with: instructions, tools, or the document.
    pub(crate) opening: String,
    pub(crate) turns: Vec<Turn>,
}

/// One request.
#[derive(Clone, Debug)]
pub(crate) struct Turn {
    /// Time since the answer before it: a user reads, a tool runs.
    pub(crate) pause: Duration,
    /// What is added to the conversation.
    pub(crate) text: String,
    pub(crate) max_tokens: u32,
}

/// Kinds of clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// A person who reads and answers.
    Chat,
    /// A program that adds a tool's result to its context and asks again.
    Agent,
    /// Somebody who asks about a long text, and asks once more.
    Document,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Chat => "chat",
            Kind::Agent => "agent loop",
            Kind::Document => "long document",
        }
    }
}

/// The scripts, in order of their start.
pub(crate) fn scripts(seed: u64) -> Vec<Script> {
    let mut rng = StdRng::seed_from_u64(seed);
    let assistant = words(&mut rng, 120..=120);
    let tools = words(&mut rng, 400..=400);
    let mut scripts = Vec::new();
    for _ in 0..12 {
        let turns = (0..3).map(|_| turn(&mut rng, 200..=600, 15..=60, 24..=40)).collect();
        scripts.push(script(&mut rng, Kind::Chat, assistant.clone(), turns));
    }
    for _ in 0..6 {
        let turns = (0..5).map(|_| turn(&mut rng, 100..=300, 60..=250, 12..=28)).collect();
        scripts.push(script(&mut rng, Kind::Agent, tools.clone(), turns));
    }
    for _ in 0..6 {
        let document = words(&mut rng, 900..=2000);
        let turns = (0..2).map(|_| turn(&mut rng, 200..=500, 10..=20, 24..=40)).collect();
        scripts.push(script(&mut rng, Kind::Document, document, turns));
    }
    scripts.sort_by_key(|script| script.start);
    scripts
}

fn script(rng: &mut StdRng, kind: Kind, opening: String, turns: Vec<Turn>) -> Script {
    Script { kind, start: Duration::from_millis(rng.random_range(0..4000)), opening, turns }
}

fn turn(
    rng: &mut StdRng,
    pause_ms: std::ops::RangeInclusive<u64>,
    length: std::ops::RangeInclusive<usize>,
    max_tokens: std::ops::RangeInclusive<u32>,
) -> Turn {
    Turn {
        pause: Duration::from_millis(rng.random_range(pause_ms)),
        text: words(rng, length),
        max_tokens: rng.random_range(max_tokens),
    }
}

/// Common words of English.
pub(crate) const WORDS: &str = "the a of to in it is that for on with as at by from this which their cache block engine \
    request answer token prompt network host model queue second measure transfer decode prefill agent document \
    question reader writer letter city river mountain winter summer morning evening paper number value table \
    column report change result reason order small large early late quick slow open closed first last other \
    every never always often between before after under over into through across against without";

/// So many words. What they say does not matter to a mock engine; that they repeat in no pattern does.
fn words(rng: &mut StdRng, count: std::ops::RangeInclusive<usize>) -> String {
    let all: Vec<&str> = WORDS.split_whitespace().collect();
    let count = rng.random_range(count);
    let mut text = String::new();
    for at in 0..count {
        if at > 0 {
            text.push(' ');
        }
        text.push_str(all.choose(rng).expect("the list is not empty"));
        if at % 14 == 13 {
            text.push('.');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_gives_one_workload_and_another_seed_another() {
        let texts = |seed| format!("{:?}", scripts(seed));
        assert_eq!(texts(7), texts(7));
        assert_ne!(texts(7), texts(8));
    }

    #[test]
    fn all_kinds_are_there_and_documents_are_long() {
        let scripts = scripts(1);
        for kind in [Kind::Chat, Kind::Agent, Kind::Document] {
            let of_kind: Vec<_> = scripts.iter().filter(|script| script.kind == kind).collect();
            assert!(of_kind.len() >= 4, "{kind:?}");
            if kind == Kind::Document {
                assert!(of_kind.iter().all(|script| script.opening.split(' ').count() >= 900));
            }
        }
        assert!(scripts.is_sorted_by_key(|script| script.start));
    }
}
