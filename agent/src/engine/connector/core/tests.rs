use std::collections::{BTreeMap, BTreeSet};

use baton_kernels::{Guard, MemoryError};
use baton_kv_transfer::{Claim, Growth, PullError, PullReport, PullRequest};
use baton_proto::BlockHash;
use baton_proto::block_hash::BlockHasher;
use baton_proto::connector::{Computed, Content, Hold, Layout, Pull};
use baton_proto::control::v1;
use baton_proto::plan::Source;
use baton_proto::wire::{BlockForm, ErrorCode, LayoutFingerprint, PullHeader, WireDtype};
use bytes::Bytes;

use super::holds::MAX_EARLY;
use super::*;

mod gpu;
mod packed;
mod two_phase;

const BLOCKS: u64 = 64;
const BLOCK: u32 = 4;
const SCHEDULER: ConnId = ConnId(0);

fn worker(rank: u32) -> ConnId {
    ConnId(1 + u64::from(rank))
}

struct FakeMemory;

impl BlockMemory for FakeMemory {
    fn block_bytes(&self) -> usize {
        8
    }

    fn num_blocks(&self) -> u64 {
        BLOCKS
    }

    fn read(self: Arc<Self>, _: u32, _: Guard) -> Result<Vec<Bytes>, MemoryError> {
        Ok(vec![Bytes::from_static(&[0; 8])])
    }

    fn write(&self, _: u32, _: usize, _: &[u8]) -> Result<(), MemoryError> {
        Ok(())
    }
}

fn layout(rank: u32) -> Layout {
    let order = BTreeMap::from([("tp_rank".into(), rank.to_string())]);
    Layout { facts: BTreeMap::new(), order, pieces: vec![], heads: None }
}

fn hello(instance: &str, side: Side, tp_size: u32) -> ToAgent {
    ToAgent::Hello(Hello {
        version: VERSION,
        instance: instance.into(),
        side,
        tp_size,
        model: "m".into(),
        block_size: BLOCK,
        num_blocks: BLOCKS,
        chunk_tokens: 8,
    })
}

fn transfer(i: u8) -> TransferId {
    TransferId::from_bytes([i; 16])
}

fn content(tokens: u32) -> Content {
    Content { tokens: (0..tokens).flat_map(u32::to_le_bytes).collect(), keys: Default::default() }
}

fn hashes(content: &Content) -> Vec<BlockHash> {
    BlockHasher::new("m").chain(&content.token_ids().unwrap(), BLOCK as usize, &content.keys)
}

struct Bed {
    core: Core,
    table: Arc<Mutex<HoldTable>>,
    now: Now,
    /// What is to be done and was not looked at.
    done: Vec<Action>,
}

impl Bed {
    fn new() -> Self {
        Self::pulling_as(WireDtype::AsStored)
    }

    fn pulling_as(dtype: WireDtype) -> Self {
        let table = HoldTable::new(Epoch(1000), MAX_HOLDS, Arc::new(|| ()));
        let table = Arc::new(Mutex::new(table));
        let core = Core::new(dtype, table.clone(), Metrics::default());
        Self { core, table, now: Now { instant: Instant::now(), unix_ms: 5000 }, done: Vec::new() }
    }

    /// With a whole engine attached.
    fn attached(tp_size: u32) -> Self {
        let mut bed = Self::new();
        bed.attach("i", SCHEDULER, Side::Scheduler, tp_size);
        for rank in 0..tp_size {
            bed.attach("i", worker(rank), Side::Worker(rank), tp_size);
        }
        assert!(bed.core.attachment().can_transfer);
        bed.done.clear();
        bed
    }

    fn attach(&mut self, instance: &str, conn: ConnId, side: Side, tp_size: u32) {
        self.input(Input::Connected(conn));
        self.say(conn, hello(instance, side, tp_size));
        if let Side::Worker(rank) = side {
            self.say(conn, ToAgent::Layout(layout(rank)));
            self.input(Input::Mapped(conn, Mapped(Ok(Arc::new(FakeMemory)))));
        }
    }

