//! The scheduler and the model together, in virtual time: whatever is batched, preempted, aborted, shared, held and
//! pulled, every output is what the model says of that prompt alone, and no block is lost.

use std::collections::{BTreeMap, HashMap};

use baton_mock_engine::block_pool::BlockId;
use baton_mock_engine::events::KvEvent;
use baton_mock_engine::hashing::{CacheKeys, EngineHasher};
use baton_mock_engine::kv_memory::{KvMemory, KvShape};
use baton_mock_engine::model::{Chain, Model};
use baton_mock_engine::request::{FinishReason, NewRequest, Output, Stops};
use baton_mock_engine::scheduler::{Scheduler, SchedulerConfig};
use baton_mock_engine::vocabulary::Vocabulary;
use baton_proto::connector::{Hold, Pull, ToAgent};
use baton_proto::ids::{Epoch, TransferId};
use baton_proto::plan::{Action, Source, TransferPlan};
use proptest::prelude::*;

const SIZE: usize = 4;

struct Engine {
    scheduler: Scheduler,
    model: Model,
    vocabulary: Vocabulary,
    pulls: Vec<Pull>,
    holds: Vec<Hold>,
    cancelled: Vec<String>,
    published: BTreeMap<u64, usize>,
    outputs: HashMap<u64, Vec<u32>>,
    finished: Vec<Output>,
}

impl Engine {
    fn new(blocks: u32, max_num_batched_tokens: usize, max_num_seqs: usize) -> Self {
        let shape =
            KvShape { layers: 2, heads: 1, head_bytes: 8, block_size: SIZE as u32, num_blocks: blocks };
        let config = SchedulerConfig {
            block_size: SIZE as u32,
            num_blocks: blocks,
            max_model_len: (blocks as usize - 1) * SIZE,
            max_num_batched_tokens,
            max_num_seqs,
            events: true,
        };
        Self {
            scheduler: Scheduler::new(config, EngineHasher::with_seed(7)),
            model: Model::new(KvMemory::new(shape).unwrap()),
            vocabulary: Vocabulary { printable: (0..500).collect(), eos: None, eos_one_in: 0 },
            pulls: Vec::new(),
            holds: Vec::new(),
            cancelled: Vec::new(),
            published: BTreeMap::new(),
            outputs: HashMap::new(),
            finished: Vec::new(),
        }
    }

    fn add(
        &mut self,
        key: u64,
        prompt: &[u32],
        max_tokens: usize,
        salt: Option<&str>,
        action: Option<Action>,
    ) {
        self.scheduler.add(NewRequest {
            key,
            id: format!("r{key}"),
            prompt: prompt.to_vec(),
            keys: CacheKeys { lora: None, salt: salt.map(str::to_owned) },
            stops: Stops { max_tokens, min_tokens: 0, eos: None, stop_token_ids: vec![] },
            plan: action.map(|action| TransferPlan {
                version: 1,
                transfer_id: TransferId::from_bytes([key as u8; 16]),
                action,
            }),
        });
    }

    /// One step; `false` where there was nothing to do.
    fn step(&mut self) -> bool {
        let (rows, preempted) = self.scheduler.schedule();
        for row in &rows {
            let request = self.scheduler.running_mut(row.running);
            let chain = request.chain_at(row.start);
            let tokens = request.tokens()[row.start..row.start + row.len].to_vec();
            let chain = self.model.compute(request.blocks(), row.start, &tokens, chain).unwrap();
            request.set_chain(row.start + row.len, chain);
        }
        let mut sampled = Vec::new();
        for row in rows.iter().filter(|row| row.samples) {
            let request = &self.scheduler.running()[row.running];
            let digest = self.model.digest(request.blocks(), request.tokens().len()).unwrap();
            sampled.push(self.vocabulary.next(digest, request));
        }
        for output in self.scheduler.complete(&rows, sampled) {
            self.outputs.entry(output.key).or_default().push(output.token);
            if output.finish.is_some() {
                self.finished.push(output);
            }
        }
        self.collect();
        !rows.is_empty() || preempted > 0
    }

