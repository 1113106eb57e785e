//! Blocks between engines of other tensor parallelism and order of dimensions, through real endpoints. Values are put where
//! vLLM's shapes have them, by their definition, and looked for there.

mod support;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use baton_kernels::{BlockLayout, BlockMemory, EngineMemory, Guard, MemoryError};
use baton_kv_transfer::checksum::Checksums;
use baton_kv_transfer::{
    Endpoint, EndpointConfig, HeldBlocks, Hold, HoldEnd, Limits, PullError, PullReport, PullRequest,
    RankHold, Source,
};
use baton_proto::connector::{HeadSpan, Heads, Layout, Piece};
use baton_proto::wire::{BlockForm, ErrorCode, PullHeader, WireDtype, WireError};
use baton_proto::{Epoch, TransferId};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use support::two::LEASE;
use support::{Authority, TableSource, endpoint, hash, memfd, peer};

/// How K and V lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Halves {
    /// All blocks of K, then all of V.
    Apart,
    /// K and V of a block one after the other.
    Together,
    /// K and V of a token in one head one after the other.
    Cell,
    /// One vector for each token, as long as both; every rank has it.
    Latent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dims {
    Nhd,
    Hnd,
}

/// The cache of one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    layers: u32,
    tokens: u32,
    /// Of the model.
    heads: u32,
    /// Bytes of K, or V, of a token in a head.
    head_bytes: u32,
    halves: Halves,
    dims: Dims,
    ranks: u32,
}

const BLOCKS: u64 = 12;

impl Shape {
    fn rank_heads(&self) -> u32 {
        (self.heads / self.ranks).max(1)
    }

    /// The model's number of a head of a rank, as vLLM spreads them.
    fn head(&self, rank: u32, head: u32) -> u32 {
        let replicas = (self.ranks / self.heads).max(1);
        rank / replicas * self.rank_heads() + head
    }

    fn half_bytes(&self) -> u32 {
        self.tokens * self.rank_heads() * self.head_bytes
    }

    fn layer_bytes(&self) -> u32 {
        2 * self.half_bytes()
    }

    fn storage_bytes(&self) -> u64 {
        u64::from(self.layer_bytes()) * BLOCKS
    }

    /// Where the bytes of a head's K or V of a token begin in a layer's storage.
    fn place(&self, block: u32, half: u32, head: u32, token: u32) -> u64 {
        let [block, half, head, token] = [block, half, head, token].map(u64::from);
        let (heads, tokens) = (u64::from(self.rank_heads()), u64::from(self.tokens));
        let inner = match self.dims {
            Dims::Nhd => token * heads + head,
            Dims::Hnd => head * tokens + token,
        };
        let of_block = heads * tokens;
        let cell = match self.halves {
            Halves::Apart => (half * BLOCKS + block) * of_block + inner,
            Halves::Together => (block * 2 + half) * of_block + inner,
            Halves::Cell | Halves::Latent => (block * of_block + inner) * 2 + half,
        };
        cell * u64::from(self.head_bytes)
    }