    fn input(&mut self, input: Input) {
        let actions = self.core.handle(self.now, input);
        self.done.extend(actions);
    }

    fn say(&mut self, conn: ConnId, message: ToAgent) {
        let hashes = match &message {
            ToAgent::Hold(hold) => hashes(&hold.content),
            ToAgent::Pull(pull) => hashes(&pull.content),
            _ => Vec::new(),
        };
        self.input(Input::Message(conn, message, Extra { fd: None, hashes }));
    }

    fn wait(&mut self, ms: u64) {
        self.now.instant += Duration::from_millis(ms);
        self.input(Input::Woken);
    }

    /// Holds `blocks` blocks for a second.
    fn hold(&mut self, i: u8, block_ids: Vec<u32>, tokens: u32) {
        self.say(
            SCHEDULER,
            ToAgent::Hold(Hold {
                request_id: format!("r{i}"),
                transfer_id: transfer(i),
                lease_ms: 1000,
                content: content(tokens),
                block_ids,
            }),
        );
    }

    /// A rank has computed more of a request's prompt.
    fn computed(&mut self, i: u8, rank: u32, first_block: u32, block_ids: Vec<u32>) {
        let request_id = format!("r{i}");
        self.say(worker(rank), ToAgent::Computed(Computed { request_id, first_block, block_ids }));
    }

    fn pull(&mut self, i: u8, rank: u32, block_ids: Vec<u32>, first_block: u32, tokens: u32) {
        let source = Source { engine_id: "p0".parse().unwrap(), address: "a:1".into(), epoch: Epoch(9) };
        self.say(
            worker(rank),
            ToAgent::Pull(Pull {
                request_id: format!("r{i}"),
                transfer_id: transfer(i),
                source,
                deadline_ms: 100,
                content: content(tokens),
                first_block,
                block_ids,
            }),
        );
    }

    fn open(&self, i: u8, rank: u32, epoch: Epoch, tokens: u32) -> Result<Claim, ErrorCode> {
        let chain = hashes(&content(tokens));
        let header = PullHeader {
            transfer_id: transfer(i),
            epoch,
            layout: LayoutFingerprint::of(&layout(rank)),
            content: None,
            dtype: WireDtype::AsStored,
            last_hash: *chain.last().unwrap(),
            first_block: 0,
            blocks: chain.len() as u32,
            rank,
            ranks: self.core.attachment().engine.map_or(rank + 1, |engine| engine.tp_size),
            deadline_ms: 100,
            credit: 0,
        };
        lock(&self.table).open(self.now.instant, &header).map(|held| held.claim).map_err(|error| error.code)
    }

    fn sent(&mut self) -> Vec<(ConnId, ToConnector)> {
        let mut sent = Vec::new();
        self.done.retain(|action| match action {
            Action::Send(conn, message) => {
                sent.push((*conn, message.clone()));
                false
            }
            _ => true,
        });
        sent
    }

    fn closed(&mut self) -> BTreeSet<ConnId> {
        let mut closed = BTreeSet::new();
        self.done.retain(|action| match action {
            Action::Close(conn) => {
                closed.insert(*conn);
                false
            }
            _ => true,
        });
        closed
    }

    fn checksum_job(&mut self) -> Option<ChecksumJob> {
        let at = self.done.iter().position(|action| matches!(action, Action::Checksum(_)))?;
        match self.done.remove(at) {
            Action::Checksum(job) => Some(job),
            _ => None,
        }
    }

    fn pulls(&self) -> Vec<(PullId, &PullRequest, &[u32])> {
        self.done
            .iter()
            .filter_map(|action| match action {
                Action::Pull(id, request, _, block_ids) => Some((*id, request, &block_ids[..])),
                _ => None,
            })
            .collect()
    }

