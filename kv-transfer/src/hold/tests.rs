//! The table against a naive model, and what the model leaves out.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU32;

use baton_kernels::MemoryError;
use bytes::Bytes;
use proptest::prelude::*;

use baton_proto::wire::{LayoutFingerprint, PullHeader, WireDtype};

use super::*;

const LAYOUT: LayoutFingerprint = LayoutFingerprint::from_bytes([1; 16]);

/// A memory that nobody reads.
struct Nothing;

impl BlockMemory for Nothing {
    fn block_bytes(&self) -> usize {
        8
    }

    fn num_blocks(&self) -> u64 {
        8
    }

    fn read(self: Arc<Self>, _block: u32, _guard: Guard) -> Result<Vec<Bytes>, MemoryError> {
        Ok(Vec::new())
    }

    fn write(&self, block: u32, _offset: usize, _bytes: &[u8]) -> Result<(), MemoryError> {
        Err(MemoryError::InUse(block))
    }
}

fn id(number: u8) -> TransferId {
    TransferId::from_bytes([number; 16])
}

/// Of two blocks, as many of them computed.
fn hold(number: u8, request: u8, ranks: usize, computed: usize) -> Hold {
    let rank =
        |_| RankHold { memory: Arc::new(Nothing), layout: LAYOUT.into(), checksums: Checksums::pending(2) };
    Hold {
        request_id: format!("r{request}"),
        transfer_id: id(number),
        hashes: vec![BlockHash::from_bytes([0; 16]), BlockHash::from_bytes([1; 16])],
        block_ids: [4, 7][..computed].to_vec(),
        ranks: (0..ranks).map(rank).collect(),
    }
}

fn pull(number: u8, rank: u32, ranks: u32, epoch: u64) -> PullHeader {
    PullHeader {
        transfer_id: id(number),
        epoch: Epoch(epoch),
        layout: LAYOUT,
        content: None,
        dtype: WireDtype::AsStored,
        last_hash: BlockHash::from_bytes([1; 16]),
        first_block: 1,
        blocks: 1,
        rank,
        ranks,
        deadline_ms: 0,
        credit: 0,
    }
}

fn table(max_holds: usize) -> (HoldTable, Arc<AtomicU32>) {
    let woken = Arc::new(AtomicU32::new(0));
    let wake = Arc::new({
        let woken = woken.clone();
        move || {
            woken.fetch_add(1, Ordering::Relaxed);
        }
    });
    (HoldTable::new(Epoch(1), max_holds, wake), woken)
}

#[derive(Clone, Debug)]
enum Operation {
    Insert { number: u8, request: u8, ranks: usize, computed: usize, lease: u64 },
    Grow { request: u8, rank: u32, first: usize, blocks: Vec<u32> },
    Open { number: u8, rank: u32, stale: bool },
    Finish(usize),
    Drop(usize),
    Release(u8),
    DropEpoch,
    Advance(u64),
    Poll,
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        6 => (0..12u8, 0..5u8, 1..3usize, 0..3usize, 1..60u64).prop_map(
            |(number, request, ranks, computed, lease)| Operation::Insert { number, request, ranks, computed, lease }
        ),
        4 => (0..5u8, 0..3u32, prop::sample::select(vec![(0, vec![4]), (1, vec![7]), (0, vec![4, 7]), (1, vec![6]), (1, vec![7, 8])]))
            .prop_map(|(request, rank, (first, blocks))| Operation::Grow { request, rank, first, blocks }),
        6 => (0..12u8, 0..3u32, prop::bool::weighted(0.1))
            .prop_map(|(number, rank, stale)| Operation::Open { number, rank, stale }),
        4 => any::<usize>().prop_map(Operation::Finish),
        6 => any::<usize>().prop_map(Operation::Drop),
        1 => (0..12u8).prop_map(Operation::Release),
        1 => Just(Operation::DropEpoch),
        4 => (1..40u64).prop_map(Operation::Advance),
        4 => Just(Operation::Poll),
    ]
}

