//! Frames between agents, version 4.
//!
//! Frames travel on bidirectional QUIC streams, one stream per pull or probe; the states in which each frame may
//! come are told in `baton_kv_transfer::protocol`. The ALPN protocol [`ALPN`] names the major version of the whole
//! exchange; a peer that speaks another is refused while connecting. [`VERSION`] is also in every frame.
//!
//! # Layout
//! ```text
//! offset  bytes  field
//!      0      2  magic, "BK"
//!      2      1  version
//!      3      1  kind
//!      4      2  length of the body, little-endian
//!      6      2  zero
//!      8  4-104  body: the kind's archived struct (rkyv, little-endian, no relative pointers, no padding)
//! ```
//! A body has exactly its kind's length, so every frame has a fixed size and none exceeds [`MAX_FRAME`] bytes.
//! Bodies are checked on access, in aligned memory.
//!
//! | kind | frame | from | body | then |
//! |---|---|---|---|---|
//! | 1 | [`Frame::Pull`] | puller | [`PullHeader`] | |
//! | 2 | [`Frame::Accepted`] | holder | [`Accepted`] | |
//! | 3 | [`Frame::Refused`] | holder | [`WireError`] | end of stream |
//! | 4 | [`Frame::Block`] | holder | [`BlockHeader`] | the block's bytes |
//! | 5 | [`Frame::Credit`] | puller | bytes granted in all, 64 bit | |
//! | 6 | [`Frame::Again`] | puller | index of the block, 32 bit | |
//! | 7 | [`Frame::Finish`] | puller | [`WireError`], code 0 for success | end of stream |
//! | 8 | [`Frame::Probe`] | puller | [`Probe`] | |
//! | 9 | [`Frame::ProbeReply`] | holder | [`ProbeReply`] | that many zero bytes, end of stream |
//! | 10 | [`Frame::Near`] | puller | [`Near`] | |
//! | 11 | [`Frame::NearReply`] | holder | [`NearReply`] | end of stream |
//! | 12 | [`Frame::Direct`] | puller | [`Direct`] | a [`Frame::Pull`] |
//! | 13 | [`Frame::Memory`] | holder | bytes that follow, 32 bit | so many bytes of msgpack: a [`SharedMemory`] |
//! | 14 | [`Frame::Place`] | holder | number of a block in the holder's memory, 32 bit | |
//! | 15 | [`Frame::Later`] | holder | index of the block, 32 bit | |
//!
//! KV bytes are never part of a frame: they follow the [`Frame::Block`] that announces them. Kinds 12 to 14 travel on
//! Unix sockets between agents of one host only; there a [`Frame::Place`] stands where the bytes would.

mod near;

use std::collections::BTreeMap;
use std::fmt;

use rkyv::util::Align;
use rkyv::{Archive, Deserialize, Serialize, rancor};

use crate::block_hash::BlockHash;
use crate::connector::Layout;
use crate::ids::{Epoch, TransferId};

pub use near::{Direct, Near, NearReply, Purpose, SharedAllocation, SharedMemory, SharedStorages};

/// Version of the frames that this build writes and accepts.
pub const VERSION: u8 = 4;

/// ALPN protocol of connections between agents.
pub const ALPN: &[u8] = b"baton-kv/4";

/// Bytes before a frame's body.
pub const PREFIX: usize = 8;

/// Largest body, in bytes: that of [`Frame::Pull`].
pub const MAX_BODY: usize = 104;

/// Most tensor-parallel ranks of an engine.
pub const MAX_RANKS: u32 = 64;

/// Largest frame, in bytes.
pub const MAX_FRAME: usize = PREFIX + MAX_BODY;

const MAGIC: [u8; 2] = *b"BK";

/// Names what has to be equal on both sides of a transfer: either of a block as it lies in a worker's memory
/// ([`Self::of`]), or of what its heads contain, wherever they lie ([`Self::of_content`]).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayoutFingerprint([u8; 16]);