    fn cancelled(&self) -> Vec<PullId> {
        self.done
            .iter()
            .filter_map(|action| match action {
                Action::CancelPull(id) => Some(*id),
                _ => None,
            })
            .collect()
    }

    fn outcomes(&self) -> Vec<&v1::TransferOutcome> {
        self.done
            .iter()
            .filter_map(|action| match action {
                Action::Outcome(outcome) => Some(outcome),
                _ => None,
            })
            .collect()
    }
}

fn released(i: u8) -> ToConnector {
    ToConnector::Released { request_ids: vec![format!("r{i}")] }
}

fn report(bytes: u64, failed: Vec<usize>) -> PullReport {
    PullReport {
        bytes,
        waited: Duration::ZERO,
        elapsed: Duration::from_millis(20),
        rtt: Duration::from_millis(1),
        corrupt: 2 * failed.len() as u32,
        failed,
        stopped: None,
        checksums: vec![],
        form: BlockForm::AsItLies,
        direct: false,
    }
}

#[test]
fn an_engine_is_attached_when_its_scheduler_and_all_workers_are() {
    let mut bed = Bed::new();
    bed.attach("i", SCHEDULER, Side::Scheduler, 2);
    bed.attach("i", worker(1), Side::Worker(1), 2);
    let attachment = bed.core.attachment();
    assert!(!attachment.can_transfer);
    assert_eq!(attachment.engine.unwrap().block_size, BLOCK);
    bed.attach("i", worker(0), Side::Worker(0), 2);
    let attachment = bed.core.attachment();
    assert!(attachment.can_transfer);
    assert_eq!((attachment.epoch, attachment.block_bytes), (Epoch(1000), 16));
    assert!(attachment.layout.contains("fingerprint="));
    let welcome = ToConnector::Welcome { version: VERSION, epoch: Epoch(1000) };
    let welcomes = bed.sent().into_iter().filter(|(_, message)| *message == welcome).count();
    assert_eq!(welcomes, 5, "one for each hello, one for each layout");
}

#[test]
fn what_a_connection_may_not_say_is_refused_with_the_reason() {
    let change = |change: fn(&mut Hello)| {
        let ToAgent::Hello(mut hello) = hello("i", Side::Worker(0), 1) else { unreachable!() };
        change(&mut hello);
        ToAgent::Hello(hello)
    };
    let mut too_many_facts = layout(0);
    too_many_facts.facts.extend((0..99).map(|i| (i.to_string(), String::new())));
    for (messages, word) in [
        (vec![ToAgent::Storage { len: 1 }], "storage"),
        (vec![change(|hello| hello.version = 1)], "version"),
        (vec![change(|hello| hello.block_size = 0)], "block_size"),
        (vec![change(|hello| hello.num_blocks = 1 << 40)], "num_blocks"),
        (vec![change(|hello| hello.tp_size = 0)], "tp_size"),
        (vec![change(|hello| hello.model.clear())], "model"),
        (vec![change(|hello| hello.instance = "x".repeat(2000))], "instance"),
        (vec![change(|hello| hello.side = Side::Worker(1))], "rank 1"),
        (vec![change(|_| ()), ToAgent::Storage { len: 1 }], "file descriptor"),
        (vec![change(|_| ()), change(|_| ())], "hello"),
        (vec![change(|_| ()), ToAgent::Cancel { request_id: "r".into() }], "cancel"),
        (vec![change(|_| ()), ToAgent::Layout(layout(0)), ToAgent::Layout(layout(0))], "layout"),
        (vec![change(|_| ()), ToAgent::Layout(too_many_facts)], "facts"),
    ] {
        let mut bed = Bed::new();
        bed.input(Input::Connected(worker(0)));
        for message in messages.clone() {
            bed.say(worker(0), message);
        }
        let refusal = bed.sent().pop();
        let Some((_, ToConnector::Refused { reason })) = refusal else { panic!("{messages:?}: {refusal:?}") };
        assert!(reason.contains(word), "{reason}");
        assert_eq!(bed.closed(), [worker(0)].into());
        assert_eq!(bed.core.attachment().engine, None);
    }
}

