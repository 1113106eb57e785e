//! Two-phase release, whatever comes in whatever order.

use std::collections::{BTreeMap, BTreeSet};

use baton_kv_transfer::Claim;
use baton_proto::plan::Source;
use baton_proto::wire::{LayoutFingerprint, PullHeader};
use proptest::prelude::*;

use super::super::*;
use super::*;

#[derive(Clone, Debug)]
enum Op {
    /// Of a block that is computed, or will be.
    Hold {
        hold: u8,
        computed: bool,
    },
    Computed {
        hold: u8,
        rank: u32,
    },
    Cancel(u8),
    ChecksumsMade,
    Open {
        hold: u8,
        rank: u32,
    },
    Finish(usize),
    DropClaim(usize),
    Pull {
        rank: u32,
    },
    PullEnds(usize),
    Release(u8),
    Wait(u64),
    Lose(u32),
    Reattach,
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..8u8, any::<bool>()).prop_map(|(hold, computed)| Op::Hold { hold, computed }),
        4 => (0..8u8, 0..2u32).prop_map(|(hold, rank)| Op::Computed { hold, rank }),
        1 => (0..8u8).prop_map(Op::Cancel),
        4 => Just(Op::ChecksumsMade),
        6 => (0..8u8, 0..2u32).prop_map(|(hold, rank)| Op::Open { hold, rank }),
        4 => (0..9usize).prop_map(Op::Finish),
        5 => (0..9usize).prop_map(Op::DropClaim),
        3 => (0..2u32).prop_map(|rank| Op::Pull { rank }),
        3 => (0..9usize).prop_map(Op::PullEnds),
        1 => (0..8u8).prop_map(Op::Release),
        2 => (1..600u64).prop_map(Op::Wait),
        1 => (0..3u32).prop_map(Op::Lose),
        2 => Just(Op::Reattach),
    ]
}

