//! A fleet's worth of fixtures: certificates, memories, and sources on top of hold tables.

#![allow(dead_code, unreachable_pub, reason = "each test uses its part")]

pub mod two;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use baton_kernels::{BlockLayout, BlockMemory, EngineMemory, Guard};
use baton_kv_transfer::checksum::Checksums;
use baton_kv_transfer::tls::Identity;
use baton_kv_transfer::{
    Endpoint, EndpointConfig, Growth, HeldBlocks, Hold, HoldTable, Limits, Making, Peer, PullRequest,
    RankHold, ReleasedHold, SendReport, Source,
};
use baton_proto::connector::{HeadSpan, Heads, Layout, Piece};
use baton_proto::wire::{LayoutFingerprint, PullHeader, WireDtype, WireError};
use baton_proto::{BlockHash, Epoch, TransferId};
use rcgen::{CertificateParams, CertifiedIssuer, KeyPair};

/// An authority, and what it has issued.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn issue(&self, name: &str) -> Identity {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let cert = params.signed_by(&key, &self.0).unwrap();
        let key = rustls_pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into());
        Identity::new(vec![self.0.der().clone()], vec![cert.der().clone()], key)
    }
}

impl Authority {
    /// Writes `ca.pem`, and `NAME.pem` and `NAME.key` for each name.
    pub fn write(&self, dir: &std::path::Path, names: &[&str]) -> std::io::Result<()> {
        std::fs::write(dir.join("ca.pem"), self.0.pem())?;
        for name in names {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec![(*name).to_owned()]).unwrap();
            let cert = params.signed_by(&key, &self.0).unwrap();
            std::fs::write(dir.join(format!("{name}.pem")), cert.pem())?;
            std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem())?;
        }
        Ok(())
    }
}

/// How blocks of a test lie: `pieces` runs of `piece_bytes` each, one storage per piece.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub pieces: u32,
    pub piece_bytes: u32,
    pub blocks: u64,
}

impl Shape {
    pub fn block_bytes(&self) -> usize {
        self.pieces as usize * self.piece_bytes as usize
    }

    pub fn layout(&self) -> Layout {
        let piece = |storage| Piece {
            storage,
            offset: 0,
            stride: u64::from(self.piece_bytes),
            len: self.piece_bytes,
        };
        Layout {
            facts: BTreeMap::from([("dtype".into(), "bfloat16".into())]),
            order: BTreeMap::new(),
            pieces: (0..self.pieces).map(piece).collect(),
            heads: None,
        }
    }

    pub fn fingerprint(&self) -> LayoutFingerprint {
        LayoutFingerprint::of(&self.layout())
    }

    /// Of blocks whose pieces are layers of 16 tokens and heads of 256 bytes, one token or one head after another.
    pub fn by_heads(&self, by_token: bool) -> BlockLayout {
        let heads = self.piece_bytes / (16 * 256);
        let (head_stride, token_stride) = if by_token { (256, heads * 256) } else { (16 * 256, 256) };
        let span = |piece| HeadSpan {
            start: piece * self.piece_bytes,
            head_stride,
            dims: vec![(16, token_stride)],
            len: 256,
        };
        let layout = Layout {
            order: BTreeMap::from([("by_token".into(), by_token.to_string())]),
            heads: Some(Heads { total: heads, count: heads, spans: (0..self.pieces).map(span).collect() }),
            ..self.layout()
        };
        BlockLayout::of(&layout, 1).unwrap()
    }

    /// A memory of its own, and the descriptors behind it.
    pub fn memory(&self) -> Arc<EngineMemory> {
        let len = u64::from(self.piece_bytes) * self.blocks;
        let storages = (0..self.pieces).map(|_| (memfd(len), len)).collect();
        EngineMemory::new(storages, &self.layout(), self.blocks).unwrap()
    }
}

impl From<Shape> for BlockLayout {
    fn from(shape: Shape) -> Self {
        shape.fingerprint().into()
    }
}