#[test]
fn parts_of_one_instance_must_agree() {
    let mut bed = Bed::new();
    bed.attach("i", SCHEDULER, Side::Scheduler, 1);
    bed.input(Input::Connected(worker(0)));
    bed.sent();
    bed.say(worker(0), hello("i", Side::Worker(0), 2));
    let sent = bed.sent();
    assert!(
        matches!(&sent[..], [(_, ToConnector::Refused { reason })] if reason.contains("tp_size")),
        "{sent:?}"
    );
    assert_eq!(bed.closed(), [worker(0)].into());
    assert!(bed.core.attachment().engine.is_some(), "the scheduler stays");
}

#[test]
fn memory_that_cannot_be_mapped_is_refused() {
    let mut bed = Bed::new();
    bed.input(Input::Connected(worker(0)));
    bed.say(worker(0), hello("i", Side::Worker(0), 1));
    bed.say(worker(0), ToAgent::Layout(layout(0)));
    assert!(matches!(bed.done.last(), Some(Action::Map(_, _, _, BLOCKS))));
    bed.sent();
    bed.input(Input::Mapped(worker(0), Mapped(Err("layout: piece 0".into()))));
    assert_eq!(bed.sent(), [(worker(0), ToConnector::Refused { reason: "layout: piece 0".into() })]);
    assert_eq!(bed.closed(), [worker(0)].into());
}

#[test]
fn a_hold_is_released_when_every_rank_has_pulled_and_no_copy_is_left() {
    let mut bed = Bed::attached(2);
    bed.hold(1, vec![7, 9], 6);
    let jobs = [bed.checksum_job().unwrap(), bed.checksum_job().unwrap()];
    assert!(jobs.iter().all(|job| job.making.growth == Growth { first: 0, block_ids: vec![7, 9] }));
    let claims = [0, 1].map(|rank| bed.open(1, rank, Epoch(1000), 6).unwrap());
    drop(jobs);
    claims[0].finish();
    bed.wait(1);
    assert_eq!(bed.sent(), []);
    claims[1].finish();
    bed.wait(1);
    assert_eq!(bed.sent(), [], "copies are in flight");
    let [first, second] = claims;
    drop(first);
    bed.wait(1);
    assert_eq!(bed.sent(), []);
    drop(second);
    bed.wait(1);
    assert_eq!(bed.sent(), [(worker(0), released(1)), (worker(1), released(1))]);
    assert_eq!(bed.open(1, 0, Epoch(1000), 6).err(), Some(ErrorCode::Released));
    assert_eq!(bed.outcomes(), Vec::<&v1::TransferOutcome>::new());
}

#[test]
fn an_expired_hold_is_released_behind_its_last_copy_and_reported() {
    let mut bed = Bed::attached(1);
    bed.hold(1, vec![7], 4);
    drop(bed.checksum_job());
    let claim = bed.open(1, 0, Epoch(1000), 4).unwrap();
    assert_eq!(bed.core.poll_timeout(), Some(bed.now.instant + Duration::from_secs(1)));
    bed.wait(1000);
    assert_eq!(bed.sent(), []);
    assert!(claim.ended().is_cancelled());
    assert_eq!(bed.open(1, 0, Epoch(1000), 4).err(), Some(ErrorCode::LeaseExpired));
    drop(claim);
    bed.wait(0);
    assert_eq!(bed.sent(), [(worker(0), released(1))]);
    assert_eq!(bed.outcomes()[0].state(), v1::TransferState::Expired);
}

