//! Workloads for live servers: prompts of token ids share what their blocks share, and sessions begin when they are due.

use std::sync::Arc;

use baton_sim::SECOND;
use baton_sim::trace::{
    Approximate, Arrival, Content, Context, Conversation, Conversations, First, Generator, Mooncake,
    MultiTurn, MultiTurnOptions, Prompts, Said, Scaled, Shape, When,
};
use proptest::prelude::*;

const ALPHABET: std::ops::Range<u32> = 500..1500;
/// Tokens that are equal by chance: one in a thousand is, so eight in a row never are.
const CHANCE: usize = 8;

fn prompts(block_tokens: u32, seed: u64) -> Prompts {
    Prompts::new(ALPHABET.collect(), block_tokens, seed).expect("a thousand ids are enough")
}

/// A request whose text is made of these pieces.
fn arrival(pieces: &[(u64, u32)], output_tokens: u32, block_tokens: u32) -> Arrival {
    let mut context = Context::new(block_tokens);
    pieces.iter().for_each(|(name, tokens)| context.append(*name, *tokens));
    let prompt_tokens = context.tokens() as u32;
    context.append(u64::MAX, output_tokens);
    Arrival {
        when: When::At(0),
        session: None,
        turn: 0,
        prompt_tokens,
        new_tokens: prompt_tokens,
        output_tokens,
        blocks: context.ids().into(),
    }
}

fn common<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn whole(arrival: &Arrival, block_tokens: u32) -> &[u64] {
    &arrival.blocks[..(arrival.prompt_tokens / block_tokens) as usize]
}

/// Texts of few pieces, so that many begin alike.
fn text() -> impl Strategy<Value = Vec<(u64, u32)>> {
    prop::collection::vec((0..3u64, prop::sample::select(vec![1u32, 7, 16, 40, 100])), 1..8)
}

proptest! {
    #[test]
    fn prompts_are_equal_exactly_as_far_as_their_blocks(
        a in text(), b in text(), output in 1..40u32, block_tokens in prop::sample::select(vec![8u32, 16, 64]), seed in 0..4u64,
    ) {
        let prompts = prompts(block_tokens, seed);
        let (a, b) = (arrival(&a, output, block_tokens), arrival(&b, output, block_tokens));
        let of = |arrival: &Arrival, own| prompts.next(&mut Said::default(), arrival, own).to_vec();
        let (first, second) = (of(&a, 1), of(&b, 2));
        prop_assert_eq!(first.len(), a.prompt_tokens as usize);
        prop_assert!(first.iter().all(|id| ALPHABET.contains(id)));
        let blocks = common(whole(&a, block_tokens), whole(&b, block_tokens));
        let shared = common(&first, &second);
        let least = blocks * block_tokens as usize;
        // Where the shorter one ends with its whole blocks, or in its tail, there is nothing left to differ.
        prop_assert!(shared >= least, "{} tokens of {} blocks", shared, blocks);
        let behind = common(&a.blocks, &b.blocks) > blocks;
        prop_assert!(behind || shared < least + CHANCE, "{} tokens, but only {} blocks are alike", shared, blocks);
        // The same request again is the same, another seed's is not.
        prop_assert_eq!(&of(&a, 1), &first);
        let other = Prompts::new(ALPHABET.collect(), block_tokens, seed + 1).unwrap();
        let other = other.next(&mut Said::default(), &a, 1).to_vec();
        prop_assert!(common(&other, &first) < CHANCE);
    }

    #[test]
    fn a_session_goes_on_from_what_was_answered(
        turns in prop::collection::vec((1..200u32, 1..60u32), 2..6), answered in 0..3u32, seed in 0..4u64,
    ) {
        let (block_tokens, prompts) = (16, prompts(16, seed));
        let mut context = Context::new(block_tokens);
        let mut said = Said::default();
        let mut before: Vec<u32> = Vec::new();
        for (turn, (input, output)) in turns.into_iter().enumerate() {
            context.append(2 * turn as u64, input);
            let prompt_tokens = context.tokens() as u32;
            context.append(2 * turn as u64 + 1, output);
            let arrival = Arrival {
                when: When::After(0), session: Some(1), turn: turn as u32, prompt_tokens,
                new_tokens: input, output_tokens: output, blocks: context.ids().into(),
            };
            let prompt = prompts.next(&mut said, &arrival, turn as u64).to_vec();
            prop_assert_eq!(prompt.len(), prompt_tokens as usize);
            prop_assert_eq!(&prompt[..before.len()], &before[..]);
            // The engine may answer with fewer tokens than the trace, or tell none of them.
            let answer: Vec<u32> = (0..output.min(answered * 20)).map(|at| 10_000 + at).collect();
            said.answered(&answer);
            before = prompt;
            before.extend(answer);
        }
    }

    #[test]
    fn the_rate_changes_when_sessions_begin_and_nothing_else(rate in 0.1..20.0f64, seed in 0..20u64) {
        let recorded = || First::new(Generator::new(Shape::mix(), 2.0, 16, seed), 60);
        let read = |rate: f64| -> Vec<Conversation> {
            Conversations::new(Scaled::new(recorded(), rate), u64::MAX).collect()
        };
        let (plain, scaled) = (read(1.0), read(rate));
        prop_assert_eq!(plain.len(), scaled.len());
        for (plain, scaled) in plain.iter().zip(&scaled) {
            prop_assert!((plain.opens_at as f64 / rate - scaled.opens_at as f64).abs() <= 1.0);
            let asked = |of: &Conversation| -> Vec<_> {
                of.turns.iter().map(|turn| (turn.pause(), turn.arrival.prompt_tokens, Arc::clone(&turn.arrival.blocks))).collect()
            };
            prop_assert_eq!(asked(plain), asked(scaled));
        }
        prop_assert!(scaled.is_sorted_by_key(|conversation| conversation.opens_at));
    }
}