    /// What a connector says of it, of a model of this name.
    fn layout(&self, rank: u32, model: &str) -> Layout {
        let (half, layer, count) = (self.half_bytes(), self.layer_bytes(), self.rank_heads());
        let in_cells = matches!(self.halves, Halves::Cell | Halves::Latent);
        let len = if in_cells { 2 * self.head_bytes } else { self.head_bytes };
        let (head_stride, token_stride) = match self.dims {
            Dims::Nhd => (len, count * len),
            Dims::Hnd => (self.tokens * len, len),
        };
        let mut dims = vec![(self.tokens, token_stride)];
        if !in_cells {
            dims.push((2, half));
        }
        let span = |at| HeadSpan { start: at * layer, head_stride, dims: dims.clone(), len };
        let piece = |storage| match self.halves {
            Halves::Apart => {
                let half_of = |i| Piece {
                    storage,
                    offset: i * u64::from(half) * BLOCKS,
                    stride: half.into(),
                    len: half,
                };
                vec![half_of(0), half_of(1)]
            }
            _ => vec![Piece { storage, offset: 0, stride: layer.into(), len: layer }],
        };
        Layout {
            facts: [("model", model), ("dtype", "bfloat16")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            order: BTreeMap::from([("rank".to_owned(), format!("{rank} of {self:?}"))]),
            pieces: (0..self.layers).flat_map(piece).collect(),
            heads: Some(Heads { total: self.heads, count, spans: (0..self.layers).map(span).collect() }),
        }
    }
}

/// One rank's memory, and the files behind it.
struct Rank {
    memory: Arc<EngineMemory>,
    layout: BlockLayout,
    files: Vec<OwnedFd>,
}

struct Engine {
    shape: Shape,
    ranks: Vec<Rank>,
}

/// The bytes of a vector: of a prompt's block, and of the model's head.
fn value(shape: &Shape, block: u32, layer: u32, half: u32, head: u32, token: u32) -> Vec<u8> {
    let at = [block, layer, half, head, token].iter().fold(0u64, |at, i| at * 131 + u64::from(*i) + 1);
    support::content(shape.head_bytes as usize, block, at)
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> {
    let bf16 = |value: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*value)) << 16);
    bytes.as_chunks::<2>().0.iter().map(bf16)
}

impl Engine {
    fn new(shape: Shape, model: &str) -> Self {
        let rank = |rank| {
            let files: Vec<OwnedFd> = (0..shape.layers).map(|_| memfd(shape.storage_bytes())).collect();
            let layout = shape.layout(rank, model);
            let given = files.iter().map(|file| (file.try_clone().unwrap(), shape.storage_bytes())).collect();
            let memory = EngineMemory::new(given, &layout, BLOCKS).unwrap();
            Rank { memory, layout: BlockLayout::of(&layout, shape.ranks).unwrap(), files }
        };
        Self { shape, ranks: (0..shape.ranks).map(rank).collect() }
    }

    /// Each place of a block: the rank, the layer, where in its storage, and what belongs there.
    fn places(&self, block: u32, content: u32) -> Vec<(usize, usize, u64, Vec<u8>)> {
        let shape = &self.shape;
        let mut places = Vec::new();
        for rank in 0..shape.ranks {
            for layer in 0..shape.layers {
                for (half, head, token) in (0..2).flat_map(|half| {
                    (0..shape.rank_heads())
                        .flat_map(move |head| (0..shape.tokens).map(move |token| (half, head, token)))
                }) {
                    let bytes = value(shape, content, layer, half, shape.head(rank, head), token);
                    places.push((
                        rank as usize,
                        layer as usize,
                        shape.place(block, half, head, token),
                        bytes,
                    ));
                }
            }
        }
        places
    }

    /// Puts a prompt's blocks, by their numbers in it, into these of memory.
    fn fill(&self, blocks: &[u32]) {
        for (content, block) in (0..).zip(blocks) {
            for (rank, layer, at, bytes) in self.places(*block, content) {
                let file = self.ranks[rank].files[layer].as_fd();
                assert_eq!(rustix::io::pwrite(file, &bytes, at).unwrap(), bytes.len());
            }
        }
    }

    /// Whether a prompt's block `content` lies in `block`, on every rank.
    fn has(&self, block: u32, content: u32) -> bool {
        self.places(block, content).into_iter().all(|(rank, layer, at, bytes)| {
            let mut is = vec![0; bytes.len()];
            rustix::io::pread(self.ranks[rank].files[layer].as_fd(), &mut is[..], at).unwrap();
            is == bytes
        })
    }

    /// Whether it lies there but for the error that packing may make, and how many values are not what they were.
    fn has_nearly(&self, block: u32, content: u32) -> Option<usize> {
        // All values are below 2, and so the largest of any segment.
        let near = |x: f32, y: f32| {
            let error = x.abs() / 16.0 + 2.0 / 448.0 / 1024.0;
            (x - y).abs() <= error + (x.abs() + error) / 256.0
        };
        let mut changed = 0;
        for (rank, layer, at, bytes) in self.places(block, content) {
            let mut is = vec![0; bytes.len()];
            rustix::io::pread(self.ranks[rank].files[layer].as_fd(), &mut is[..], at).unwrap();
            for (x, y) in floats(&bytes).zip(floats(&is)) {
                changed += usize::from(x != y);
                if !near(x, y) {
                    return None;
                }
            }
        }
        Some(changed)
    }