#[test]
fn the_coordinator_releases_holds() {
    let mut bed = Bed::attached(1);
    bed.hold(1, vec![7], 4);
    drop(bed.checksum_job());
    bed.input(Input::Release(transfer(2)));
    assert_eq!(bed.sent(), []);
    bed.input(Input::Release(transfer(1)));
    assert_eq!(bed.sent(), [(worker(0), released(1))]);
}

#[test]
fn a_release_may_overtake_its_hold() {
    let mut bed = Bed::attached(1);
    bed.input(Input::Release(transfer(1)));
    assert_eq!(bed.sent(), []);
    bed.hold(1, vec![7], 4);
    assert_eq!(bed.sent(), [(worker(0), released(1))]);
    assert!(bed.checksum_job().is_none());
}

#[test]
fn a_cancel_may_overtake_its_pull() {
    let mut bed = Bed::attached(1);
    bed.say(SCHEDULER, ToAgent::Cancel { request_id: "r1".into() });
    bed.pull(1, 0, vec![5, 6], 1, 10);
    assert_eq!(bed.pulls().len(), 0);
    let done = ToConnector::PullDone {
        request_id: "r1".into(),
        failed_blocks: vec![5, 6],
        error: "cancelled: the request is over".into(),
    };
    assert_eq!(bed.sent(), [(worker(0), done)]);
    bed.pull(2, 0, vec![5, 6], 1, 10);
    assert_eq!(bed.pulls().len(), 1);
}

#[test]
fn blocks_that_cannot_be_held_are_given_back_at_once() {
    for (block_ids, tokens) in [(vec![1, 2, 3], 8), (vec![BLOCKS as u32], 4), (vec![], 0)] {
        let mut bed = Bed::attached(1);
        bed.hold(1, block_ids, tokens);
        assert_eq!(bed.sent(), [(worker(0), released(1))]);
        assert!(bed.checksum_job().is_none());
    }
}

#[test]
fn a_hold_grows_as_each_rank_computes() {
    let mut bed = Bed::attached(2);
    bed.hold(1, vec![], 6);
    let taken = bed.done.iter().find_map(|action| match action {
        Action::HoldTaken(taken) => Some(taken.clone()),
        _ => None,
    });
    let transfer_id = transfer(1).as_bytes().to_vec().into();
    assert_eq!(taken, Some(v1::HoldTaken { transfer_id, epoch: 1000, num_tokens: 6 }));
    assert!(bed.checksum_job().is_none());
    bed.wait(900);
    bed.computed(1, 1, 0, vec![7]);
    bed.computed(1, 0, 0, vec![7, 9]);
    let [first, second] = [0, 1].map(|_| bed.checksum_job().unwrap().making.growth);
    assert_eq!(first, Growth { first: 0, block_ids: vec![7] });
    assert_eq!(second, Growth { first: 0, block_ids: vec![7, 9] });
    // The lease began anew.
    bed.wait(900);
    assert!(bed.open(1, 0, Epoch(1000), 6).is_ok());
    assert_eq!(bed.sent(), []);
    bed.computed(1, 1, 1, vec![9]);
    assert!(bed.checksum_job().is_some());
}

#[test]
fn what_is_computed_may_overtake_its_hold() {
    let mut bed = Bed::attached(1);
    bed.computed(2, 0, 0, vec![3]);
    bed.computed(1, 0, 0, vec![7]);
    bed.computed(1, 0, 1, vec![9]);
    assert!(bed.checksum_job().is_none());
    bed.hold(1, vec![], 6);
    let [first, second] = [0, 1].map(|_| bed.checksum_job().unwrap().making.growth);
    assert_eq!((first.first, second.first), (0, 1));
    assert!(bed.checksum_job().is_none(), "what belongs to another request");
    assert_eq!(bed.sent(), []);
}

#[test]
fn only_so_much_that_overtook_is_kept() {
    let mut bed = Bed::attached(1);
    bed.computed(1, 0, 0, vec![7]);
    for _ in 0..MAX_EARLY {
        bed.computed(2, 0, 0, vec![3]);
    }
    bed.hold(1, vec![], 6);
    assert!(bed.checksum_job().is_none());
}