#[test]
fn random_beginnings_are_a_poisson_process_of_their_rate() {
    let rows: String = (0..20_000)
        .map(|at| {
            format!(
                "{{\"timestamp\": {at}, \"input_length\": 5, \"output_length\": 1, \"hash_ids\": [{at}]}}\n"
            )
        })
        .collect();
    let read = |seed: u64| -> Vec<u64> {
        let source = Mooncake::new(rows.as_bytes(), 512);
        Conversations::new(source, u64::MAX)
            .at_random(8.0, seed)
            .map(|conversation| conversation.opens_at)
            .collect()
    };
    let times = read(1);
    assert_eq!(times, read(1));
    assert_ne!(times, read(2));
    let gaps: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]) as f64 / SECOND as f64).collect();
    let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
    let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
    assert!((mean * 8.0 - 1.0).abs() < 0.03, "{mean}");
    // An exponential distribution's deviation is its mean.
    assert!((deviation / mean - 1.0).abs() < 0.03, "{deviation} {mean}");
}

#[test]
fn sessions_are_whole_and_carry_their_text() {
    let rows = r#"{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "two"}, {"role": "assistant", "content": "y"}]}
{"turns": [{"text": "hello", "output_length": 3}, {"text": "and then", "output_length": 3, "delay": 250}]}
{"turns": [{"text": "hello", "output_length": 3}, {"input_length": 9, "output_length": 3}]}
"#;
    let read = |keep_text: bool, most: u64| -> Vec<Conversation> {
        let options = MultiTurnOptions { keep_text, ..Default::default() };
        Conversations::new(MultiTurn::new(rows.as_bytes(), options, Approximate), most).collect()
    };
    let texts = |of: &Conversation| -> Vec<Option<Vec<String>>> {
        let text = |content: &Content| match content {
            Content::Messages(messages) => {
                messages.iter().map(|message| format!("{}: {}", message.role, message.text)).collect()
            }
            Content::Prompt(_) => panic!("a chat has messages"),
        };
        of.turns.iter().map(|turn| turn.content.as_ref().map(text)).collect()
    };
    let says = |text: &str| Some(vec![text.to_owned()]);
    let all = read(true, u64::MAX);
    assert_eq!(texts(&all[0]), [says("user: one"), says("user: two")]);
    assert_eq!(texts(&all[1]), [says("user: hello"), says("user: and then")]);
    assert_eq!(all[1].turns[1].pause(), SECOND / 4);
    // One turn of unknown text makes its session one of lengths.
    assert_eq!(texts(&all[2]), [None, None]);
    assert!(read(false, u64::MAX).iter().all(|conversation| texts(conversation) == [None, None]));
    assert_eq!(read(true, 1).len(), 1);
    assert_eq!(read(true, 3).iter().map(|conversation| conversation.turns.len()).sum::<usize>(), 4);
}

#[test]
fn too_few_token_ids_are_refused() {
    assert!(Prompts::new((0..63).collect(), 16, 1).is_none());
    assert!(Prompts::new(vec![7; 1000], 16, 1).is_none());
    assert!(Prompts::new((0..64).collect(), 0, 1).is_some());
}

#[test]
fn a_session_that_turns_to_something_else_begins_anew() {
    let prompts = prompts(16, 1);
    let mut said = Said::default();
    let first = prompts.next(&mut said, &arrival(&[(1, 100)], 4, 16), 1).to_vec();
    said.answered(&[1, 2, 3, 4]);
    let other = prompts.next(&mut said, &arrival(&[(2, 200)], 4, 16), 2).to_vec();
    assert_eq!(other.len(), 200);
    assert!(common(&first, &other) < CHANCE);
    // Shorter than what was said: as the trace has it.
    let shorter = prompts.next(&mut said, &arrival(&[(2, 90)], 4, 16), 3).to_vec();
    assert_eq!(shorter.len(), 90);
    assert!(common(&shorter, &other) >= 80);
}