    fn hold(&self, source: &TableSource, id: TransferId, block_ids: &[u32]) {
        let rank = |rank: &Rank| RankHold {
            memory: rank.memory.clone(),
            layout: rank.layout.clone(),
            checksums: Checksums::pending(block_ids.len()),
        };
        let ranks: Vec<RankHold> = self.ranks.iter().map(rank).collect();
        let hold = Hold {
            request_id: id.to_string(),
            transfer_id: id,
            hashes: (0..block_ids.len() as u32).map(hash).collect(),
            block_ids: block_ids.to_vec(),
            ranks,
        };
        let making = source.table.lock().unwrap().insert(std::time::Instant::now(), hold, LEASE).unwrap();
        making.iter().for_each(|making| making.run().unwrap());
    }

    fn request(
        &self,
        bed: &Bed,
        id: TransferId,
        rank: u32,
        first: u32,
        blocks: u32,
        dtype: WireDtype,
    ) -> PullRequest {
        PullRequest {
            peer: peer("holder", &bed.holder),
            transfer_id: id,
            epoch: Epoch(1),
            layout: self.ranks[rank as usize].layout.clone(),
            dtype,
            first_block: first,
            last_hash: hash(first + blocks - 1),
            rank,
            ranks: self.shape.ranks,
            deadline: Duration::from_secs(20),
        }
    }

    /// Pulls a run of a prompt's blocks, one rank after another. The first that fails ends it.
    async fn pull(
        &self,
        bed: &Bed,
        id: TransferId,
        first: u32,
        block_ids: &[u32],
        dtype: WireDtype,
    ) -> Result<Vec<PullReport>, PullError> {
        let mut reports = Vec::new();
        for rank in 0..self.shape.ranks {
            let request = self.request(bed, id, rank, first, block_ids.len() as u32, dtype);
            let memory = self.ranks[rank as usize].memory.clone();
            reports.push(bed.puller.pull(request, memory, block_ids.to_vec()).await?);
        }
        Ok(reports)
    }
}

struct Bed {
    source: Arc<TableSource>,
    holder: Endpoint,
    puller: Endpoint,
}

impl Bed {
    fn new() -> Self {
        let authority = Authority::new();
        let source = TableSource::new(1);
        // What is copied directly goes as it lies.
        let limits = Limits { direct: false, ..Limits::default() };
        let holder = endpoint(authority.issue("holder"), source.clone(), limits.clone());
        let puller = endpoint(authority.issue("puller"), TableSource::new(1), limits);
        Self { source, holder, puller }
    }
}

fn id(number: u32) -> TransferId {
    TransferId::from_bytes(u128::from(number).to_be_bytes())
}

/// Two heads on each of two ranks, token by token.
const NHD: Shape = Shape {
    layers: 2,
    tokens: 4,
    heads: 4,
    head_bytes: 24,
    halves: Halves::Apart,
    dims: Dims::Nhd,
    ranks: 2,
};

fn shape_of(model: (u32, u32, u32, u32), latent: bool) -> impl Strategy<Value = Shape> {
    let (layers, tokens, heads, head_bytes) = model;
    let halves = prop_oneof![Just(Halves::Apart), Just(Halves::Together), Just(Halves::Cell)];
    let dims = prop_oneof![Just(Dims::Nhd), Just(Dims::Hnd)];
    let ranks = prop_oneof![Just(1u32), Just(2), Just(4), Just(8)];
    (halves, dims, ranks).prop_map(move |(halves, dims, ranks)| {
        let halves = if latent { Halves::Latent } else { halves };
        Shape { layers, tokens, heads, head_bytes, halves, dims, ranks }
    })
}