#[test]
fn a_request_that_ends_early_ends_its_hold() {
    let mut bed = Bed::attached(1);
    bed.hold(1, vec![], 6);
    bed.computed(1, 0, 0, vec![7]);
    let job = bed.checksum_job();
    bed.say(SCHEDULER, ToAgent::Cancel { request_id: "r1".into() });
    assert_eq!(bed.sent(), [], "its blocks are being read");
    drop(job);
    bed.wait(0);
    assert_eq!(bed.sent(), [(worker(0), released(1))]);
    // What was under way when it ended counts for nothing.
    bed.computed(1, 0, 1, vec![9]);
    assert!(bed.checksum_job().is_none());
}

#[test]
fn blocks_that_cannot_be_end_the_epoch() {
    for (first_block, block_ids, error) in [
        (0, vec![BLOCKS as u32], "computed.block_ids: block 64 of 64"),
        (1, vec![7, 9], "computed: blocks 1 to 3 of rank 0, in a hold of 2 blocks for 1 ranks"),
        (0, vec![8], "computed: block 0 of the prompt is 8, and 7 by what another rank said"),
    ] {
        let mut bed = Bed::attached(1);
        bed.hold(1, vec![7], 6);
        bed.computed(1, 0, first_block, block_ids);
        assert_eq!(bed.sent(), [(worker(0), ToConnector::Refused { reason: error.into() })]);
        assert_eq!(bed.open(1, 0, Epoch(1000), 6).err(), Some(ErrorCode::StaleEpoch));
    }
}

#[test]
fn a_request_held_twice_never_frees_the_first_hold_early() {
    let mut bed = Bed::attached(1);
    bed.hold(1, vec![7], 4);
    let job = bed.checksum_job();
    bed.say(
        SCHEDULER,
        ToAgent::Hold(Hold {
            request_id: "r1".into(),
            transfer_id: transfer(2),
            lease_ms: 1000,
            content: content(4),
            block_ids: vec![8],
        }),
    );
    assert_eq!((bed.sent(), bed.closed()), (vec![], [].into()));
    drop(job);
    bed.wait(0);
    assert_eq!((bed.sent(), bed.closed()), (vec![], [SCHEDULER, worker(0)].into()));
}

#[test]
fn a_hold_before_all_workers_is_given_back_as_they_come() {
    let mut bed = Bed::new();
    bed.attach("i", SCHEDULER, Side::Scheduler, 2);
    bed.attach("i", worker(1), Side::Worker(1), 2);
    bed.sent();
    bed.hold(1, vec![7], 4);
    assert_eq!(bed.sent(), [(worker(1), released(1))]);
    bed.attach("i", worker(0), Side::Worker(0), 2);
    assert_eq!(bed.sent().pop(), Some((worker(0), released(1))));
    assert!(bed.core.attachment().can_transfer);
    bed.hold(2, vec![8], 4);
    assert!(bed.checksum_job().is_some());
}