struct Modelled {
    number: u8,
    request: u8,
    /// Of which it is known which they are.
    blocks: [Option<u32>; 2],
    finished: Vec<bool>,
    lease: u64,
    expires: u64,
    end: Option<HoldEnd>,
    copies: usize,
}

/// Holds in a list, and every rule written out.
#[derive(Default)]
struct Model {
    now: u64,
    holds: Vec<Modelled>,
    past: BTreeMap<u8, HoldEnd>,
}

impl Model {
    fn find(&mut self, number: u8) -> Option<&mut Modelled> {
        self.holds.iter_mut().find(|hold| hold.number == number)
    }

    fn insert(
        &mut self,
        number: u8,
        request: u8,
        ranks: usize,
        computed: usize,
        lease: u64,
    ) -> Result<(), HoldError> {
        if self.find(number).is_some() {
            return Err(HoldError::DuplicateTransfer(id(number)));
        }
        if self.past.contains_key(&number) {
            return Err(HoldError::TransferOver(id(number)));
        }
        if self.holds.iter().any(|hold| hold.request == request) {
            return Err(HoldError::DuplicateRequest(format!("r{request}")));
        }
        if self.holds.len() == 3 {
            return Err(HoldError::Full(3));
        }
        let expires = self.now + lease;
        self.holds.push(Modelled {
            number,
            request,
            blocks: [(computed > 0).then_some(4), (computed > 1).then_some(7)],
            finished: vec![false; ranks],
            lease,
            expires,
            end: None,
            copies: usize::from(computed > 0),
        });
        Ok(())
    }

    /// Whether there is something to be made.
    fn grow(&mut self, request: u8, rank: u32, first: usize, blocks: &[u32]) -> Result<bool, GrowError> {
        let now = self.now;
        let found = self.holds.iter_mut().find(|hold| hold.request == request);
        let hold = found.ok_or_else(|| GrowError::Unknown(format!("r{request}")))?;
        let (end, ranks) = (first + blocks.len(), hold.finished.len());
        if end > 2 || rank as usize >= ranks {
            return Err(GrowError::Range { first, end, rank, blocks: 2, ranks });
        }
        for (index, said) in (first..).zip(blocks) {
            let known = *hold.blocks[index].get_or_insert(*said);
            if known != *said {
                return Err(GrowError::Differs { index, said: *said, known });
            }
        }
        let is_live = hold.end.is_none() && now < hold.expires;
        if is_live {
            hold.expires = now + hold.lease;
            hold.copies += 1;
        }
        Ok(is_live)
    }

    fn open(&mut self, number: u8, rank: u32, stale: bool) -> Result<(), ErrorCode> {
        if stale {
            return Err(ErrorCode::StaleEpoch);
        }
        let (now, past) = (self.now, self.past.get(&number).copied());
        let Some(hold) = self.find(number) else {
            return Err(past.map_or(ErrorCode::UnknownTransfer, HoldEnd::code));
        };
        match (hold.end, hold.finished.get(rank as usize)) {
            (Some(end), _) => Err(end.code()),
            (None, _) if now >= hold.expires => Err(ErrorCode::LeaseExpired),
            (None, None) => Err(ErrorCode::LayoutMismatch),
            (None, Some(true)) => Err(ErrorCode::Released),
            (None, Some(false)) => {
                hold.copies += 1;
                Ok(())
            }
        }
    }

    fn poll(&mut self) -> Vec<(u8, HoldEnd)> {
        let now = self.now;
        for hold in &mut self.holds {
            let end = if hold.finished.iter().all(|finished| *finished) {
                Some(HoldEnd::Finished)
            } else {
                (now >= hold.expires).then_some(HoldEnd::Expired)
            };
            hold.end = hold.end.or(end);
        }
        let mut released = Vec::new();
        self.holds.retain(|hold| match hold.end {
            Some(end) if hold.copies == 0 => {
                released.push((hold.number, end));
                false
            }
            _ => true,
        });
        released.sort_unstable_by_key(|(number, _)| *number);
        self.past.extend(released.iter().copied());
        released
    }
}