proptest! {
    /// However it all interleaves: no block is released and no connection closed while a copy may be in flight, no
    /// hold of an ended epoch opens, and in the end every block comes back, by a release or by a closed connection.
    #[test]
    fn two_phase_release_holds_whatever_comes(ops in prop::collection::vec(any_op(), 1..80)) {
        let mut bed = Bed::attached(2);
        let mut next_conn = 100;
        let mut scheduler = SCHEDULER;
        let mut workers = vec![worker(0), worker(1)];
        // Life of each connection, and of each thing that copies.
        let mut life_of: BTreeMap<ConnId, Epoch> =
            [SCHEDULER, worker(0), worker(1)].map(|conn| (conn, Epoch(1000))).into();
        let mut jobs: Vec<(Epoch, u8, ChecksumJob)> = Vec::new();
        let mut claims: Vec<(Epoch, u8, Claim)> = Vec::new();
        let mut pulls: Vec<(Epoch, PullId)> = Vec::new();
        // Requests whose blocks are ours, by life. Numbers are used once in a life.
        let mut held: BTreeSet<(Epoch, u8)> = BTreeSet::new();
        let mut used: BTreeSet<(Epoch, u8)> = BTreeSet::new();
        let last = [Op::Wait(2000)].into_iter();
        for op in ops.into_iter().chain(last) {
            let epoch = bed.core.attachment().epoch;
            let attached = bed.core.attachment().can_transfer;
            match op {
                Op::Hold { hold: i, computed } if attached && used.insert((epoch, i)) => {
                    bed.say(scheduler, ToAgent::Hold(Hold {
                        request_id: format!("r{i}"),
                        // Of another life's it must differ, as random ids do.
                        transfer_id: TransferId::from_bytes([i, epoch.0 as u8, (epoch.0 >> 8) as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
                        lease_ms: 1000,
                        content: content(4),
                        block_ids: computed.then_some(u32::from(i)).into_iter().collect(),
                    }));
                    held.insert((epoch, i));
                }
                Op::Computed { hold, rank } if attached => bed.say(workers[rank as usize], ToAgent::Computed(Computed {
                    request_id: format!("r{hold}"),
                    first_block: 0,
                    block_ids: vec![hold.into()],
                })),
                Op::Cancel(hold) if attached => bed.say(scheduler, ToAgent::Cancel { request_id: format!("r{hold}") }),
                Op::ChecksumsMade if !jobs.is_empty() => drop(jobs.remove(0)),
                Op::Open { hold, rank } => {
                    for life in [epoch, Epoch(1000)] {
                        let header = PullHeader {
                            transfer_id: TransferId::from_bytes([hold, life.0 as u8, (life.0 >> 8) as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
                            epoch: life,
                            layout: LayoutFingerprint::of(&layout(rank)),
                            content: None,
                            dtype: WireDtype::AsStored,
                            last_hash: hashes(&content(4))[0],
                            first_block: 0,
                            blocks: 1,
                            rank,
                            ranks: 2,
                            deadline_ms: 1,
                            credit: 0,
                        };
                        let opened = lock(&bed.table).open(bed.now.instant, &header);
                        if let Ok(blocks) = opened {
                            prop_assert_eq!(life, epoch, "a hold of an ended epoch opened");
                            prop_assert!(held.contains(&(life, hold)), "a released hold opened");
                            claims.push((life, hold, blocks.claim));
                        }
                    }
                }
                Op::Finish(i) if i < claims.len() => claims[i].2.finish(),
                Op::DropClaim(i) if i < claims.len() => drop(claims.remove(i)),
                Op::Pull { rank } if attached => {
                    let source = Source { engine_id: "p0".parse().unwrap(), address: "a:1".into(), epoch: Epoch(9) };
                    bed.say(workers[rank as usize], ToAgent::Pull(Pull {
                        request_id: "p".into(),
                        transfer_id: transfer(99),
                        source,
                        deadline_ms: 100,
                        content: content(4),
                        first_block: 0,
                        block_ids: vec![60],
                    }));
                    pulls.extend(bed.pulls().iter().map(|(id, ..)| (epoch, *id)));
                    bed.done.retain(|action| !matches!(action, Action::Pull(..)));
                }
                Op::PullEnds(i) if i < pulls.len() => {
                    let (_, id) = pulls.remove(i);
                    bed.input(Input::PullEnded(id, Ok(report(8, vec![]))));
                }
                Op::Release(i) => bed.input(Input::Release(TransferId::from_bytes([i, epoch.0 as u8, (epoch.0 >> 8) as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]))),
                Op::Lose(part) => {
                    let conn = if part == 2 { scheduler } else { workers[part as usize] };
                    bed.input(Input::Ended(conn));
                }
                Op::Reattach if !attached => {
                    let epoch = bed.core.attachment().epoch;
                    scheduler = ConnId(next_conn);
                    workers = vec![ConnId(next_conn + 1), ConnId(next_conn + 2)];
                    next_conn += 3;
                    bed.now.unix_ms += 1;
                    bed.attach("i", scheduler, Side::Scheduler, 2);
                    for rank in 0..2 {
                        bed.attach("i", workers[rank as usize], Side::Worker(rank), 2);
                    }
                    prop_assert_eq!(bed.core.attachment().epoch, epoch);
                    life_of.extend([scheduler, workers[0], workers[1]].map(|conn| (conn, epoch)));
                }
                Op::Wait(ms) => bed.wait(ms),
                _ => {}
            }
            while let Some(job) = bed.checksum_job() {
                let block = job.making.growth.block_ids[0] as u8;
                jobs.push((epoch, block, job));
            }
            bed.wait(0);
            let copying = |life: Epoch, hold: Option<u8>| {
                jobs.iter().any(|(epoch, i, _)| *epoch == life && hold.is_none_or(|hold| hold == *i))
                    || claims.iter().any(|(epoch, i, _)| *epoch == life && hold.is_none_or(|hold| hold == *i))
                    || (hold.is_none() && pulls.iter().any(|(epoch, _)| *epoch == life))
            };
            for (conn, message) in bed.sent() {
                if let ToConnector::Released { request_ids } = message {
                    let life = life_of[&conn];
                    for id in request_ids {
                        let i: u8 = id[1..].parse().unwrap();
                        prop_assert!(!copying(life, Some(i)), "{id} was released under a copy");
                        if conn == workers[1] {
                            prop_assert!(held.remove(&(life, i)), "{id} was released twice");
                        }
                    }
                }
            }
            for conn in bed.closed() {
                let life = life_of[&conn];
                prop_assert!(!copying(life, None), "a connection was closed under a copy");
                held.retain(|(epoch, _)| *epoch != life);
            }
        }
        // All copies end, all leases run out.
        for (_, id) in std::mem::take(&mut pulls) {
            bed.input(Input::PullEnded(id, Ok(report(8, vec![]))));
        }
        jobs.clear();
        claims.clear();
        bed.wait(2000);
        for (conn, message) in bed.sent() {
            if let ToConnector::Released { request_ids } = message {
                for id in request_ids {
                    held.remove(&(life_of[&conn], id[1..].parse().unwrap()));
                }
            }
        }
        for conn in bed.closed() {
            let life = life_of[&conn];
            held.retain(|(epoch, _)| *epoch != life);
        }
        prop_assert!(held.is_empty(), "blocks are stranded: {held:?}");
        prop_assert!(lock(&bed.table).is_empty());
    }
}