#[test]
fn a_pull_goes_out_and_its_end_comes_back() {
    let mut bed = Bed::attached(1);
    bed.pull(1, 0, vec![5, 6], 1, 10);
    let expected_hash = *hashes(&content(10)).last().unwrap();
    let (id, request, block_ids) = bed.pulls()[0];
    assert_eq!(block_ids, [5, 6]);
    assert_eq!((request.first_block, request.last_hash, request.epoch), (1, expected_hash, Epoch(9)));
    assert_eq!((request.rank, request.deadline), (0, Duration::from_millis(100)));
    bed.input(Input::PullEnded(id, Ok(report(16, vec![]))));
    let done = |failed_blocks, error: &str| {
        (worker(0), ToConnector::PullDone { request_id: "r1".into(), failed_blocks, error: error.into() })
    };
    assert_eq!(bed.sent(), [done(vec![], "")]);
    assert_eq!((bed.outcomes()[0].state(), bed.outcomes()[0].bytes), (v1::TransferState::Completed, 16));
    assert!(bed.done.iter().any(|action| matches!(action, Action::Link(sample) if sample.source == "p0")));

    bed.done.clear();
    bed.pull(1, 0, vec![5, 6], 1, 10);
    let (id, ..) = bed.pulls()[0];
    bed.input(Input::PullEnded(id, Ok(report(16, vec![1]))));
    assert_eq!(bed.sent(), [done(vec![6], "1 blocks arrived corrupt, twice")]);
    assert_eq!(
        (bed.outcomes()[0].state(), &bed.outcomes()[0].error[..]),
        (v1::TransferState::Failed, "corrupt_block")
    );

    // Its time is over: what has come is kept, and the link was that slow.
    bed.done.clear();
    bed.pull(1, 0, vec![5, 6], 1, 10);
    let (id, ..) = bed.pulls()[0];
    let stopped = Some(PullError::Stopped(ErrorCode::Deadline.into()));
    bed.input(Input::PullEnded(id, Ok(PullReport { stopped, ..report(8, vec![1]) })));
    assert_eq!(bed.sent(), [done(vec![6], "deadline (0); 1 of 2 blocks did not come")]);
    assert_eq!(
        (bed.outcomes()[0].state(), &bed.outcomes()[0].error[..]),
        (v1::TransferState::Failed, "deadline")
    );
    let links = |bed: &Bed| -> Vec<(u64, bool)> {
        let link = |action: &Action| match action {
            Action::Link(sample) => Some((sample.bytes, sample.given_up)),
            _ => None,
        };
        bed.done.iter().filter_map(link).collect()
    };
    assert_eq!(links(&bed), [(8, true)]);

    // The peer cannot be reached, or says no: only one of these is about the link.
    let (peer, address, reason) = ("p0".parse().unwrap(), String::new(), String::new());
    let unreachable = PullError::Unreachable { peer, address, reason };
    let refused = PullError::Refused(ErrorCode::Busy.into());
    for (error, said) in [(unreachable, vec![(0, true)]), (refused, vec![])] {
        bed.done.clear();
        bed.pull(1, 0, vec![5, 6], 1, 10);
        let (id, ..) = bed.pulls()[0];
        bed.input(Input::PullEnded(id, Err(error.clone())));
        assert_eq!((bed.sent(), links(&bed)), (vec![done(vec![5, 6], &error.to_string())], said));
    }

    bed.done.clear();
    bed.pull(1, 0, vec![5, 6], 1, 10);
    bed.say(SCHEDULER, ToAgent::Cancel { request_id: "other".into() });
    assert_eq!(bed.cancelled(), []);
    bed.say(SCHEDULER, ToAgent::Cancel { request_id: "r1".into() });
    let (id, ..) = bed.pulls()[0];
    assert_eq!(bed.cancelled(), [id]);
    assert_eq!(bed.sent(), []);
    bed.input(Input::PullEnded(id, Err(PullError::Stopped(ErrorCode::Cancelled.into()))));
    assert_eq!(bed.sent(), [done(vec![5, 6], "cancelled (0)")]);
}

#[test]
fn pulls_that_cannot_be_are_over_at_once() {
    for (block_ids, first_block, tokens) in
        [(vec![], 0, 4), (vec![1, 2], 0, 4), (vec![1], 1, 4), (vec![BLOCKS as u32], 0, 4), (vec![1], 0, 0)]
    {
        let mut bed = Bed::attached(1);
        bed.pull(1, 0, block_ids.clone(), first_block, tokens);
        assert!(bed.pulls().is_empty());
        let sent = bed.sent();
        assert!(
            matches!(&sent[..], [(_, ToConnector::PullDone { failed_blocks, error, .. })]
                if *failed_blocks == block_ids && error.starts_with("range")),
            "{sent:?}"
        );
    }
}

