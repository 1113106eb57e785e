//! The index against a naive model of an engine with several cache groups, which looks for a prefix as vLLM's own coordinator
//! of groups does: each kind of group in turn shortens a common candidate, until none does.

use baton_agent::engine::event::{EngineHash, KvEvent, Removed, Stored};
use proptest::prelude::*;

use crate::pipeline::Pipeline;

/// Tokens in a block.
const BLOCK: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Full,
    /// Tokens.
    Window(u32),
    Mamba,
}

/// A group: its kind, and how many blocks make one of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Spec(Kind, usize);

/// The groups that models have, in their engines' order.
fn specs(choice: usize) -> Vec<Spec> {
    use Kind::{Full, Mamba, Window};
    match choice {
        0 => vec![Spec(Full, 1)],
        1 => vec![Spec(Window(6), 1)],
        2 => vec![Spec(Full, 1), Spec(Window(10), 1)],
        3 => vec![Spec(Window(6), 1), Spec(Window(6), 1), Spec(Full, 1)],
        4 => vec![Spec(Mamba, 1), Spec(Full, 1)],
        5 => vec![Spec(Full, 1), Spec(Window(5), 1), Spec(Window(14), 1), Spec(Mamba, 1)],
        6 => vec![Spec(Full, 1), Spec(Window(12), 2)],
        7 => vec![Spec(Full, 2), Spec(Window(7), 1)],
        8 => vec![Spec(Mamba, 2), Spec(Full, 1), Spec(Window(9), 1)],
        _ => vec![Spec(Full, 1), Spec(Window(9), 2), Spec(Mamba, 3)],
    }
}
const CHOICES: usize = 10;

/// An engine. A prompt's blocks stand for one number each.
struct Engine {
    specs: Vec<Spec>,
    /// Prefixes that have a name; the name is the hash.
    names: Vec<Vec<u32>>,
    /// Copies of blocks: the group, and the name of the prefix that ends with it.
    copies: Vec<(usize, usize)>,
}

impl Engine {
    fn name(&mut self, prefix: &[u32]) -> usize {
        self.names.iter().position(|name| name == prefix).unwrap_or_else(|| {
            self.names.push(prefix.to_vec());
            self.names.len() - 1
        })
    }

    /// Whether block `i` of these groups is cached in each of them.
    fn cached(&self, groups: &[usize], prompt: &[u32], i: usize) -> bool {
        let prefix = &prompt[..(i + 1) * self.specs[groups[0]].1];
        groups
            .iter()
            .all(|group| self.copies.iter().any(|(of, name)| of == group && self.names[*name] == prefix))
    }

    /// The least common multiple of the groups' block sizes, in blocks.
    fn align(&self) -> usize {
        (1..).find(|n| self.specs.iter().all(|spec| n % spec.1 == 0)).unwrap()
    }

    /// The longest length up to `longest` that groups of one kind accept, in blocks of the prompt.
    fn accepted(&self, groups: &[usize], prompt: &[u32], longest: usize) -> usize {
        let Spec(kind, stride) = self.specs[groups[0]];
        let aligned = |blocks: usize| (blocks * stride).is_multiple_of(self.align());
        let blocks = longest / stride;
        let mut hit = match kind {
            Kind::Full => (0..blocks).take_while(|i| self.cached(groups, prompt, *i)).count(),
            Kind::Mamba => {
                let last = |i: &usize| self.cached(groups, prompt, *i) && aligned(i + 1);
                (0..blocks).rev().find(last).map_or(0, |i| i + 1)
            }
            Kind::Window(tokens) => {
                let needed = (tokens as usize - 1).div_ceil(stride * BLOCK);
                let mut run = 0;
                let mut hit = None;
                for i in (0..blocks).rev() {
                    if !self.cached(groups, prompt, i) {
                        run = 0;
                    } else if run > 0 || aligned(i + 1) {
                        run += 1;
                        if run >= needed {
                            hit = Some(i + run);
                            break;
                        }
                    }
                }
                hit.unwrap_or(run)
            }
        };
        while !aligned(hit) {
            hit -= 1;
        }
        hit * stride
    }

