//! What real vLLM said and found, recorded by `make record-events`: before each prompt the index must say what vLLM then found
//! cached.

use std::path::Path;

use baton_e2e::recording::{Recording, Step};

use crate::pipeline::Pipeline;

/// Cases of a recording, and in how many the index was right, over, and over by more than a block.
fn replay(name: &str) -> [usize; 4] {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
    let recording = Recording::read(&path).expect("a recording");
    let block = u64::from(recording.block_size);
    let mut pipeline = Pipeline::new(&recording.model, recording.block_size, recording.num_blocks);
    let [mut cases, mut equal, mut over, mut far] = [0; 4];
    for step in &recording.steps {
        match step {
            Step::Events(payload) => pipeline.batch(payload),
            Step::Prompt { tokens, salt, cached } => {
                let expected = pipeline.hit(tokens, salt.as_deref());
                cases += 1;
                equal += usize::from(expected == *cached);
                over += usize::from(expected > *cached);
                far += usize::from(expected > cached + block);
            }
        }
    }
    assert!(pipeline.blocks() > 0);
    assert_eq!(pipeline.ignored, 0, "events that did not count");
    [cases, equal, over, far]
}

fn check(name: &str) {
    let [cases, equal, over, far] = replay(name);
    assert!(cases >= 100, "{cases} cases");
    assert!(equal * 100 >= cases * 99, "{equal} of {cases} equal, {over} over");
    assert_eq!(far, 0, "over by more than a block");
}

#[test]
fn the_index_says_what_vllm_found_cached() {
    check("full.events");
}

#[test]
fn also_where_layers_see_a_window_only() {
    check("hybrid.events");
}