impl LayoutFingerprint {
    /// The fingerprint that consists of these bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Of all that decides what each byte of a block means that travels as it lies: both kinds of facts of a layout, and
    /// the lengths of its pieces in order. Where the pieces lie may differ.
    pub fn of(layout: &Layout) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("baton 2026-11 layout fingerprint v2");
        hash_facts(&mut hasher, &layout.facts);
        hash_facts(&mut hasher, &layout.order);
        for piece in &layout.pieces {
            hasher.update(&piece.len.to_le_bytes());
        }
        Self::finish(&hasher)
    }

    /// Of all that decides what a block contains in the common order, whatever the number of ranks and the order of
    /// dimensions: the layout's facts, the model's heads, and the bytes of one in a block.
    pub fn of_content(facts: &BTreeMap<String, String>, heads: u32, head_bytes: u64) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("baton 2026-11 content fingerprint v1");
        hash_facts(&mut hasher, facts);
        hasher.update(&heads.to_le_bytes());
        hasher.update(&head_bytes.to_le_bytes());
        Self::finish(&hasher)
    }

    fn finish(hasher: &blake3::Hasher) -> Self {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Self(bytes)
    }
}

fn hash_facts(hasher: &mut blake3::Hasher, facts: &BTreeMap<String, String>) {
    for text in facts.iter().flat_map(|(name, value)| [name, value]) {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    hasher.update(&u64::MAX.to_le_bytes());
}

impl fmt::Display for LayoutFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for LayoutFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LayoutFingerprint({self})")
    }
}

/// Why a transfer did not succeed. The number travels; the snake_case name is for metrics and messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum ErrorCode {
    /// The peer broke the protocol.
    Protocol = 1,
    /// The peer speaks another version; the detail is the version that is spoken here.
    Version = 2,
    /// No such hold.
    UnknownTransfer = 3,
    /// The epoch asked for is over; the detail is the current one.
    StaleEpoch = 4,
    /// The hold's lease ran out.
    LeaseExpired = 5,
    /// Blocks of the holder are of no use to the puller: their content differs, or where it lies does and the heads cannot be
    /// told apart; the detail is the holder's block size in bytes.
    LayoutMismatch = 6,
    /// The blocks were computed from other tokens or keys than asked for; the detail is the number of blocks held.
    ContentMismatch = 7,
    /// The blocks asked for are not all held; the detail is the number of blocks held.
    Range = 8,
    /// Too many transfers at once.
    Busy = 9,
    /// The deadline passed.
    Deadline = 10,
    /// The puller does not want the blocks any more.
    Cancelled = 11,
    /// Blocks arrived twice with bytes that do not match their checksum; the detail is how many.
    CorruptBlock = 12,
    /// The hold was released already: its blocks were pulled, or given up.
    Released = 13,
    /// A fault of the side that says so.
    Internal = 14,
    /// The peer sent nothing for too long.
    Stalled = 15,
    /// Blocks cannot be copied from memory to memory: something stands between the agents, or the memory is not shared.
    Elsewhere = 16,
}

impl ErrorCode {
    /// All codes.
    pub const ALL: [Self; 16] = [
        Self::Protocol,
        Self::Version,
        Self::UnknownTransfer,
        Self::StaleEpoch,
        Self::LeaseExpired,
        Self::LayoutMismatch,
        Self::ContentMismatch,
        Self::Range,
        Self::Busy,
        Self::Deadline,
        Self::Cancelled,
        Self::CorruptBlock,
        Self::Released,
        Self::Internal,
        Self::Stalled,
        Self::Elsewhere,
    ];

