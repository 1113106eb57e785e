//! The block pool against a model that is slow and plain.

use std::collections::BTreeSet;

use baton_sim::engine::events::{Change, Tier};
use baton_sim::engine::pool::BlockPool;
use proptest::prelude::*;

/// Blocks as a list, the free ones as another; everything is searched.
struct Model {
    contents: Vec<u64>,
    references: Vec<u32>,
    free: Vec<u32>,
}

impl Model {
    fn holds(&self, id: u64) -> bool {
        self.contents.contains(&id)
    }

    fn cached(&self) -> BTreeSet<u64> {
        self.contents.iter().copied().filter(|id| *id != 0).collect()
    }

    fn hits(&self, ids: &[u64]) -> usize {
        ids.iter().take_while(|id| self.holds(**id)).count()
    }
}

#[derive(Clone, Debug)]
enum Action {
    /// A prompt: which family, how long.
    Begin(u64, usize),
    /// The oldest but so many of the sequences ends.
    End(usize),
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let begin = (0..4u64, 1..12usize).prop_map(|(family, length)| Action::Begin(family, length));
    let end = (0..8usize).prop_map(Action::End);
    proptest::collection::vec(prop_oneof![3 => begin, 2 => end], 1..120)
}

/// Prompts of a family share a beginning of four blocks with the others, and all else among themselves.
fn ids(family: u64, length: usize) -> Vec<u64> {
    (0..length as u64).map(|at| if at < 4 { 1 + at } else { 100 * (family + 1) + at }).collect()
}

/// Ids, blocks in the pool, blocks in the model, leading blocks that are published.
type Sequence = (Vec<u64>, Vec<u32>, Vec<u32>, usize);

proptest! {
    #[test]
    fn pool_equals_model(actions in actions(), publish_late in any::<bool>()) {
        const BLOCKS: u32 = 24;
        let mut pool = BlockPool::new(BLOCKS, true);
        let mut model = Model {
            contents: vec![0; BLOCKS as usize],
            references: vec![0; BLOCKS as usize],
            free: (0..BLOCKS).collect(),
        };
        let mut live: Vec<Sequence> = Vec::new();
        let mut told: BTreeSet<u64> = BTreeSet::new();
        let publish = |pool: &mut BlockPool, model: &mut Model, sequence: &mut Sequence| {
            while sequence.3 < sequence.0.len() {
                let at = sequence.3;
                pool.publish(sequence.1[at], at.checked_sub(1).map(|at| sequence.0[at]), sequence.0[at]);
                model.contents[sequence.2[at] as usize] = sequence.0[at];
                sequence.3 += 1;
            }
        };
        for action in actions {
            match action {
                Action::Begin(family, length) => {
                    let ids = ids(family, length);
                    let hits = pool.hits(&ids);
                    prop_assert_eq!(hits, model.hits(&ids));
                    let is_free = |id: &&u64| {
                        let at = model.contents.iter().position(|content| content == *id);
                        at.is_some_and(|at| model.references[at] == 0)
                    };
                    // Twins: the pool uses the one published first, which the model cannot tell; it only counts where there are none.
                    let twins = |id: &u64| model.contents.iter().filter(|content| *content == id).count() > 1;
                    if !ids[..hits].iter().any(twins) {
                        prop_assert_eq!(pool.free_among(&ids[..hits]) as usize, ids[..hits].iter().filter(is_free).count());
                    }
                    let free_among = pool.free_among(&ids[..hits]);
                    let fresh = (length - hits) as u32;
                    if fresh + free_among > pool.free() {
                        continue;
                    }
                    let (mut blocks, mut modelled) = (Vec::new(), Vec::new());
                    pool.share(&ids[..hits], &mut blocks);
                    prop_assert!(pool.allocate(fresh, &mut blocks));
                    // The model names blocks like the pool, so that it need not know which twin was taken.
                    for (at, block) in blocks.iter().enumerate() {
                        let block = *block as usize;
                        if at < hits {
                            prop_assert_eq!(model.contents[block], ids[at]);
                            model.free.retain(|other| *other as usize != block);
                        } else {
                            // The one that became free first.
                            prop_assert_eq!(model.free.first(), Some(&(block as u32)));
                            model.free.remove(0);
                            model.contents[block] = 0;
                        }
                        model.references[block] += 1;
                        modelled.push(block as u32);
                    }
                    let mut sequence = (ids, blocks, modelled, hits);
                    if !publish_late {
                        publish(&mut pool, &mut model, &mut sequence);
                    }
                    live.push(sequence);
                }
                Action::End(back) => {
                    if live.is_empty() {
                        continue;
                    }
                    let mut sequence = live.remove(back.min(live.len() - 1));
                    publish(&mut pool, &mut model, &mut sequence);
                    pool.release(&sequence.1);
                    for block in sequence.2.iter().rev() {
                        model.references[*block as usize] -= 1;
                        if model.references[*block as usize] == 0 {
                            model.free.push(*block);
                        }
                    }
                }
            }
            prop_assert_eq!(pool.free() as usize, model.free.len());
            if let Some(events) = pool.take_events() {
                for (change, ids) in events.iter() {
                    for id in ids {
                        match change {
                            Change::Stored { .. } => prop_assert!(told.insert(*id), "stored twice"),
                            Change::Removed { .. } => prop_assert!(told.remove(id), "removed twice"),
                        }
                    }
                }
            }
            prop_assert_eq!(&told, &model.cached());
        }
    }
}

#[test]
fn stored_runs_name_their_parents() {
    let mut pool = BlockPool::new(8, true);
    let mut blocks = Vec::new();
    assert!(pool.allocate(4, &mut blocks));
    pool.publish(blocks[0], None, 10);
    pool.publish(blocks[1], Some(10), 11);
    pool.publish(blocks[2], Some(10), 12);
    let events = pool.take_events().expect("something was stored");
    let runs: Vec<(Change, Vec<u64>)> = events.iter().map(|(change, ids)| (change, ids.to_vec())).collect();
    let expected = [
        (Change::Stored { tier: Tier::Gpu, parent: None }, vec![10, 11]),
        (Change::Stored { tier: Tier::Gpu, parent: Some(10) }, vec![12]),
    ];
    assert_eq!(runs, expected);
    pool.release(&blocks);
    assert!(pool.allocate(8, &mut Vec::new()));
    let events = pool.take_events().expect("something was removed");
    // The leaves of a sequence go before its root.
    assert_eq!(events.iter().collect::<Vec<_>>(), [(Change::Removed { tier: Tier::Gpu }, &[12, 11, 10][..])]);
}