    /// Leading blocks that the engine reuses of a prompt of which it may reuse so many.
    fn hit(&self, prompt: &[u32], usable: usize) -> usize {
        let mut alike: Vec<Vec<usize>> = Vec::new();
        for (group, spec) in self.specs.iter().enumerate() {
            match alike.iter_mut().find(|groups| self.specs[groups[0]] == *spec) {
                Some(groups) => groups.push(group),
                None => alike.push(vec![group]),
            }
        }
        alike.sort_by_key(|groups| self.specs[groups[0]].0 != Kind::Full);
        let mut length = usable;
        loop {
            let mut candidate = length;
            for groups in &alike {
                candidate = self.accepted(groups, prompt, candidate);
            }
            if candidate >= length {
                return length;
            }
            length = candidate;
        }
    }

    /// Computes what it does not reuse; the events of that.
    fn compute(&mut self, prompt: &[u32], hit: usize) -> Vec<KvEvent> {
        let cacheable = prompt.len() - prompt.len() % self.align();
        let mut events = Vec::new();
        for (group, Spec(kind, stride)) in self.specs.clone().into_iter().enumerate() {
            let (first, end) = (hit / stride, cacheable / stride);
            if first >= end {
                continue;
            }
            // A recurrent layer keeps the state behind the last block only, and names that one beside all tokens.
            let kept = if kind == Kind::Mamba { end - 1 } else { first };
            let names: Vec<usize> = (kept..end).map(|i| self.name(&prompt[..(i + 1) * stride])).collect();
            self.copies.extend(names.iter().map(|name| (group, *name)));
            let hash = |name: usize| EngineHash(name as u128);
            let (spec_kind, sliding_window) = match kind {
                Kind::Full => ("full_attention", None),
                Kind::Window(tokens) => ("sliding_window", Some(tokens)),
                Kind::Mamba => ("mamba", None),
            };
            events.push(KvEvent::Stored(Stored {
                parent: (first > 0).then(|| hash(self.name(&prompt[..first * stride]))),
                hashes: names.into_iter().map(hash).collect(),
                token_ids: tokens(&prompt[first * stride..end * stride]),
                block_size: (BLOCK * stride) as u32,
                group_idx: Some(group as i64),
                spec_kind: Some(spec_kind.into()),
                sliding_window,
                ..Stored::default()
            }));
        }
        events
    }
}

fn tokens(prompt: &[u32]) -> Vec<u32> {
    prompt.iter().flat_map(|block| [*block; BLOCK]).collect()
}

#[derive(Clone, Debug)]
enum Work {
    /// A prompt of these blocks and so many tokens more.
    Request(Vec<u32>, usize),
    /// A copy goes.
    Evict(usize),
    Reset,
}

fn any_work() -> impl Strategy<Value = Work> {
    prop_oneof![
        12 => (prop::collection::vec(0..2u32, 1..12), 0..BLOCK).prop_map(|(prompt, more)| Work::Request(prompt, more)),
        16 => (0..200usize).prop_map(Work::Evict),
        1 => Just(Work::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_index_says_what_an_engine_with_cache_groups_reuses(
        choice in 0..CHOICES,
        works in prop::collection::vec(any_work(), 1..60),
    ) {
        let mut engine = Engine { specs: specs(choice), names: Vec::new(), copies: Vec::new() };
        let mut pipeline = Pipeline::new("m", BLOCK as u32, u64::MAX);
        for work in works {
            match work {
                Work::Request(prompt, more) => {
                    let mut text = tokens(&prompt);
                    text.extend(std::iter::repeat_n(9, more));
                    let hit = engine.hit(&prompt, (text.len() - 1) / BLOCK);
                    prop_assert_eq!(pipeline.hit(&text, None), (hit * BLOCK) as u64, "{:?}", prompt);
                    let events = engine.compute(&prompt, hit);
                    pipeline.events(&events);
                }
                Work::Evict(i) if i < engine.copies.len() => {
                    let (group, name) = engine.copies.remove(i);
                    pipeline.events(&[KvEvent::Removed(Removed {
                        hashes: vec![EngineHash(name as u128)],
                        group_idx: Some(group as i64),
                        ..Removed::default()
                    })]);
                }
                Work::Evict(_) => {}
                Work::Reset => {
                    engine.copies.clear();
                    pipeline.events(&[KvEvent::Cleared]);
                }
            }
            let mut distinct = engine.copies.clone();
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(pipeline.blocks(), distinct.len() as u64);
            prop_assert_eq!(pipeline.ignored, 0);
        }
    }
}