    fn collect(&mut self) {
        for message in self.scheduler.take_messages() {
            match message {
                ToAgent::Pull(pull) => self.pulls.push(pull),
                ToAgent::Hold(hold) => self.holds.push(hold),
                ToAgent::Computed(more) => {
                    let hold = self.holds.iter_mut().find(|hold| hold.request_id == more.request_id);
                    let hold = hold.expect("it is held");
                    assert_eq!(more.first_block as usize, hold.block_ids.len());
                    hold.block_ids.extend(more.block_ids);
                }
                ToAgent::Cancel { request_id } => self.cancelled.push(request_id),
                other => panic!("{other:?}"),
            }
        }
        for event in self.scheduler.take_events() {
            match event {
                KvEvent::Stored(stored) => {
                    assert_eq!(stored.token_ids.len(), stored.block_hashes.len() * SIZE);
                    assert_eq!(stored.extra_keys.len(), stored.block_hashes.len());
                    // A parent is cached, now or a moment ago: its blocks are referenced by the same request.
                    if let Some(parent) = stored.parent_block_hash {
                        assert!(self.published.contains_key(&parent));
                    }
                    for hash in stored.block_hashes {
                        *self.published.entry(hash).or_default() += 1;
                    }
                }
                KvEvent::Removed { block_hash } => {
                    let count = self.published.get_mut(&block_hash).expect("stored before");
                    *count -= 1;
                    if *count == 0 {
                        self.published.remove(&block_hash);
                    }
                }
                KvEvent::Cleared => self.published.clear(),
            }
        }
        self.check();
    }

    /// No block is lost or counted twice, none that is held is free, and the events say what is cached.
    fn check(&self) {
        let pool = self.scheduler.pool();
        let held = self.holds.iter().flat_map(|hold| &hold.block_ids);
        assert!(held.into_iter().all(|id| pool.references(*id) > 0), "a held block is free");
        let mut references: HashMap<BlockId, u32> = HashMap::new();
        for blocks in self.scheduler.block_users() {
            for id in blocks {
                *references.entry(*id).or_default() += 1;
            }
        }
        for id in 1..=pool.capacity() as BlockId {
            assert_eq!(pool.references(id), references.get(&id).copied().unwrap_or(0), "block {id}");
        }
        let free: std::collections::BTreeSet<_> = pool.free_queue().collect();
        assert_eq!(free.len(), pool.num_free());
        assert_eq!(free.len() + references.len(), pool.capacity());
        assert!(references.keys().all(|id| !free.contains(id)));
        let mut cached: BTreeMap<u64, usize> = BTreeMap::new();
        for (_, hash) in pool.cached_blocks() {
            *cached.entry(hash.external()).or_default() += 1;
        }
        assert_eq!(self.published, cached);
    }

    /// Ends a pull as an agent would: writes what a remote engine holds, but for the blocks from `failed` on.
    fn end_pull(&mut self, at: usize, failed: Option<usize>) {
        let pull = self.pulls.swap_remove(at);
        let tokens = pull.content.token_ids().unwrap();
        let first = pull.first_block as usize;
        assert_eq!(pull.block_ids.len(), tokens.len().div_ceil(SIZE) - first);
        let mut blocks = vec![0; first];
        blocks.extend(&pull.block_ids);
        let chain = Chain::START.then_all(&tokens[..first * SIZE]);
        self.model.compute(&blocks, first * SIZE, &tokens[first * SIZE..], chain).unwrap();
        let failed: Vec<BlockId> = failed.map_or(vec![], |failed| {
            let failed = failed % pull.block_ids.len();
            for id in &pull.block_ids[failed..] {
                let garbage = vec![0xa5; 2 * self.model.memory().shape().piece_bytes()];
                (0..2).for_each(|layer| self.model.memory().write_blocks(layer, *id, &garbage).unwrap());
            }
            // The first failed block is enough: nothing behind it is used.
            pull.block_ids[failed..=failed].to_vec()
        });
        let error = if failed.is_empty() { "" } else { "corrupt" };
        self.scheduler.pull_done(&pull.request_id, &failed, error);
        self.collect();
    }
}

/// What the model says of a prompt alone.
fn reference(prompt: &[u32], outputs: usize) -> Vec<u32> {
    let mut engine = Engine::new(200, 1000, 1);
    engine.add(0, prompt, outputs, None, None);
    while engine.step() {}
    engine.outputs.remove(&0).unwrap()
}