#[test]
fn connections_close_only_behind_the_last_copy() {
    let mut bed = Bed::attached(2);
    bed.hold(1, vec![7], 4);
    while bed.checksum_job().is_some() {}
    let claim = bed.open(1, 0, Epoch(1000), 4).unwrap();
    bed.pull(2, 1, vec![3], 0, 4);
    let (pull, ..) = bed.pulls()[0];
    // The clock was set back: epochs grow all the same.
    bed.now.unix_ms = 10;
    bed.input(Input::Ended(worker(1)));
    assert_eq!(bed.core.attachment(), Attachment { epoch: Epoch(1001), ..Attachment::default() });
    assert_eq!(bed.cancelled(), [pull]);
    assert!(claim.ended().is_cancelled());
    assert_eq!(bed.open(1, 0, Epoch(1000), 4).err(), Some(ErrorCode::StaleEpoch));
    assert_eq!((bed.closed(), bed.sent()), ([].into(), vec![]));
    // What the dying connections still say has no effect.
    bed.hold(3, vec![8], 4);
    bed.pull(4, 0, vec![9], 0, 4);
    assert!(bed.checksum_job().is_none());
    assert_eq!(bed.pulls().len(), 1);
    bed.input(Input::PullEnded(pull, Err(PullError::Stopped(ErrorCode::Cancelled.into()))));
    assert_eq!(bed.closed(), [].into());
    drop(claim);
    bed.wait(0);
    assert_eq!(bed.closed(), [SCHEDULER, worker(0), worker(1)].into());
    let words = bed.sent();
    assert!(words.iter().all(|(_, message)| !matches!(message, ToConnector::Released { .. })), "{words:?}");
}

#[test]
fn another_instance_takes_over_with_a_new_epoch() {
    let mut bed = Bed::attached(1);
    bed.hold(1, vec![7], 4);
    let job = bed.checksum_job();
    bed.attach("j", ConnId(10), Side::Scheduler, 1);
    assert_eq!(bed.core.attachment().epoch, Epoch(5000));
    bed.attach("j", ConnId(11), Side::Worker(0), 1);
    assert!(bed.core.attachment().can_transfer);
    assert_eq!(bed.closed(), [].into());
    drop(job);
    bed.wait(0);
    assert_eq!(bed.closed(), [SCHEDULER, worker(0)].into());
    assert!(bed.core.attachment().can_transfer);
    assert_eq!(bed.core.attachment().epoch, Epoch(5000));
}

#[test]
fn a_part_that_connects_again_begins_a_new_life() {
    let mut bed = Bed::attached(1);
    bed.attach("i", ConnId(10), Side::Scheduler, 1);
    assert_eq!(bed.closed(), [SCHEDULER, worker(0)].into());
    let attachment = bed.core.attachment();
    assert_eq!((attachment.epoch, attachment.can_transfer), (Epoch(5000), false));
    bed.attach("i", ConnId(11), Side::Worker(0), 1);
    assert!(bed.core.attachment().can_transfer);
}

#[test]
fn a_stopping_agent_waits_for_its_copies() {
    let mut bed = Bed::attached(1);
    bed.input(Input::Connected(ConnId(10)));
    bed.pull(1, 0, vec![3], 0, 4);
    let (pull, ..) = bed.pulls()[0];
    bed.input(Input::Stop);
    assert_eq!(bed.closed(), [ConnId(10)].into());
    assert!(!bed.core.has_stopped());
    bed.input(Input::Connected(ConnId(12)));
    assert_eq!(bed.closed(), [ConnId(12)].into());
    bed.input(Input::PullEnded(pull, Err(PullError::Stopped(ErrorCode::Cancelled.into()))));
    assert_eq!(bed.closed(), [SCHEDULER, worker(0)].into());
    assert!(bed.core.has_stopped());
}