pub fn memfd(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("kv", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    fd
}

/// Bytes that differ from block to block and from seed to seed. As bf16 they are values from 2^-7 to 2, of either sign.
pub fn content(len: usize, block: u32, seed: u64) -> Vec<u8> {
    let mut bytes = noise(len, block, seed);
    for value in bytes.as_chunks_mut::<2>().0 {
        value[1] = value[1] & 0x83 | 0x3C;
    }
    bytes
}

/// The same, and any bytes.
pub fn noise(len: usize, block: u32, seed: u64) -> Vec<u8> {
    let mut state = seed ^ (u64::from(block) << 32) ^ 0x9e37_79b9_7f4a_7c15;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub fn fill(memory: &EngineMemory, blocks: impl IntoIterator<Item = u32>, seed: u64) {
    for block in blocks {
        memory.write(block, 0, &content(memory.block_bytes(), block, seed)).unwrap();
    }
}

pub fn read(memory: &Arc<EngineMemory>, block: u32) -> Vec<u8> {
    let guard: Guard = Arc::new(());
    memory.clone().read(block, guard).unwrap().concat()
}

pub fn hash(block: u32) -> BlockHash {
    BlockHash::from_bytes(u128::from(block + 1).to_be_bytes())
}

/// An agent's session as far as transfers are concerned.
pub struct TableSource {
    pub table: Mutex<HoldTable>,
    pub reports: Mutex<Vec<SendReport>>,
    pub released: Mutex<Vec<ReleasedHold>>,
}

impl TableSource {
    pub fn new(epoch: u64) -> Arc<Self> {
        Arc::new_cyclic(|this: &std::sync::Weak<Self>| {
            let wake = Arc::new({
                let this = this.clone();
                // A real session is notified and polls elsewhere; here a thread does.
                move || {
                    let this = this.clone();
                    std::thread::spawn(move || {
                        if let Some(this) = this.upgrade() {
                            this.poll(Instant::now());
                        }
                    });
                }
            });
            Self {
                table: Mutex::new(HoldTable::new(Epoch(epoch), 1000, wake)),
                reports: Mutex::default(),
                released: Mutex::default(),
            }
        })
    }

    pub fn poll(&self, now: Instant) {
        let released = self.table.lock().unwrap().poll(now);
        self.released.lock().unwrap().extend(released);
    }

    /// Holds a prompt of so many blocks, of which the first are computed. Their checksums are still to be made.
    pub fn take(
        &self,
        id: TransferId,
        memory: &Arc<impl BlockMemory>,
        layout: impl Into<BlockLayout>,
        (block_ids, blocks): (Vec<u32>, usize),
        lease: Duration,
    ) -> Vec<Making> {
        let checksums = Checksums::pending(blocks);
        let rank = RankHold { memory: memory.clone(), layout: layout.into(), checksums };
        let hold = Hold {
            request_id: id.to_string(),
            transfer_id: id,
            hashes: (0..blocks as u32).map(hash).collect(),
            block_ids,
            ranks: vec![rank],
        };
        self.table.lock().unwrap().insert(Instant::now(), hold, lease).unwrap()
    }

    /// Holds blocks whose checksums are still to be made. The hold is kept for as long as the guard, too.
    pub fn hold_unchecked(
        &self,
        id: TransferId,
        memory: &Arc<impl BlockMemory>,
        layout: impl Into<BlockLayout>,
        block_ids: Vec<u32>,
        lease: Duration,
    ) -> (Arc<Checksums>, Guard) {
        let blocks = block_ids.len();
        let making = self.take(id, memory, layout, (block_ids, blocks), lease).remove(0);
        (making.checksums, making.guard)
    }

    /// Holds blocks, with checksums made at once.
    pub fn hold(
        &self,
        id: TransferId,
        memory: &Arc<impl BlockMemory>,
        layout: impl Into<BlockLayout>,
        block_ids: Vec<u32>,
        lease: Duration,
    ) {
        let blocks = block_ids.len();
        let making = self.take(id, memory, layout, (block_ids, blocks), lease);
        making.iter().for_each(|making| making.run().unwrap());
    }

    /// More of its blocks are computed.
    pub fn grow(&self, id: TransferId, first: usize, block_ids: Vec<u32>) {
        let growth = Growth { first, block_ids };
        let grown = self.table.lock().unwrap().grow(Instant::now(), &id.to_string(), 0, growth);
        grown.unwrap().expect("it is live").run().unwrap();
    }

    /// Waits until something is released.
    pub async fn released(&self) -> ReleasedHold {
        loop {
            self.poll(Instant::now());
            if let Some(released) = self.released.lock().unwrap().pop() {
                return released;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub async fn report(&self) -> SendReport {
        loop {
            if let Some(report) = self.reports.lock().unwrap().pop() {
                return report;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Source for TableSource {
    fn open(&self, pull: &PullHeader) -> Result<HeldBlocks, WireError> {
        self.table.lock().unwrap().open(Instant::now(), pull)
    }

    fn served(&self, report: SendReport) {
        self.reports.lock().unwrap().push(report);
    }
}

pub fn id(number: u8) -> TransferId {
    TransferId::from_bytes([number; 16])
}

pub fn endpoint(identity: Identity, source: Arc<TableSource>, limits: Limits) -> Endpoint {
    let listen = "127.0.0.1:0".parse().unwrap();
    Endpoint::bind(EndpointConfig { listen, identity, limits }, source).unwrap()
}

pub fn peer(name: &str, endpoint: &Endpoint) -> Peer {
    Peer { engine_id: name.parse().unwrap(), address: endpoint.local_addr().to_string() }
}

pub fn request(peer: Peer, id: TransferId, epoch: u64, shape: Shape, first: u32, blocks: u32) -> PullRequest {
    PullRequest {
        peer,
        transfer_id: id,
        epoch: Epoch(epoch),
        layout: shape.fingerprint().into(),
        dtype: WireDtype::AsStored,
        first_block: first,
        last_hash: hash(first + blocks - 1),
        rank: 0,
        ranks: 1,
        deadline: Duration::from_secs(20),
    }
}