    /// The code with this number.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|code| *code as u16 == number)
    }

    /// Its name, for metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Protocol => "protocol",
            Self::Version => "version",
            Self::UnknownTransfer => "unknown_transfer",
            Self::StaleEpoch => "stale_epoch",
            Self::LeaseExpired => "lease_expired",
            Self::LayoutMismatch => "layout_mismatch",
            Self::ContentMismatch => "content_mismatch",
            Self::Range => "range",
            Self::Busy => "busy",
            Self::Deadline => "deadline",
            Self::Cancelled => "cancelled",
            Self::CorruptBlock => "corrupt_block",
            Self::Released => "released",
            Self::Internal => "internal",
            Self::Stalled => "stalled",
            Self::Elsewhere => "elsewhere",
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An [`ErrorCode`] and the number that goes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code} ({detail})")]
pub struct WireError {
    /// What went wrong.
    pub code: ErrorCode,
    /// See the code; 0 where it says nothing.
    pub detail: u64,
}

impl WireError {
    /// This error, with its detail.
    pub const fn new(code: ErrorCode, detail: u64) -> Self {
        Self { code, detail }
    }
}

impl From<ErrorCode> for WireError {
    fn from(code: ErrorCode) -> Self {
        Self { code, detail: 0 }
    }
}

/// Asks for a run of held blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PullHeader {
    /// Names the hold.
    pub transfer_id: TransferId,
    /// The holder's epoch when it held.
    pub epoch: Epoch,
    /// Of the puller's layout. Where the holder's worker of this rank has the same, blocks travel as they lie.
    pub layout: LayoutFingerprint,
    /// Of what the puller's heads contain, where it can take blocks in the common order too.
    pub content: Option<LayoutFingerprint>,
    /// What values may travel as. Where it is [`WireDtype::Fp8`] and the holder can pack its heads, it does.
    pub dtype: WireDtype,
    /// Hash of the last block asked for; it vouches for all blocks before it.
    pub last_hash: BlockHash,
    /// The first block asked for, counted from the prompt's start.
    pub first_block: u32,
    /// Blocks asked for; at least 1.
    pub blocks: u32,
    /// The pulling worker's tensor-parallel rank.
    pub rank: u32,
    /// Ranks of the pulling engine, 1 to [`MAX_RANKS`].
    pub ranks: u32,
    /// When the puller gives up, in milliseconds from now.
    pub deadline_ms: u32,
    /// Bytes of KV that the holder may send before it needs a [`Frame::Credit`].
    pub credit: u64,
}

/// The holder sends what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// Bytes of each block as it travels.
    pub block_bytes: u64,
    /// The form that they have.
    pub form: BlockForm,
}

/// What the values of KV travel as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WireDtype {
    /// What they are in memory: not a bit changes.
    #[default]
    AsStored,
    /// bf16 as e4m3 codes with a scale for each head of each layer in a block: half the bytes, and an error of up to 1/16.
    Fp8,
}

/// How the bytes of a block travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockForm {
    /// As they lie in the memory of either side's worker.
    AsItLies,
    /// In the common order: the heads of the puller's rank in order; of each all layers, in each all tokens, of each K
    /// before V.
    Common,
    /// The heads of the common order, each packed to fp8: a code for each value, then a scale for each layer.
    Packed,
}

impl WireDtype {
    fn number(self) -> u32 {
        u32::from(self == Self::Fp8)
    }

    fn from_number(number: u32) -> Option<Self> {
        [Self::AsStored, Self::Fp8].into_iter().find(|dtype| dtype.number() == number)
    }
}

impl BlockForm {
    /// What values are in it.
    pub fn dtype(self) -> WireDtype {
        match self {
            Self::AsItLies | Self::Common => WireDtype::AsStored,
            Self::Packed => WireDtype::Fp8,
        }
    }

    fn number(self) -> u32 {
        match self {
            Self::AsItLies => 0,
            Self::Common => 1,
            Self::Packed => 2,
        }
    }

    fn from_number(number: u32) -> Option<Self> {
        [Self::AsItLies, Self::Common, Self::Packed].into_iter().find(|form| form.number() == number)
    }
}