/// The caches of two engines of one model.
fn engines() -> impl Strategy<Value = (Shape, Shape)> {
    let heads = prop_oneof![Just(1u32), Just(2), Just(4), Just(8)];
    let head_bytes = prop_oneof![Just(16u32), Just(7), Just(128)];
    let model = (1u32..3, prop_oneof![Just(1u32), Just(4), Just(16)], heads, head_bytes, any::<bool>());
    model.prop_flat_map(|(layers, tokens, heads, head_bytes, latent)| {
        let model = (layers, tokens, if latent { 1 } else { heads }, head_bytes);
        (shape_of(model, latent), shape_of(model, latent))
    })
}

/// Has pairs of engines exchange blocks, and looks at what arrived: `arrived` sees what was asked of each puller.
fn exchange(
    pairs: impl Strategy<Value = (Shape, Shape)>,
    dtype: WireDtype,
    arrived: impl Fn(Shape, &Engine, &[PullReport]) -> Result<(), TestCaseError>,
) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let bed = runtime.block_on(async { Bed::new() });
    let number = std::cell::Cell::new(0);
    let config = ProptestConfig { cases: 120, failure_persistence: None, ..ProptestConfig::default() };
    let exchange = |(from, to): (Shape, Shape)| {
        number.set(number.get() + 1);
        let id = id(number.get());
        runtime.block_on(async {
            let (theirs, ours) = (Engine::new(from, "m"), Engine::new(to, "m"));
            theirs.fill(&[9, 0, 4]);
            theirs.hold(&bed.source, id, &[9, 0, 4]);
            let reports = ours.pull(&bed, id, 1, &[3, 7], dtype).await.unwrap();
            for report in &reports {
                prop_assert_eq!((report.corrupt, report.failed.len()), (0, 0));
            }
            arrived(from, &ours, &reports)?;
            let untouched = [0, 1, 2, 4, 5, 6, 8, 9, 10, 11];
            for rank in &ours.ranks {
                for block in untouched {
                    let bytes = rank.memory.clone().read(block, Arc::new(())).unwrap().concat();
                    prop_assert!(bytes.iter().all(|byte| *byte == 0), "block {} was written", block);
                }
            }
            let released = bed.source.released().await;
            prop_assert_eq!((released.transfer_id, released.end), (id, HoldEnd::Finished));
            Ok(())
        })
    };
    if let Err(error) = TestRunner::new(config).run(&pairs, exchange) {
        panic!("{error}");
    }
}

#[test]
fn any_two_engines_of_a_model_exchange_blocks() {
    exchange(engines(), WireDtype::AsStored, |from, ours, reports| {
        let form = if from == ours.shape { BlockForm::AsItLies } else { BlockForm::Common };
        prop_assert!(reports.iter().all(|report| report.form == form));
        prop_assert!(ours.has(3, 1) && ours.has(7, 2), "values are not where they belong");
        Ok(())
    });
}

#[test]
fn packed_blocks_of_any_two_engines_arrive_within_the_stated_error() {
    // A value does not lie across rows.
    let pairs = engines().prop_filter("bf16", |(from, _)| from.head_bytes.is_multiple_of(2));
    exchange(pairs, WireDtype::Fp8, |_, ours, reports| {
        let values = ours.ranks[0].memory.block_bytes() / 2;
        let scales = (ours.shape.rank_heads() * ours.shape.layers) as usize;
        for report in reports {
            prop_assert_eq!(
                (report.form, report.bytes),
                (BlockForm::Packed, 2 * (values + 4 * scales) as u64)
            );
        }
        for (block, content) in [(3, 1), (7, 2)] {
            let changed = ours.has_nearly(block, content);
            prop_assert!(changed.is_some(), "a value is not within the error");
            prop_assert!(values < 512 || changed > Some(0), "nothing was packed");
        }
        Ok(())
    });
}

/// Serves packed blocks that nobody can have packed so.
struct Garbled(Arc<TableSource>);

/// A block of such bytes.
struct Bytes0xff(usize);

impl BlockMemory for Bytes0xff {
    fn block_bytes(&self) -> usize {
        self.0
    }

    fn num_blocks(&self) -> u64 {
        BLOCKS
    }