/// What keeps a hold from being released: checksums to be made, or a claim.
enum Held {
    Making(#[allow(dead_code, reason = "kept, never read")] Vec<Making>),
    Claim(HeldBlocks, u32),
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn the_table_does_what_the_model_does(operations in prop::collection::vec(operation(), 1..80)) {
        let start = Instant::now();
        let (mut table, woken) = table(3);
        let mut model = Model::default();
        let mut epoch = 1;
        let mut held: Vec<(u8, Held)> = Vec::new();
        for operation in operations {
            let now = start + Duration::from_millis(model.now);
            let before = woken.load(Ordering::Relaxed);
            match operation {
                Operation::Insert { number, request, ranks, computed, lease } => {
                    let lives = Duration::from_millis(lease);
                    let result = table.insert(now, hold(number, request, ranks, computed), lives);
                    let expected = model.insert(number, request, ranks, computed, lease);
                    prop_assert_eq!(result.as_ref().map(|_| ()), expected.as_ref().map(|_| ()));
                    let making = result.ok().filter(|making| !making.is_empty());
                    prop_assert!(making.as_ref().is_none_or(|making| making.len() == ranks));
                    held.extend(making.map(|making| (number, Held::Making(making))));
                }
                Operation::Grow { request, rank, first, blocks } => {
                    let growth = Growth { first, block_ids: blocks.clone() };
                    let result = table.grow(now, &format!("r{request}"), rank, growth.clone());
                    let expected = model.grow(request, rank, first, &blocks);
                    prop_assert_eq!(result.as_ref().map(|making| making.is_some()), expected.as_ref().copied());
                    if let Ok(Some(making)) = result {
                        prop_assert_eq!(&making.growth, &growth);
                        let hold = model.holds.iter().find(|hold| hold.request == request);
                        held.push((hold.expect("it has grown").number, Held::Making(vec![making])));
                    }
                }
                Operation::Open { number, rank, stale } => {
                    // As many as the holder has, where that can be.
                    let ranks = model.find(number).map_or(1, |hold| hold.finished.len() as u32).max(rank + 1);
                    let result = table.open(now, &pull(number, rank, ranks, epoch - u64::from(stale)));
                    let expected = model.open(number, rank, stale);
                    prop_assert_eq!(result.as_ref().map(|_| ()).map_err(|error| error.code), expected);
                    if let Ok(opened) = result {
                        let first = opened.parts.iter().map(|part| part.first_block).collect::<Vec<_>>();
                        prop_assert_eq!((opened.count(), &first[..]), (1, &[1][..]));
                        prop_assert_eq!(opened.block(0), model.find(number).expect("it is open").blocks[1]);
                        prop_assert_eq!(opened.block(1), None);
                        held.push((number, Held::Claim(opened, rank)));
                    }
                }
                Operation::Finish(which) if !held.is_empty() => {
                    let (number, held) = &held[which % held.len()];
                    if let Held::Claim(opened, rank) = held {
                        opened.claim.finish();
                        let hold = model.find(*number).expect("not released");
                        let news = !std::mem::replace(&mut hold.finished[*rank as usize], true);
                        prop_assert_eq!(woken.load(Ordering::Relaxed) > before, news);
                    }
                }
                Operation::Drop(which) if !held.is_empty() => {
                    let which = which % held.len();
                    let (number, dropped) = held.swap_remove(which);
                    if let Held::Claim(opened, _) = &dropped {
                        let end = model.find(number).expect("not released").end;
                        prop_assert_eq!(opened.claim.end(), end);
                        prop_assert_eq!(opened.claim.ended().is_cancelled(), end.is_some());
                        // What a claim hands out counts like the claim itself.
                        let guard = opened.claim.guard();
                        drop(dropped);
                        drop(guard);
                    } else {
                        drop(dropped);
                    }
                    let hold = model.find(number).expect("not released");
                    hold.copies -= 1;
                    prop_assert_eq!(woken.load(Ordering::Relaxed) > before, hold.copies == 0);
                }
                Operation::Finish(_) | Operation::Drop(_) => {}
                Operation::Release(number) => {
                    let live = model.find(number).filter(|hold| hold.end.is_none());
                    let expected = live.map(|hold| hold.end = Some(HoldEnd::Released)).is_some();
                    if model.find(number).is_none() {
                        model.past.entry(number).or_insert(HoldEnd::Released);
                    }
                    prop_assert_eq!(table.release(id(number)), expected);
                }
                Operation::DropEpoch => {
                    epoch += 1;
                    table.drop_epoch(Epoch(epoch));
                    for hold in &mut model.holds {
                        hold.end = hold.end.or(Some(HoldEnd::Dropped));
                    }
                }
                Operation::Advance(millis) => model.now += millis,
                Operation::Poll => {
                    let released: Vec<_> =
                        table.poll(now).into_iter().map(|hold| (hold.transfer_id, hold.end)).collect();
                    let expected: Vec<_> =
                        model.poll().into_iter().map(|(number, end)| (id(number), end)).collect();
                    for (released, _) in &released {
                        prop_assert!(held.iter().all(|(number, _)| id(*number) != *released), "still read");
                    }
                    prop_assert_eq!(released, expected);
                }
            }
            prop_assert_eq!(table.len(), model.holds.len());
            let next = model.holds.iter().filter(|hold| hold.end.is_none()).map(|hold| hold.expires).min();
            prop_assert_eq!(table.poll_timeout(), next.map(|next| start + Duration::from_millis(next)));
        }
    }
}

#[test]
fn holds_whose_parts_do_not_agree_are_refused() {
    let (mut table, _) = table(3);
    let mut too_few_hashes = hold(1, 1, 1, 2);
    too_few_hashes.hashes.pop();
    let mut no_rank = hold(1, 1, 1, 2);
    no_rank.ranks.clear();
    let mut other_checksums = hold(1, 1, 1, 2);
    other_checksums.ranks[0].checksums = Checksums::pending(3);
    for bad in [too_few_hashes, no_rank, other_checksums] {
        let result = table.insert(Instant::now(), bad, Duration::from_secs(1));
        assert!(matches!(result, Err(HoldError::Shape { .. })));
    }
    assert!(table.is_empty());
}

#[test]
fn a_cancelled_request_ends_its_hold() {
    let (mut table, _) = table(3);
    let now = Instant::now();
    table.insert(now, hold(1, 5, 1, 0), Duration::from_secs(1)).unwrap();
    assert!(!table.cancel("r6") && table.cancel("r5") && !table.cancel("r5"));
    let released = table.poll(now);
    assert_eq!((released[0].request_id.as_str(), released[0].end), ("r5", HoldEnd::Released));
    // Its other ranks may not have heard of it.
    let late = Growth { first: 0, block_ids: vec![4] };
    assert_eq!(table.grow(now, "r5", 0, late).err(), Some(GrowError::Unknown("r5".into())));
}

#[test]
fn only_so_many_ended_transfers_are_remembered() {
    let (mut table, _) = table(1);
    let now = Instant::now();
    for number in 0..=REMEMBERED {
        let mut hold = hold(0, 0, 1, 2);
        hold.transfer_id = TransferId::from_bytes((number as u128).to_be_bytes());
        drop(table.insert(now, hold, Duration::ZERO).unwrap());
        assert_eq!(table.poll(now).len(), 1);
    }
    assert_eq!(table.remembered.len(), REMEMBERED);
    let code = |table: &HoldTable, number: u128| {
        let pull =
            PullHeader { transfer_id: TransferId::from_bytes(number.to_be_bytes()), ..pull(0, 0, 1, 1) };
        table.open(now, &pull).err().map(|error| error.code)
    };
    assert_eq!(code(&table, 0), Some(ErrorCode::UnknownTransfer));
    assert_eq!(code(&table, 1), Some(ErrorCode::LeaseExpired));
}