fn source() -> Source {
    Source { engine_id: "p0".parse().unwrap(), address: "127.0.0.1:1".into(), epoch: Epoch(5) }
}

fn pull(num_tokens: usize) -> Action {
    Action::Pull { source: source(), num_tokens: num_tokens as u32, deadline_ms: 1000 }
}

#[derive(Clone, Debug)]
enum Event {
    /// Prompt from one of a few conversations, its length, outputs, salt, and what the plan says.
    Add {
        conversation: u8,
        len: usize,
        outputs: usize,
        salt: bool,
        plan: u8,
    },
    Steps(usize),
    Abort(usize),
    EndPull {
        which: usize,
        failed: Option<usize>,
    },
    Release(usize),
    AgentLost,
    AgentBack,
    Reset(bool),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        8 => (0u8..3, 1usize..40, 1usize..8, prop::bool::weighted(0.2), 0u8..5).prop_map(
            |(conversation, len, outputs, salt, plan)| Event::Add { conversation, len, outputs, salt, plan }
        ),
        8 => (1usize..6).prop_map(Event::Steps),
        2 => any::<usize>().prop_map(Event::Abort),
        5 => (any::<usize>(), prop::option::weighted(0.4, any::<usize>()))
            .prop_map(|(which, failed)| Event::EndPull { which, failed }),
        3 => any::<usize>().prop_map(Event::Release),
        1 => Just(Event::AgentLost),
        2 => Just(Event::AgentBack),
        1 => any::<bool>().prop_map(Event::Reset),
    ];
    prop::collection::vec(event, 1..60)
}

fn prompt(conversation: u8, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| i * 31 + u32::from(conversation) * 7 % 500).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(250))]

    #[test]
    fn every_output_is_right_and_every_block_comes_back(
        events in events(),
        blocks in 14u32..40,
        budget in 1usize..30,
        seqs in 1usize..6,
    ) {
        let mut engine = Engine::new(blocks, budget, seqs);
        let mut epoch = 1;
        engine.scheduler.connector_up(Epoch(epoch));
        let mut requests: HashMap<u64, (Vec<u32>, usize)> = HashMap::new();
        let mut aborted = Vec::new();
        for event in events {
            match event {
                Event::Add { conversation, len, outputs, salt, plan } => {
                    let key = requests.len() as u64;
                    let prompt = prompt(conversation, len);
                    let action = match plan {
                        0 => Some(Action::Hold { lease_ms: 1000 }),
                        1 => Some(pull(prompt.len())),
                        2 => Some(pull(prompt.len() + 1)),
                        3 => Some(pull((prompt.len() - 1) / SIZE * SIZE)),
                        _ => None,
                    };
                    engine.add(key, &prompt, outputs, salt.then_some("s"), action);
                    requests.insert(key, (prompt, outputs));
                }
                Event::Steps(count) => (0..count).for_each(|_| { engine.step(); }),
                Event::Abort(which) if !requests.is_empty() => {
                    let key = (which % requests.len()) as u64;
                    engine.scheduler.abort(key);
                    engine.collect();
                    aborted.push(key);
                }
                Event::EndPull { which, failed } if !engine.pulls.is_empty() => {
                    engine.end_pull(which % engine.pulls.len(), failed);
                }
                Event::Release(which) if !engine.holds.is_empty() => {
                    let hold = engine.holds.swap_remove(which % engine.holds.len());
                    engine.scheduler.released([hold.request_id.as_str()]);
                    engine.collect();
                }
                Event::AgentLost => {
                    engine.scheduler.connector_down();
                    engine.pulls.clear();
                    engine.holds.clear();
                    engine.collect();
                }
                Event::AgentBack => {
                    epoch += 1;
                    engine.scheduler.connector_up(Epoch(epoch));
                }
                Event::Reset(preempt) => {
                    engine.scheduler.reset_prefix_cache(preempt);
                    engine.collect();
                }
                Event::Abort(_) | Event::EndPull { .. } | Event::Release(_) => {}
            }
        }
        // Then everything ends.
        for _ in 0..10_000 {
            while let Some(hold) = engine.holds.pop() {
                engine.scheduler.released([hold.request_id.as_str()]);
            }
            while !engine.pulls.is_empty() {
                engine.end_pull(0, None);
            }
            if !engine.step() && engine.pulls.is_empty() && engine.holds.is_empty() {
                break;
            }
        }
        prop_assert!(!engine.scheduler.has_work());
        prop_assert_eq!(engine.scheduler.pool().num_free(), engine.scheduler.pool().capacity());
        for (key, (prompt, outputs)) in &requests {
            let expected = reference(prompt, *outputs);
            let got = engine.outputs.remove(key).unwrap_or_default();
            if aborted.contains(key) {
                prop_assert_eq!(&expected[..got.len()], &got[..]);
            } else {
                prop_assert_eq!(expected, got);
            }
        }
        prop_assert!(engine.scheduler.reset_prefix_cache(false));
    }
}