    fn read(self: Arc<Self>, _: u32, _: Guard) -> Result<Vec<bytes::Bytes>, MemoryError> {
        Ok(vec![vec![0xff; self.0].into()])
    }

    fn write(&self, _: u32, _: usize, _: &[u8]) -> Result<(), MemoryError> {
        Err(MemoryError::ReadOnly)
    }
}

impl Source for Garbled {
    fn open(&self, pull: &PullHeader) -> Result<HeldBlocks, WireError> {
        let mut held = self.0.open(pull)?;
        if held.form == BlockForm::Packed {
            // Without the checksums of hold time, those of what travels are right.
            held.memory = Arc::new(Bytes0xff(held.memory.block_bytes()));
            held.parts = Arc::new([]);
        }
        Ok(held)
    }
}

#[tokio::test]
async fn a_block_that_is_packed_wrongly_fails_its_pull_and_nothing_else() {
    let mut bed = Bed::new();
    let authority = Authority::new();
    let config = EndpointConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        identity: authority.issue("holder"),
        limits: Limits::default(),
    };
    bed.holder = Endpoint::bind(config, Arc::new(Garbled(bed.source.clone()))).unwrap();
    bed.puller = endpoint(authority.issue("puller"), TableSource::new(1), Limits::default());
    let (theirs, ours) = (Engine::new(NHD, "m"), Engine::new(Shape { ranks: 1, ..NHD }, "m"));
    for number in [1, 2] {
        theirs.fill(&[1, 2]);
        theirs.hold(&bed.source, id(number), &[1, 2]);
    }
    let error = ours.pull(&bed, id(1), 0, &[5, 6], WireDtype::Fp8).await.unwrap_err();
    let PullError::Memory(words) = &error else { panic!("{error}") };
    assert!(words.starts_with("block 5 is packed wrongly: segment 0 has the scale NaN"), "{words}");
    for block in 0..BLOCKS as u32 {
        let is = ours.ranks[0].memory.clone().read(block, Arc::new(())).unwrap().concat();
        assert!(is.iter().all(|byte| *byte == 0), "block {block} was written");
    }
    // By the same connection.
    ours.pull(&bed, id(2), 0, &[5, 6], WireDtype::AsStored).await.unwrap();
    assert!(ours.has(5, 0) && ours.has(6, 1));
    assert_eq!(bed.puller.stats().connections, 1);
}

#[tokio::test]
async fn the_hold_stays_until_every_rank_of_the_puller_has_its_heads() {
    let bed = Bed::new();
    let theirs = Engine::new(NHD, "m");
    let ours = Engine::new(Shape { ranks: 4, dims: Dims::Hnd, ..NHD }, "m");
    theirs.fill(&[1, 2]);
    theirs.hold(&bed.source, id(1), &[1, 2]);
    for rank in [2, 0, 3] {
        let pull = || {
            let memory = ours.ranks[rank as usize].memory.clone();
            bed.puller.pull(ours.request(&bed, id(1), rank, 0, 2, WireDtype::AsStored), memory, vec![5, 6])
        };
        assert!(pull().await.unwrap().failed.is_empty());
        // Once is once, when the holder has heard of it.
        bed.source.report().await;
        let again = pull().await;
        assert_eq!(again, Err(PullError::Refused(ErrorCode::Released.into())));
        bed.source.poll(std::time::Instant::now());
        assert!(bed.source.released.lock().unwrap().is_empty(), "rank 1 has not pulled");
    }
    let last = bed.puller.pull(
        ours.request(&bed, id(1), 1, 0, 2, WireDtype::AsStored),
        ours.ranks[1].memory.clone(),
        vec![5, 6],
    );
    assert!(last.await.unwrap().failed.is_empty());
    assert_eq!(bed.source.released().await.end, HoldEnd::Finished);
    assert!(ours.has(5, 0) && ours.has(6, 1));
    let bytes = 2 * 2 * u64::from(NHD.layer_bytes() * NHD.layers);
    assert_eq!(bed.puller.stats().received_bytes, bytes, "each rank gets what it needs and no more");
}