/// The bytes of one block follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockHeader {
    /// Counted from the first block of the pull.
    pub index: u32,
    /// XXH3-64 of the block's bytes as they travel, made of what they were when the hold was taken.
    pub checksum: u64,
}

/// Measures the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Bytes that the holder should send.
    pub bytes: u32,
}

/// The holder's answer to a [`Probe`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeReply {
    /// Bytes that follow; fewer than asked for where the holder limits probes.
    pub bytes: u32,
    /// Largest UDP payload, in bytes, that the holder has found the path to the puller to carry so far.
    pub mtu: u16,
}

/// Any frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Puller: opens a pull.
    Pull(PullHeader),
    /// Holder: blocks will follow.
    Accepted(Accepted),
    /// Holder: none will.
    Refused(WireError),
    /// Holder: the bytes of a block follow.
    Block(BlockHeader),
    /// Puller: KV bytes granted since the pull began, those of [`PullHeader::credit`] included. Never shrinks.
    Credit(u64),
    /// Puller: a block's bytes did not match its checksum; send it again. At most once per block.
    Again(u32),
    /// Puller: needs nothing more of this hold for its rank; `None` after success.
    Finish(Option<WireError>),
    /// Puller: opens a probe.
    Probe(Probe),
    /// Holder: zeroes follow.
    ProbeReply(ProbeReply),
    /// Puller: may blocks be copied from memory to memory?
    Near(Near),
    /// Holder: where they may.
    NearReply(NearReply),
    /// Puller, on a Unix socket: who it is; a pull follows.
    Direct(Direct),
    /// Holder, on a Unix socket: a [`SharedMemory`] of so many bytes follows.
    Memory(u32),
    /// Holder, on a Unix socket: where the block lies whose header came last.
    Place(u32),
    /// Holder: this block, the next one, is not held yet. Said again from time to time until it is.
    Later(u32),
}

/// Bytes that are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// They do not begin with the magic, or a reserved field is not zero.
    #[error("not a frame")]
    Magic,
    /// A version other than [`VERSION`].
    #[error("frame of version {0}, and {VERSION} is spoken here")]
    Version(u8),
    /// An unknown kind.
    #[error("frame of unknown kind {0}")]
    Kind(u8),
    /// Not the length that the kind has.
    #[error("frame of kind {kind} with a body of {len} bytes")]
    Length {
        /// The frame's kind.
        kind: u8,
        /// The length in its prefix.
        len: u16,
    },
    /// A field that may not hold what it holds.
    #[error("frame of kind {0} with an invalid body")]
    Body(u8),
}

impl From<FrameError> for WireError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Version(_) => Self::new(ErrorCode::Version, u64::from(VERSION)),
            _ => ErrorCode::Protocol.into(),
        }
    }
}

/// A frame as it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoded {
    bytes: [u8; MAX_FRAME],
    len: usize,
}

