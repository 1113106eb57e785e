//! Readers, on small files of their own. Checks on recorded traces run where `BATON_TRACES` names a folder that has them.

#![allow(clippy::print_stdout, reason = "a test that fails shows the figures beside each other")]

use std::io::Write;

use baton_sim::trace::{
    Approximate, Arrival, Azure, First, Generator, Mooncake, MultiTurn, MultiTurnOptions, Scaled, Sessions,
    SessionsOptions, Shape, Source, When,
};
use baton_sim::{MILLISECOND, SECOND};

fn all(source: &mut dyn Source) -> Vec<Arrival> {
    std::iter::from_fn(|| source.open()).collect()
}

fn faults(source: &dyn Source) -> Vec<String> {
    source.rows().first_bad.iter().map(ToString::to_string).collect()
}

#[test]
fn mooncake() {
    let text = r#"{"timestamp": 0, "input_length": 1100, "output_length": 500, "hash_ids": [7, 8, 9]}
{"timestamp": 1500, "input_length": 1024, "output_length": 3, "hash_ids": [7, 8]}

{"timestamp": 2000, "input_length": 1024, "output_length": 3, "hash_ids": [7]}
{"timestamp": 2000, "input_length": -3, "output_length": 3, "hash_ids": [7]}
{"timestamp": "x", "input_length": 5, "output_length": 3, "hash_ids": [7]}
{"input_length": 5, "output_length": 3, "hash_ids": [7]}
{"timestamp": 1000, "input_length": 5, "output_length": 0, "hash_ids": ["a"]}
not json
[1]
{"timestamp": 1400, "input_length": 600, "output_length": 0, "hash_ids": [70, 8]}"#;
    let mut source = Mooncake::new(text.as_bytes(), 512);
    let found = all(&mut source);
    let times: Vec<When> = found.iter().map(|arrival| arrival.when).collect();
    // The last row lies before one above it.
    assert_eq!(times, [0, 1500, 1500].map(|ms| When::At(ms * MILLISECOND)));
    let (a, b, c) = (&found[0], &found[1], &found[2]);
    assert_eq!((a.prompt_tokens, a.output_tokens, a.blocks.len()), (1100, 500, 3));
    assert_eq!((b.blocks.len(), c.blocks.len(), c.output_tokens), (2, 1, 1));
    assert_eq!(a.blocks[..2], b.blocks[..]);
    // The same content after other content is another block.
    assert_ne!(c.blocks[0], a.blocks[0]);
    assert_eq!((source.rows().good, source.rows().bad, source.rows().late), (3, 7, 1));
    let faults = faults(&source);
    assert_eq!(faults[0], "line 4: hash_ids: 1 ids, but 1024 tokens make 2 blocks of 512");
    assert!(faults[1].starts_with("line 5: input_length: "), "{}", faults[1]);
    assert_eq!(faults[2], "line 6: timestamp: a string, but a number is expected");
    assert_eq!(faults[3], "line 7: timestamp: is missing");
    assert_eq!(faults[4], "line 8: hash_ids: a string, but a whole number is expected");
    assert!(faults[5].starts_with("line 9: not JSON"), "{}", faults[5]);
    assert_eq!(faults[6], "line 10: a list, but a row is an object");
}

#[test]
fn mooncake_in_smaller_blocks_finds_the_same() {
    let text = r#"{"timestamp": 0, "input_length": 1100, "output_length": 100, "hash_ids": [7, 8, 9]}
{"timestamp": 1, "input_length": 1500, "output_length": 100, "hash_ids": [7, 8, 11]}
{"timestamp": 2, "input_length": 1100, "output_length": 100, "hash_ids": [7, 8, 9]}"#;
    let found = all(&mut Mooncake::new(text.as_bytes(), 16));
    let alike =
        |a: &Arrival, b: &Arrival| a.blocks.iter().zip(&*b.blocks).take_while(|(a, b)| a == b).count();
    assert_eq!(found[0].blocks.len(), 75);
    assert_eq!(alike(&found[0], &found[1]), 64);
    // The whole blocks of the last, partial one too; not what was generated.
    assert_eq!(alike(&found[0], &found[2]), 68);
    let mut distinct: Vec<u64> = found[0].blocks.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), 75);
}

