//! `baton route --replay`: decisions that a coordinator wrote down, decided once more.

use std::fs::File;
use std::io::{self, BufRead, BufReader};

use anyhow::{Context as _, bail};
use baton_coordinator_core::record::{Record, replay};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Decide on the recorded inputs again and compare to the bit: one record of JSON on each line; `-` for standard input
    #[arg(long, value_name = "FILE")]
    replay: String,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let file = &arguments.replay;
    let replayed = match file.as_str() {
        "-" => replay_all(file, io::stdin().lock())?,
        _ => replay_all(file, BufReader::new(File::open(file).with_context(|| file.clone())?))?,
    };
    println!("{replayed} decisions replayed, equal to the bit");
    Ok(())
}

/// How many records there were. An error names the line and the field of the first that is broken or different.
fn replay_all(file: &str, lines: impl BufRead) -> anyhow::Result<u64> {
    let mut replayed = 0;
    for (at, line) in lines.lines().enumerate() {
        let place = || format!("{file} line {}", at + 1);
        let line = line.with_context(place)?;
        if line.trim().is_empty() {
            continue;
        }
        replay(&Record::parse(&line).with_context(place)?).with_context(place)?;
        replayed += 1;
    }
    if replayed == 0 {
        bail!("{file}: no records; write one record of JSON on each line");
    }
    Ok(replayed)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use baton_coordinator_core::fleet::{Engine, EngineInfo, Fleet, Role};
    use baton_coordinator_core::kv_index::{Overlap, Overlaps, Slot};
    use baton_coordinator_core::links::Links;
    use baton_coordinator_core::placement::{Decider, POLICIES, Request};
    use baton_coordinator_core::record::Recent;
    use baton_coordinator_core::speed::Speed;
    use baton_proto::Epoch;

    use super::*;

    fn engine(n: u32) -> Engine {
        Engine {
            info: Arc::new(EngineInfo {
                slot: Slot(n),
                id: format!("e{n}").parse().unwrap(),
                epoch: Epoch(1),
                host: String::new(),
                models: vec!["m".into()],
                role: Role::Both,
                block_size: 16,
                block_bytes: 100_000,
                wire_block_bytes: 100_000,
                num_blocks: 0,
                layout: "l".into(),
                chunk_tokens: 0,
                can_pull_cached: false,
            }),
            healthy: true,
            can_transfer: true,
            speed: Speed::default(),
            load: Arc::default(),
            foreign_waiting: n,
            foreign_running: 3 * n,
            kv_beyond: 0.0,
            prefill_share: 0.1,
            part: None,
            answer_tokens: Some(200.0),
            reused: None,
        }
    }

    fn dump() -> String {
        let fleet = Arc::new(Fleet::new((0..4).map(engine).collect(), Links::default()));
        let overlaps: Overlaps = [(Slot(2), Overlap { blocks: 30, gpu_blocks: 30 })].into_iter().collect();
        let (mut decider, mut recent) = (Decider::new(), Recent::new(100));
        for (seed, policy) in POLICIES.into_iter().enumerate() {
            let request = Request { seed: seed as u64, ..Request::new("m", 3000, &overlaps) };
            let decision = decider.decide(policy, &fleet, &request);
            recent.keep(policy, &fleet, &request, &decider, decision.as_ref());
        }
        recent.records().map(|record| record.to_json() + "\n").collect()
    }

    #[test]
    fn what_was_written_down_replays() {
        assert_eq!(replay_all("f", dump().as_bytes()).unwrap(), POLICIES.len() as u64);
    }

    #[test]
    fn errors_name_line_and_field() {
        let error = |text: &str| format!("{:#}", replay_all("f", text.as_bytes()).unwrap_err());
        let mut lines: Vec<String> = dump().lines().map(str::to_owned).collect();
        lines[1] = lines[1].replacen("\"block_size\":16", "\"block_size\":\"16\"", 1);
        let message = error(&lines.join("\n"));
        assert!(message.starts_with("f line 2: inputs.engines[0].block_size: invalid type"), "{message}");
        lines[0] = lines[0].replacen("\"fell_back\":false", "\"fell_back\":true", 1);
        let message = error(&lines.join("\n"));
        assert_eq!(message, "f line 1: outcome.fell_back: recorded 1, replayed 0");
        assert!(error("").contains("no records"));
        assert!(error("{").starts_with("f line 1: "));
    }
}