impl AsRef<[u8]> for Encoded {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

#[derive(Archive, Serialize, Deserialize)]
struct RawPull {
    transfer_id: [u8; 16],
    layout: [u8; 16],
    /// Zeros where there is none.
    content: [u8; 16],
    last_hash: [u8; 16],
    epoch: u64,
    credit: u64,
    first_block: u32,
    blocks: u32,
    rank: u32,
    ranks: u32,
    deadline_ms: u32,
    dtype: u32,
}

#[derive(Archive, Serialize, Deserialize)]
struct RawAccepted {
    block_bytes: u64,
    form: u32,
    zero: u32,
}

#[derive(Archive, Serialize, Deserialize)]
struct RawError {
    detail: u64,
    code: u16,
    zero: [u8; 6],
}

#[derive(Archive, Serialize, Deserialize)]
struct RawBlock {
    checksum: u64,
    index: u32,
    zero: u32,
}

#[derive(Archive, Serialize, Deserialize)]
struct RawCredit {
    granted: u64,
}

#[derive(Archive, Serialize, Deserialize)]
struct RawIndex {
    index: u32,
}

#[derive(Archive, Serialize, Deserialize)]
struct RawProbe {
    bytes: u32,
}

#[derive(Archive, Serialize, Deserialize)]
struct RawProbeReply {
    bytes: u32,
    mtu: u16,
    zero: u16,
}

#[derive(Archive, Serialize, Deserialize)]
struct RawNear {
    port: u16,
    zero: u16,
}

#[derive(Archive, Serialize, Deserialize)]
struct RawNearReply {
    name: [u8; 16],
    token: [u8; 16],
}

#[derive(Archive, Serialize, Deserialize)]
struct RawDirect {
    token: [u8; 16],
    purpose: u32,
}

#[derive(Archive, Serialize, Deserialize)]
struct RawMemory {
    len: u32,
}

#[derive(Archive, Serialize, Deserialize)]
struct RawPlace {
    block: u32,
}

const PULL: u8 = 1;
const ACCEPTED: u8 = 2;
const REFUSED: u8 = 3;
const BLOCK: u8 = 4;
const CREDIT: u8 = 5;
const AGAIN: u8 = 6;
const FINISH: u8 = 7;
const PROBE: u8 = 8;
const PROBE_REPLY: u8 = 9;
const NEAR: u8 = 10;
const NEAR_REPLY: u8 = 11;
const DIRECT: u8 = 12;
const MEMORY: u8 = 13;
const PLACE: u8 = 14;
const LATER: u8 = 15;

/// Length of the body of a kind.
const fn body_len(kind: u8) -> Option<usize> {
    Some(match kind {
        PULL => size_of::<ArchivedRawPull>(),
        ACCEPTED => size_of::<ArchivedRawAccepted>(),
        REFUSED | FINISH => size_of::<ArchivedRawError>(),
        BLOCK => size_of::<ArchivedRawBlock>(),
        CREDIT => size_of::<ArchivedRawCredit>(),
        AGAIN | LATER => size_of::<ArchivedRawIndex>(),
        PROBE => size_of::<ArchivedRawProbe>(),
        PROBE_REPLY => size_of::<ArchivedRawProbeReply>(),
        NEAR => size_of::<ArchivedRawNear>(),
        NEAR_REPLY => size_of::<ArchivedRawNearReply>(),
        DIRECT => size_of::<ArchivedRawDirect>(),
        MEMORY => size_of::<ArchivedRawMemory>(),
        PLACE => size_of::<ArchivedRawPlace>(),
        _ => return None,
    })
}

fn raw_error(error: Option<WireError>) -> RawError {
    let (code, detail) = error.map_or((0, 0), |error| (error.code as u16, error.detail));
    RawError { detail, code, zero: [0; 6] }
}

/// `Some(None)` where the number is 0, `None` where it may not be what it is. A number that this build does not
/// know stands for [`ErrorCode::Internal`] with that number as its detail.
fn wire_error(raw: &RawError) -> Option<Option<WireError>> {
    if raw.zero != [0; 6] {
        return None;
    }
    if raw.code == 0 {
        return Some(None);
    }
    Some(Some(match ErrorCode::from_number(raw.code) {
        Some(code) => WireError::new(code, raw.detail),
        None => WireError::new(ErrorCode::Internal, u64::from(raw.code)),
    }))
}

macro_rules! archive {
    ($kind:expr, $raw:expr) => {{
        let body = rkyv::to_bytes::<rancor::Panic>(&$raw).expect("memory for a header");
        Encoded::new($kind, &body)
    }};
}

macro_rules! unarchive {
    ($kind:expr, $raw:ty, $archived:ty, $body:expr) => {{
        let mut aligned = Align([0u8; MAX_BODY]);
        aligned[..$body.len()].copy_from_slice($body);
        let archived = rkyv::access::<$archived, rancor::Failure>(&aligned[..$body.len()])
            .map_err(|_| FrameError::Body($kind))?;
        rkyv::deserialize::<$raw, rancor::Failure>(archived).map_err(|_| FrameError::Body($kind))?
    }};
}

impl Encoded {
    fn new(kind: u8, body: &[u8]) -> Self {
        debug_assert_eq!(Some(body.len()), body_len(kind));
        let mut bytes = [0; MAX_FRAME];
        bytes[..2].copy_from_slice(&MAGIC);
        bytes[2] = VERSION;
        bytes[3] = kind;
        bytes[4..6].copy_from_slice(&(body.len() as u16).to_le_bytes());
        bytes[PREFIX..PREFIX + body.len()].copy_from_slice(body);
        Self { bytes, len: PREFIX + body.len() }
    }
}

impl Frame {
    /// The frame as it travels.
    pub fn encode(&self) -> Encoded {
        match *self {
            Frame::Pull(pull) => archive!(
                PULL,
                RawPull {
                    transfer_id: *pull.transfer_id.as_bytes(),
                    layout: *pull.layout.as_bytes(),
                    content: pull.content.map_or([0; 16], |content| *content.as_bytes()),
                    last_hash: *pull.last_hash.as_bytes(),
                    epoch: pull.epoch.0,
                    credit: pull.credit,
                    first_block: pull.first_block,
                    blocks: pull.blocks,
                    rank: pull.rank,
                    ranks: pull.ranks,
                    deadline_ms: pull.deadline_ms,
                    dtype: pull.dtype.number(),
                }
            ),
            Frame::Accepted(Accepted { block_bytes, form }) => {
                archive!(ACCEPTED, RawAccepted { block_bytes, form: form.number(), zero: 0 })
            }
            Frame::Refused(error) => archive!(REFUSED, raw_error(Some(error))),
            Frame::Block(BlockHeader { index, checksum }) => {
                archive!(BLOCK, RawBlock { checksum, index, zero: 0 })
            }
            Frame::Credit(granted) => archive!(CREDIT, RawCredit { granted }),
            Frame::Again(index) => archive!(AGAIN, RawIndex { index }),
            Frame::Later(index) => archive!(LATER, RawIndex { index }),
            Frame::Finish(error) => archive!(FINISH, raw_error(error)),
            Frame::Probe(Probe { bytes }) => archive!(PROBE, RawProbe { bytes }),
            Frame::ProbeReply(ProbeReply { bytes, mtu }) => {
                archive!(PROBE_REPLY, RawProbeReply { bytes, mtu, zero: 0 })
            }
            Frame::Near(Near { port }) => archive!(NEAR, RawNear { port, zero: 0 }),
            Frame::NearReply(NearReply { name, token }) => archive!(NEAR_REPLY, RawNearReply { name, token }),
            Frame::Direct(Direct { token, purpose }) => {
                archive!(DIRECT, RawDirect { token, purpose: u32::from(purpose == Purpose::Map) })
            }
            Frame::Memory(len) => archive!(MEMORY, RawMemory { len }),
            Frame::Place(block) => archive!(PLACE, RawPlace { block }),
        }
    }