#[test]
fn azure() {
    let text = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.9799600,4808,10\r\n\
        2023-11-16 18:17:04.0319600,3180,8\r\nyesterday,1,2\r\n2023-11-16 18:17:05,many,2\r\n2023-11-16 18:17:05,1\r\n";
    let mut source = Azure::new(text.as_bytes(), 16);
    let found = all(&mut source);
    assert_eq!(found.len(), 2);
    assert_eq!((found[0].when, found[1].when), (When::At(0), When::At(52 * MILLISECOND)));
    assert_eq!((found[0].prompt_tokens, found[0].output_tokens, found[0].blocks.len()), (4808, 10, 301));
    assert!(found[0].blocks.iter().all(|block| !found[1].blocks.contains(block)));
    let faults = faults(&source);
    assert!(faults[0].starts_with("line 4: TIMESTAMP: `yesterday` is no time"), "{}", faults[0]);
    assert!(faults[1].starts_with("line 5: ContextTokens: `many`"), "{}", faults[1]);
    assert_eq!(faults[2], "line 6: GeneratedTokens: is missing");
    let mut headless = Azure::new("1,2,3\n".as_bytes(), 16);
    assert_eq!(all(&mut headless), []);
    assert_eq!(
        faults_of_first(&headless),
        "line 1: TIMESTAMP: the header has no such column; nothing can be read"
    );
}

fn faults_of_first(source: &dyn Source) -> String {
    faults(source).remove(0)
}

#[test]
fn sessions_in_any_order() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| {
        let mut file = std::fs::File::create(folder.path().join(name)).expect("a file");
        file.write_all(text.as_bytes()).expect("it is written");
    };
    let task =
        "Fix the bug in the parser, please, and add a test for it. Then run all tests again. ".repeat(4);
    let row = |at: u64, session: &str, input: &str| {
        serde_json::json!({"timestamp": at, "session_id": session, "input": input, "output": "let me look at it"}).to_string()
    };
    let second = format!("{task}\nthe output of the tool");
    write("b.jsonl", &format!("{}\n{}\n", row(9_000_000, "x", &second), row(1_000_000, "x", &task)));
    write("a.jsonl", &format!("{}\n{{\"timestamp\": 5}}\nbroken\n", row(4_000_000, "y", &task)));
    write("notes.txt", "nothing");
    let mut source =
        Sessions::open(folder.path(), SessionsOptions::default(), Approximate).expect("it can be read");
    let first = source.open().expect("x begins first");
    let other = source.open().expect("then y");
    assert_eq!((first.when, other.when), (When::At(0), When::At(3 * SECOND)));
    assert_eq!(source.open(), None);
    assert_ne!(first.session, other.session);
    let later = source.follow(first.session.expect("a session")).expect("another turn");
    assert_eq!(later.turn, 1);
    // The gap of 8 s, less what the first answer took to generate.
    assert_eq!(later.when, When::After(8 * SECOND - u64::from(first.output_tokens) * 20 * MILLISECOND));
    assert_eq!(later.new_tokens, later.prompt_tokens - first.prompt_tokens);
    let shared = (first.prompt_tokens / 16) as usize;
    assert!(shared > 3);
    assert_eq!(first.blocks[..shared], later.blocks[..shared]);
    assert_eq!(first.blocks[..shared], other.blocks[..shared]);
    assert_eq!(source.follow(first.session.expect("a session")), None);
    assert_eq!((source.rows().good, source.rows().bad), (3, 2));
    assert_eq!(faults(&source)[0], "line 2: input: is missing");
    let empty = tempfile::tempdir().expect("a folder");
    assert!(Sessions::open(empty.path(), SessionsOptions::default(), Approximate).is_err());
}

#[test]
fn turns_with_delays() {
    let text = r#"{"session_id": "a", "timestamp": 1000, "turns": [{"input_length": 40, "output_length": 24}, {"input_length": 10, "delay": 2500}]}
{"session_id": "b", "timestamp": 3000, "turns": [{"text": "one two three four", "output_length": 5}]}
{"id": 3, "timestamp": 3000, "messages": [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}, {"role": "user", "content": "four", "delay": 100}, {"role": "assistant", "content": "five six"}]}
{"session_id": "c", "turns": [{"output_length": 5}]}
{"session_id": "d", "turns": [{"input_length": 5, "delay": "soon"}]}
{"session_id": "e", "turns": []}
{"id": 4, "messages": [{"role": "user"}]}"#;
    let mut source = MultiTurn::new(
        text.as_bytes(),
        MultiTurnOptions { block_tokens: 8, ..Default::default() },
        Approximate,
    );
    let found = all(&mut source);
    let times: Vec<When> = found.iter().map(|arrival| arrival.when).collect();
    assert_eq!(times, [0, 2, 2].map(|at| When::At(at * SECOND)));
    let later = source.follow(0).expect("a second turn");
    assert_eq!((later.when, later.turn), (When::After(2500 * MILLISECOND), 1));
    // What was generated is a part of the next prompt.
    assert_eq!((later.prompt_tokens, later.new_tokens, later.output_tokens), (40 + 24 + 10, 10, 128));
    assert_eq!(found[0].blocks[..8], later.blocks[..8]);
    assert_eq!((found[1].prompt_tokens, found[1].output_tokens), (4, 5));
    let message = source.follow(2).expect("a second answer");
    assert_eq!(
        (message.prompt_tokens, message.output_tokens, message.when),
        (4, 2, When::After(100 * MILLISECOND))
    );
    assert_eq!((source.follow(0), source.follow(1), source.follow(2)), (None, None, None));
    let expected = [
        "line 4: turns[0]: has neither `text` nor `input_length`",
        "line 5: turns[0].delay: a string, but a number is expected",
        "line 6: turns: has no turn that generates anything",
        "line 7: messages[0].content: is missing, or no string",
    ];
    assert_eq!(faults(&source), expected);
}