#[tokio::test]
async fn memory_that_changed_under_its_hold_fails_its_blocks_only() {
    let bed = Bed::new();
    let (theirs, ours) = (Engine::new(NHD, "m"), Engine::new(Shape { ranks: 1, ..NHD }, "m"));
    theirs.fill(&[1, 2, 3]);
    theirs.hold(&bed.source, id(1), &[1, 2, 3]);
    // Before the checksums of what travels are made: those made at hold time have to tell.
    theirs.ranks[1].memory.write(2, 9, b"not what was held").unwrap();
    let reports = ours.pull(&bed, id(1), 0, &[5, 6, 7], WireDtype::AsStored).await.unwrap();
    assert_eq!((&reports[0].failed[..], reports[0].corrupt), (&[1][..], 2));
    assert!(ours.has(5, 0) && ours.has(7, 2) && !ours.has(6, 1));
    assert_eq!(bed.source.report().await.result, Err(WireError::new(ErrorCode::CorruptBlock, 1)));
}

#[tokio::test]
async fn engines_that_cannot_exchange_heads_are_refused_before_any_byte_moves() {
    let bed = Bed::new();
    let theirs = Engine::new(NHD, "m");
    theirs.fill(&[1]);
    theirs.hold(&bed.source, id(1), &[1]);
    let one = Shape { ranks: 1, ..NHD };
    let refused = PullError::Refused(WireError::new(
        ErrorCode::LayoutMismatch,
        theirs.ranks[0].memory.block_bytes() as u64,
    ));
    for other in [
        Engine::new(one, "another"),
        Engine::new(Shape { tokens: 8, ..one }, "m"),
        Engine::new(Shape { heads: 8, ..one }, "m"),
        Engine::new(Shape { layers: 3, ..one }, "m"),
    ] {
        assert_eq!(
            other.pull(&bed, id(1), 0, &[5], WireDtype::AsStored).await,
            Err(refused.clone()),
            "{:?}",
            other.shape
        );
    }
    // Where the puller's heads cannot be told apart, and where the holder's cannot.
    let mut unknown = Engine::new(one, "m");
    unknown.ranks[0].layout.heads = None;
    assert_eq!(unknown.pull(&bed, id(1), 0, &[5], WireDtype::AsStored).await, Err(refused.clone()));
    let mut theirs = theirs;
    theirs.ranks[1].layout.heads = None;
    theirs.hold(&bed.source, id(2), &[2]);
    let ours = Engine::new(one, "m");
    assert_eq!(ours.pull(&bed, id(2), 0, &[5], WireDtype::AsStored).await, Err(refused));
    assert_eq!(bed.puller.stats().received_bytes, 0);
    assert!(ours.pull(&bed, id(1), 0, &[5], WireDtype::AsStored).await.is_ok(), "the hold is still there");
}

#[tokio::test]
async fn nothing_is_written_after_the_end_of_a_pull() {
    let bed = Bed::new();
    let shape = Shape { tokens: 64, head_bytes: 256, layers: 4, ..NHD };
    let (theirs, ours) = (Engine::new(shape, "m"), Engine::new(Shape { ranks: 1, ..shape }, "m"));
    let blocks: Vec<u32> = (0..BLOCKS as u32).collect();
    let memory = &ours.ranks[0].memory;
    for number in 0..16 {
        theirs.hold(&bed.source, id(number), &blocks);
        let pull = bed.puller.pull(
            ours.request(&bed, id(number), 0, 0, 12, WireDtype::AsStored),
            memory.clone(),
            blocks.clone(),
        );
        tokio::time::sleep(Duration::from_micros(700) * number).await;
        if number % 2 == 0 {
            pull.canceller().cancel();
            let _ = pull.await;
        } else {
            drop(pull);
        }
        let mark = vec![0xab; memory.block_bytes()];
        blocks.iter().for_each(|block| memory.write(*block, 0, &mark).unwrap());
        tokio::time::sleep(Duration::from_millis(3)).await;
        for block in &blocks {
            let is = memory.clone().read(*block, Arc::new(())).unwrap().concat();
            assert!(is == mark, "written after the end of pull {number}");
        }
    }
}