#[test]
fn a_prompt_is_computed_in_chunks_beside_decodes() {
    let mut engine = Engine::new(40, 8, 4);
    engine.add(0, &prompt(0, 3), 6, None, None);
    engine.step();
    engine.add(1, &prompt(1, 20), 2, None, None);
    let rows = |engine: &mut Engine| {
        let (rows, _) = engine.scheduler.schedule();
        let sampled = vec![1; rows.iter().filter(|row| row.samples).count()];
        engine.scheduler.complete(&rows, sampled);
        rows.iter().map(|row| (row.start, row.len, row.samples)).collect::<Vec<_>>()
    };
    assert_eq!(rows(&mut engine), [(3, 1, true), (0, 7, false)]);
    assert_eq!(rows(&mut engine), [(4, 1, true), (7, 7, false)]);
    assert_eq!(rows(&mut engine), [(5, 1, true), (14, 6, true)]);
    assert_eq!(rows(&mut engine), [(6, 1, true), (20, 1, true)]);
}

#[test]
fn a_repeated_prompt_computes_its_last_block_only() {
    let mut engine = Engine::new(40, 100, 4);
    for key in 0..2 {
        engine.add(key, &prompt(0, 16), 1, None, None);
        while engine.step() {}
    }
    // A block is never taken whole where the prompt ends with it: the last token has to be computed.
    let stats = engine.scheduler.stats();
    assert_eq!((stats.queries, stats.hits), (32, 12));
    engine.add(2, &prompt(0, 16), 1, Some("other tenant"), None);
    while engine.step() {}
    assert_eq!(engine.scheduler.stats().hits, 12);
    assert_eq!(engine.outputs[&0], engine.outputs[&2]);
}