#[test]
fn sessions_without_times_come_at_random_and_the_same_each_time() {
    let text = r#"{"turns": [{"input_length": 4}]}
"#
    .repeat(4000);
    let options = MultiTurnOptions { sessions_per_second: 4.0, seed: 3, ..Default::default() };
    let read = || all(&mut MultiTurn::new(text.as_bytes(), options, Approximate));
    let found = read();
    assert_eq!(found, read());
    let Some(When::At(last)) = found.last().map(|arrival| arrival.when) else { panic!("they open") };
    assert!((last as f64 / SECOND as f64 / 1000.0 - 1.0).abs() < 0.1, "{last}");
}

#[test]
fn agents_call_ten_to_thirty_times_on_growing_contexts() {
    let mut source = Generator::new(vec![Shape::agent()], 1.0, 16, 8);
    let mut lengths = Vec::new();
    for _ in 0..50 {
        let first = source.open().expect("generators do not end");
        let session = first.session.expect("agents have sessions");
        let mut before = first;
        let mut calls = 1;
        while let Some(next) = source.follow(session) {
            let whole = ((before.prompt_tokens + before.output_tokens) / 16) as usize;
            assert_eq!(next.blocks[..whole], before.blocks[..whole]);
            assert_eq!(next.prompt_tokens, before.prompt_tokens + before.output_tokens + next.new_tokens);
            before = next;
            calls += 1;
        }
        lengths.push(calls);
    }
    assert!(lengths.iter().all(|calls| (10..=30).contains(calls)), "{lengths:?}");
    assert!(lengths.iter().any(|calls| *calls < 15) && lengths.iter().any(|calls| *calls > 25));
}

#[test]
fn rates_scale_openings_and_not_pauses() {
    let generator = || First::new(Generator::new(Shape::mix(), 1.0, 64, 2), 100);
    let (slow, fast) = (all(&mut generator()), all(&mut Scaled::new(generator(), 4.0)));
    assert_eq!(slow.len(), 100);
    for (slow, fast) in slow.iter().zip(&fast) {
        let (When::At(slow), When::At(fast)) = (slow.when, fast.when) else { panic!("they open") };
        assert!(slow.abs_diff(fast * 4) <= 4);
    }
}

#[test]
fn recorded_traces() {
    let Some(folder) = std::env::var_os("BATON_TRACES").map(std::path::PathBuf::from) else {
        eprintln!("SKIPPED: BATON_TRACES is not set; set it to a folder with recorded traces");
        return;
    };
    for (name, requests) in
        [("azure_AzureLLMInferenceTrace_code.csv", 8819), ("azure_AzureLLMInferenceTrace_conv.csv", 19_366)]
    {
        let mut source = Azure::open(&folder.join(name), 16).expect("the folder has it");
        let found = all(&mut source).len();
        assert_eq!((found, source.rows().bad), (requests, 0), "{name}");
    }
    let Some(sessions) = std::env::var_os("BATON_SESSIONS").map(std::path::PathBuf::from) else {
        eprintln!(
            "SKIPPED in part: BATON_SESSIONS is not set; set it to the folder that miniswe.tar.gz unpacks to"
        );
        return;
    };
    let mut source =
        Sessions::open(&sessions, SessionsOptions::default(), Approximate).expect("it can be read");
    let (mut hit, mut prompt, mut calls, mut opened) = (0, 0, 0, 0);
    let mut cached = std::collections::HashSet::new();
    while let Some(first) = source.open() {
        opened += 1;
        let mut next = Some(first);
        while let Some(arrival) = next {
            calls += 1;
            let whole = &arrival.blocks[..(arrival.prompt_tokens / 16) as usize];
            hit += 16 * whole.iter().take_while(|block| cached.contains(*block)).count();
            prompt += arrival.prompt_tokens as usize;
            cached.extend(arrival.blocks.iter().copied());
            next = arrival.session.and_then(|session| source.follow(session));
        }
    }
    let reuse = hit as f64 / prompt as f64;
    println!("{calls} calls in {opened} sessions, reuse {reuse:.3}");
    assert_eq!((calls, opened), (402, 20));
    assert!((reuse - 0.93).abs() < 0.02, "{reuse}");
}