    /// Reads the frame at the start of `bytes`: it and its length, or `None` where more bytes are needed to tell.
    /// An error is told as soon as the prefix shows it.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Frame, usize)>, FrameError> {
        let seen = bytes.len().min(MAGIC.len());
        if bytes[..seen] != MAGIC[..seen] {
            return Err(FrameError::Magic);
        }
        let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let [_, _, version, kind, len @ .., zero_a, zero_b] = *prefix;
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        if (zero_a, zero_b) != (0, 0) {
            return Err(FrameError::Magic);
        }
        let len = u16::from_le_bytes(len);
        let expected = body_len(kind).ok_or(FrameError::Kind(kind))?;
        if usize::from(len) != expected {
            return Err(FrameError::Length { kind, len });
        }
        match rest.get(..expected) {
            Some(body) => Ok(Some((Self::decode_body(kind, body)?, PREFIX + expected))),
            None => Ok(None),
        }
    }

    fn decode_body(kind: u8, body: &[u8]) -> Result<Frame, FrameError> {
        let invalid = FrameError::Body(kind);
        Ok(match kind {
            PULL => {
                let raw = unarchive!(kind, RawPull, ArchivedRawPull, body);
                if raw.ranks > MAX_RANKS || raw.rank >= raw.ranks {
                    return Err(invalid);
                }
                Frame::Pull(PullHeader {
                    transfer_id: TransferId::from_bytes(raw.transfer_id),
                    epoch: Epoch(raw.epoch),
                    layout: LayoutFingerprint::from_bytes(raw.layout),
                    content: (raw.content != [0; 16]).then(|| LayoutFingerprint::from_bytes(raw.content)),
                    dtype: WireDtype::from_number(raw.dtype).ok_or(invalid)?,
                    last_hash: BlockHash::from_bytes(raw.last_hash),
                    first_block: raw.first_block,
                    blocks: raw.blocks,
                    rank: raw.rank,
                    ranks: raw.ranks,
                    deadline_ms: raw.deadline_ms,
                    credit: raw.credit,
                })
            }
            ACCEPTED => {
                let raw = unarchive!(kind, RawAccepted, ArchivedRawAccepted, body);
                let form = BlockForm::from_number(raw.form).filter(|_| raw.zero == 0).ok_or(invalid)?;
                Frame::Accepted(Accepted { block_bytes: raw.block_bytes, form })
            }
            REFUSED => {
                let raw = unarchive!(kind, RawError, ArchivedRawError, body);
                Frame::Refused(wire_error(&raw).flatten().ok_or(invalid)?)
            }
            BLOCK => {
                let raw = unarchive!(kind, RawBlock, ArchivedRawBlock, body);
                Frame::Block(BlockHeader { index: raw.index, checksum: raw.checksum })
            }
            CREDIT => Frame::Credit(unarchive!(kind, RawCredit, ArchivedRawCredit, body).granted),
            AGAIN => Frame::Again(unarchive!(kind, RawIndex, ArchivedRawIndex, body).index),
            LATER => Frame::Later(unarchive!(kind, RawIndex, ArchivedRawIndex, body).index),
            FINISH => {
                let raw = unarchive!(kind, RawError, ArchivedRawError, body);
                Frame::Finish(wire_error(&raw).ok_or(invalid)?)
            }
            PROBE => Frame::Probe(Probe { bytes: unarchive!(kind, RawProbe, ArchivedRawProbe, body).bytes }),
            PROBE_REPLY => {
                let raw = unarchive!(kind, RawProbeReply, ArchivedRawProbeReply, body);
                Frame::ProbeReply(ProbeReply { bytes: raw.bytes, mtu: raw.mtu })
            }
            NEAR => {
                let raw = unarchive!(kind, RawNear, ArchivedRawNear, body);
                Frame::Near(Near { port: raw.port })
            }
            NEAR_REPLY => {
                let raw = unarchive!(kind, RawNearReply, ArchivedRawNearReply, body);
                Frame::NearReply(NearReply { name: raw.name, token: raw.token })
            }
            DIRECT => {
                let raw = unarchive!(kind, RawDirect, ArchivedRawDirect, body);
                let purpose = match raw.purpose {
                    0 => Purpose::Copy,
                    1 => Purpose::Map,
                    _ => return Err(invalid),
                };
                Frame::Direct(Direct { token: raw.token, purpose })
            }
            MEMORY => Frame::Memory(unarchive!(kind, RawMemory, ArchivedRawMemory, body).len),
            PLACE => Frame::Place(unarchive!(kind, RawPlace, ArchivedRawPlace, body).block),
            _ => return Err(FrameError::Kind(kind)),
        })
    }
}

#[cfg(test)]
mod tests;