#[test]
fn the_youngest_is_preempted_and_catches_up() {
    let mut engine = Engine::new(9, 100, 4);
    engine.add(0, &prompt(0, 14), 10, None, None);
    engine.add(1, &prompt(1, 14), 10, None, None);
    while engine.step() {}
    assert!(engine.scheduler.stats().preemptions > 0);
    assert_eq!(engine.outputs[&0], reference(&prompt(0, 14), 10));
    assert_eq!(engine.outputs[&1], reference(&prompt(1, 14), 10));
    assert_eq!(engine.finished.iter().map(|output| output.key).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn a_hold_keeps_the_prompts_blocks_until_released() {
    let mut engine = Engine::new(40, 100, 4);
    engine.scheduler.connector_up(Epoch(9));
    engine.add(3, &prompt(0, 18), 1, Some("s"), Some(Action::Hold { lease_ms: 500 }));
    engine.step();
    let finish = engine.finished[0].finish.clone().unwrap();
    assert_eq!(finish.reason, FinishReason::Length);
    let held = finish.held.unwrap();
    assert_eq!((held.epoch, held.num_tokens), (Epoch(9), 18));
    let hold = &engine.holds[0];
    assert_eq!((hold.request_id.as_str(), hold.lease_ms, hold.block_ids.len()), ("r3", 500, 5));
    assert_eq!(hold.transfer_id, held.transfer_id);
    assert_eq!(hold.content.token_ids().unwrap(), prompt(0, 18));
    assert_eq!(hold.content.keys.salt.as_deref(), Some("s"));
    let pool = engine.scheduler.pool();
    assert_eq!(pool.capacity() - pool.num_free(), 5);
    engine.scheduler.released(["r3", "unknown"]);
    assert_eq!(engine.scheduler.pool().num_free(), engine.scheduler.pool().capacity());
}

#[test]
fn a_prompt_of_several_steps_is_held_as_it_is_computed() {
    let mut engine = Engine::new(40, 8, 4);
    engine.scheduler.connector_up(Epoch(9));
    engine.add(3, &prompt(0, 18), 1, None, Some(Action::Hold { lease_ms: 500 }));
    for blocks in [2, 4, 5] {
        engine.step();
        assert_eq!(engine.holds[0].block_ids.len(), blocks);
    }
    assert_eq!(engine.holds[0].content.token_ids().unwrap(), prompt(0, 18));
    let held = engine.finished[0].finish.clone().unwrap().held.unwrap();
    assert_eq!((held.epoch, held.num_tokens, engine.holds.len()), (Epoch(9), 18, 1));
    engine.scheduler.released(["r3"]);
    assert_eq!(engine.scheduler.pool().num_free(), engine.scheduler.pool().capacity());
}

#[test]
fn what_is_held_of_an_aborted_prompt_stays_until_released() {
    let mut engine = Engine::new(40, 8, 4);
    engine.scheduler.connector_up(Epoch(9));
    engine.add(3, &prompt(0, 18), 1, None, Some(Action::Hold { lease_ms: 500 }));
    engine.step();
    engine.scheduler.abort(3);
    engine.collect();
    assert_eq!(engine.cancelled, ["r3"]);
    let pool = engine.scheduler.pool();
    assert_eq!(pool.capacity() - pool.num_free(), 2);
    engine.scheduler.released(["r3"]);
    assert_eq!(engine.scheduler.pool().num_free(), engine.scheduler.pool().capacity());
}

#[test]
fn a_hold_that_ends_early_is_not_claimed_in_the_end() {
    let mut engine = Engine::new(40, 8, 4);
    engine.scheduler.connector_up(Epoch(9));
    engine.add(3, &prompt(0, 18), 1, None, Some(Action::Hold { lease_ms: 500 }));
    engine.step();
    engine.scheduler.released(["r3"]);
    engine.holds.clear();
    while engine.step() {}
    assert_eq!(engine.finished[0].finish.clone().unwrap().held, None);
    assert_eq!(engine.scheduler.pool().num_free(), engine.scheduler.pool().capacity());
}

#[test]
fn without_an_agent_plans_are_not_followed() {
    let mut engine = Engine::new(40, 100, 4);
    engine.add(0, &prompt(0, 18), 1, None, Some(Action::Hold { lease_ms: 500 }));
    engine.add(1, &prompt(1, 18), 1, None, Some(pull(18)));
    while engine.step() {}
    assert!(engine.finished.iter().all(|output| output.finish.as_ref().unwrap().held.is_none()));
    assert_eq!(engine.finished.len(), 2);
    assert!(engine.pulls.is_empty() && engine.holds.is_empty());
    assert_eq!(engine.scheduler.stats().external_queries, 0);
}

#[test]
fn a_pull_leaves_one_token_to_compute_and_is_cached() {
    let mut engine = Engine::new(40, 100, 4);
    engine.scheduler.connector_up(Epoch(1));
    engine.add(0, &prompt(0, 8), 1, None, None);
    engine.step();
    engine.add(1, &prompt(0, 18), 3, None, Some(pull(18)));
    assert!(!engine.step());
    assert_eq!(engine.scheduler.stats().pulling, 1);
    assert_eq!((engine.pulls[0].first_block, engine.pulls[0].block_ids.len()), (2, 3));
    engine.end_pull(0, None);
    let (rows, _) = engine.scheduler.schedule();
    assert_eq!((rows.len(), rows[0].start, rows[0].len), (1, 17, 1));
    engine.scheduler.complete(&rows, [1]);
    let stats = engine.scheduler.stats();
    assert_eq!((stats.hits, stats.external_queries, stats.external_hits), (8, 18, 10));
}

#[test]
fn a_pull_of_whole_blocks_leaves_the_rest_to_compute() {
    let mut engine = Engine::new(40, 100, 4);
    engine.scheduler.connector_up(Epoch(1));
    engine.add(0, &prompt(0, 4), 1, None, None);
    engine.step();
    engine.add(1, &prompt(0, 18), 3, None, Some(pull(12)));
    assert!(!engine.step());
    assert_eq!((engine.pulls[0].first_block, engine.pulls[0].block_ids.len()), (1, 2));
    assert_eq!(engine.pulls[0].content.token_ids().unwrap(), prompt(0, 12));
    engine.end_pull(0, None);
    while engine.step() {}
    assert_eq!(engine.outputs[&1], reference(&prompt(0, 18), 3));
    let stats = engine.scheduler.stats();
    assert_eq!((stats.hits, stats.external_hits), (4, 8));
    // Whole blocks only: nothing else says where a part of one ends.
    for (key, tokens) in [(2, 13), (3, 20)] {
        engine.add(key, &prompt(key as u8, 18), 1, None, Some(pull(tokens)));
        engine.step();
    }
    assert!(engine.pulls.is_empty());
}

#[test]
fn a_failed_pull_is_computed_from_its_first_failed_block() {
    for (failed, start) in [(0, 0), (1, 4), (3, 12)] {
        let mut engine = Engine::new(40, 100, 4);
        engine.scheduler.connector_up(Epoch(1));
        engine.add(0, &prompt(0, 18), 3, None, Some(pull(18)));
        assert!(!engine.step());
        engine.end_pull(0, Some(failed));
        let (rows, _) = engine.scheduler.schedule();
        assert_eq!((rows.len(), rows[0].start, rows[0].len), (1, start, 18 - start));
    }
}

#[test]
fn an_error_without_failed_blocks_fails_them_all() {
    let mut engine = Engine::new(40, 100, 4);
    engine.scheduler.connector_up(Epoch(1));
    engine.add(0, &prompt(0, 18), 3, None, Some(pull(18)));
    engine.step();
    engine.scheduler.pull_done("r0", &[], "deadline");
    let (rows, _) = engine.scheduler.schedule();
    assert_eq!((rows[0].start, rows[0].len), (0, 18));
}

#[test]
fn a_pull_of_less_than_a_block_is_not_worth_it() {
    let mut engine = Engine::new(40, 100, 4);
    engine.scheduler.connector_up(Epoch(1));
    for key in 0..2 {
        engine.add(key, &prompt(0, 12), 1, None, Some(pull(12)));
        engine.step();
        if key == 0 {
            engine.end_pull(0, None);
            engine.step();
        }
    }
    assert!(engine.pulls.is_empty());
    assert_eq!(engine.finished.len(), 2);
}

#[test]
fn blocks_of_an_aborted_pull_stay_until_it_is_over() {
    let mut engine = Engine::new(40, 100, 4);
    engine.scheduler.connector_up(Epoch(1));
    engine.add(0, &prompt(0, 18), 3, None, Some(pull(18)));
    engine.step();
    engine.scheduler.abort(0);
    engine.collect();
    assert_eq!(engine.cancelled, ["r0"]);
    let pool = engine.scheduler.pool();
    assert_eq!(pool.capacity() - pool.num_free(), 5);
    engine.end_pull(0, None);
    assert_eq!(engine.scheduler.pool().num_free(), engine.scheduler.pool().capacity());
    assert!(!engine.scheduler.has_work());
}

#[test]
fn a_lost_agent_fails_pulls_and_releases_holds() {
    let mut engine = Engine::new(40, 100, 4);
    engine.scheduler.connector_up(Epoch(1));
    engine.add(0, &prompt(0, 10), 1, None, Some(Action::Hold { lease_ms: 500 }));
    engine.step();
    engine.add(1, &prompt(1, 18), 1, None, Some(pull(18)));
    engine.add(2, &prompt(2, 18), 1, None, Some(pull(18)));
    engine.step();
    engine.scheduler.abort(2);
    engine.scheduler.connector_down();
    engine.holds.clear();
    engine.collect();
    let pool = engine.scheduler.pool();
    assert_eq!(pool.num_free(), pool.capacity());
    while engine.step() {}
    assert_eq!(engine.outputs[&1], reference(&prompt(1, 18), 1));
}
