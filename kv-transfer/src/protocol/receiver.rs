//! The puller's side of one pull.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use baton_proto::wire::{Accepted, BlockForm, BlockHeader, Encoded, ErrorCode, Frame, PullHeader, WireError};
use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3;

use super::StreamEnd;
use super::inbox::Inbox;

/// What a receiver needs to know.
#[derive(Clone, Debug)]
pub struct ReceiverConfig {
    /// What to ask for. Its credit is the window: KV bytes that may be under way at any time.
    pub pull: PullHeader,
    /// Bytes of a block here; the holder's have to be equal.
    pub block_bytes: u64,
    /// Bytes of a block that comes packed, where the pull asks for that.
    pub packed_bytes: Option<u64>,
    /// When to give up.
    pub deadline: Instant,
    /// How long the peer may send nothing.
    pub stall: Duration,
    /// Whether places of blocks come instead of their bytes, to be copied from here. Then what fails here is no end of the
    /// hold: the blocks may be asked for again by the other way.
    pub direct: bool,
}

/// Does the puller's part of one pull.
#[derive(Debug)]
pub struct Receiver {
    pull: PullHeader,
    /// Of a block as it travels, once the holder has accepted.
    block_bytes: u64,
    packed_bytes: Option<u64>,
    deadline: Instant,
    stall: Duration,
    direct: bool,
    /// When something arrived last.
    heard: Instant,
    state: State,
    answered: bool,
    form: BlockForm,
    inbox: Inbox,
    outbox: VecDeque<ReceiverAction>,
    /// First block that was never received in full.
    next: u32,
    /// Blocks asked for again and not received since.
    again: BTreeSet<u32>,
    granted: u64,
    corrupt: u32,
    failed: Vec<usize>,
    bytes: u64,
    checksums: Vec<u64>,
    /// Since when the next block is said to come later.
    later: Option<Instant>,
    waited: Duration,
}

enum State {
    Asking,
    BetweenBlocks,
    InBlock {
        header: BlockHeader,
        offset: u64,
        hasher: Box<Xxh3>,
    },
    /// Waiting for the place of a block.
    Placing(BlockHeader),
    /// The shell copies it.
    Copying(BlockHeader),
    Done,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Asking => f.write_str("Asking"),
            Self::BetweenBlocks => f.write_str("BetweenBlocks"),
            Self::InBlock { header, offset, .. } => write!(f, "InBlock({}, {offset})", header.index),
            Self::Placing(header) => write!(f, "Placing({})", header.index),
            Self::Copying(header) => write!(f, "Copying({})", header.index),
            Self::Done => f.write_str("Done"),
        }
    }
}

/// What to do for a [`Receiver`].
#[derive(Debug)]
pub enum ReceiverAction {
    /// Send a frame.
    Send(Encoded),
    /// Write KV bytes to memory, before the next call of [`Receiver::poll`].
    Write {
        /// Block, counted from the first of the pull.
        index: u32,
        /// Where within the block.
        offset: usize,
        /// The bytes.
        bytes: Bytes,
    },
    /// Copy a block from the holder's memory, and call [`Receiver::handle_copied`] before the next call of
    /// [`Receiver::poll`].
    Copy {
        /// Block, counted from the first of the pull.
        index: u32,
        /// Its number in the holder's memory.
        from: u32,
    },
    /// It is over; the last action. Finish the stream's sending side, and read it no further.
    Done(Result<Received, Stop>),
}

/// What a pull brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// KV bytes, repetitions included.
    pub bytes: u64,
    /// Blocks that arrived corrupt, repetitions included.
    pub corrupt: u32,
    /// Blocks that arrived corrupt twice, or not at all, in ascending order.
    pub failed: Vec<usize>,
    /// As the holder sent them, in order of blocks; 0 for those that did not arrive.
    pub checksums: Vec<u64>,
    /// How long the holder had nothing to send, since the next block was not held yet.
    pub waited: Duration,
}

/// Why a pull did not come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The holder refused, or stopped.
    ByPeer(WireError),
    /// This side did.
    Here(WireError),
    /// The connection is gone.
    Lost,
}

impl Receiver {
    /// Asks.
    pub fn new(now: Instant, config: ReceiverConfig) -> Self {
        let ReceiverConfig { pull, block_bytes, packed_bytes, deadline, stall, direct } = config;
        Self {
            pull,
            block_bytes,
            packed_bytes,
            deadline,
            stall,
            direct,
            heard: now,
            state: State::Asking,
            answered: false,
            form: BlockForm::AsItLies,
            inbox: Inbox::default(),
            outbox: VecDeque::from([ReceiverAction::Send(Frame::Pull(pull).encode())]),
            next: 0,
            again: BTreeSet::new(),
            granted: pull.credit,
            corrupt: 0,
            failed: Vec::new(),
            bytes: 0,
            checksums: vec![0; pull.blocks as usize],
            later: None,
            waited: Duration::ZERO,
        }
    }

    /// Whether the holder has said anything.
    pub fn answered(&self) -> bool {
        self.answered
    }

    /// The form of the blocks' bytes, once the holder has accepted.
    pub fn form(&self) -> BlockForm {
        self.form
    }

    /// What has come, of a pull that did not come to its end. Blocks that came whole and hold what they should may be used.
    pub fn so_far(&mut self, now: Instant) -> Received {
        let mut failed = std::mem::take(&mut self.failed);
        failed.extend(self.again.iter().map(|index| *index as usize));
        failed.extend(self.next as usize..self.pull.blocks as usize);
        failed.sort_unstable();
        let waiting = self.later.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        Received {
            bytes: self.bytes,
            corrupt: self.corrupt,
            failed,
            checksums: std::mem::take(&mut self.checksums),
            waited: self.waited + waiting,
        }
    }

    /// Bytes of a block in a form; `None` where it was not asked for, or cannot be copied from place to place.
    fn bytes_in(&self, form: BlockForm) -> Option<u64> {
        match form {
            BlockForm::AsItLies => Some(self.block_bytes),
            BlockForm::Common => (!self.direct && self.pull.content.is_some()).then_some(self.block_bytes),
            BlockForm::Packed => self.packed_bytes.filter(|_| !self.direct),
        }
    }

    /// Bytes arrived. Call [`Self::poll`] until it has nothing more before handing over others.
    pub fn handle_bytes(&mut self, now: Instant, bytes: Bytes) {
        self.heard = now;
        self.answered |= !bytes.is_empty();
        self.inbox.push(bytes);
    }

    /// The block that [`ReceiverAction::Copy`] asked for lies here, with this checksum where it is known by now.
    pub fn handle_copied(&mut self, now: Instant, checksum: Option<u64>) {
        let State::Copying(header) = self.state else { return };
        // Copying takes its time, in which nobody listened.
        self.heard = now;
        self.bytes += self.block_bytes;
        self.state = State::BetweenBlocks;
        self.block_ended(header, checksum.is_none_or(|checksum| checksum == header.checksum));
    }

    /// Nothing more will arrive.
    pub fn handle_end(&mut self, end: StreamEnd) {
        match end.code() {
            Some(code) => self.stop(Stop::ByPeer(code.into())),
            None => self.stop(Stop::Lost),
        }
    }

    /// This side does not want, or cannot use, the blocks any more.
    pub fn cancel(&mut self, error: WireError) {
        self.stop(Stop::Here(error));
    }

    /// To be called at [`Self::poll_timeout`] or later.
    pub fn handle_timeout(&mut self, now: Instant) {
        if now >= self.deadline {
            self.stop(Stop::Here(ErrorCode::Deadline.into()));
        } else if now >= self.heard + self.stall {
            self.stop(Stop::Here(ErrorCode::Stalled.into()));
        }
    }

    /// When [`Self::handle_timeout`] is due; `None` when all is over.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let over = matches!(self.state, State::Done);
        (!over).then(|| self.deadline.min(self.heard + self.stall))
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<ReceiverAction> {
        loop {
            if let Some(action) = self.outbox.pop_front() {
                return Some(action);
            }
            match self.advance() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => self.stop(Stop::Here(error)),
            }
        }
    }

    /// Looks at what arrived, up to the next action. `false` where nothing can be done.
    fn advance(&mut self) -> Result<bool, WireError> {
        match &mut self.state {
            State::Done | State::Copying(_) => Ok(false),
            State::Asking => match self.inbox.frame()? {
                None => Ok(false),
                Some(Frame::Accepted(Accepted { block_bytes, form })) => match self.bytes_in(form) {
                    Some(expected) if expected == block_bytes => {
                        (self.block_bytes, self.form) = (block_bytes, form);
                        self.state = State::BetweenBlocks;
                        Ok(true)
                    }
                    Some(_) => Err(WireError::new(ErrorCode::LayoutMismatch, block_bytes)),
                    None => Err(ErrorCode::Protocol.into()),
                },
                Some(Frame::Refused(error)) => {
                    self.stop(Stop::ByPeer(error));
                    Ok(true)
                }
                Some(_) => Err(ErrorCode::Protocol.into()),
            },
            State::BetweenBlocks => match self.inbox.frame()? {
                None => Ok(false),
                Some(Frame::Block(header)) => {
                    let fresh = header.index == self.next && self.next < self.pull.blocks;
                    if !fresh && !self.again.contains(&header.index) {
                        return Err(ErrorCode::Protocol.into());
                    }
                    if let Some(since) = self.later.take() {
                        self.waited += self.heard.saturating_duration_since(since);
                    }
                    self.state = if self.direct {
                        State::Placing(header)
                    } else {
                        State::InBlock { header, offset: 0, hasher: Box::new(Xxh3::new()) }
                    };
                    Ok(true)
                }
                Some(Frame::Later(index)) if index == self.next && index < self.pull.blocks => {
                    self.later.get_or_insert(self.heard);
                    Ok(true)
                }
                Some(Frame::Refused(error)) if self.direct => {
                    self.stop(Stop::ByPeer(error));
                    Ok(true)
                }
                Some(_) => Err(ErrorCode::Protocol.into()),
            },
            State::Placing(header) => match self.inbox.frame()? {
                None => Ok(false),
                Some(Frame::Place(from)) => {
                    let header = *header;
                    self.outbox.push_back(ReceiverAction::Copy { index: header.index, from });
                    self.state = State::Copying(header);
                    Ok(true)
                }
                Some(_) => Err(ErrorCode::Protocol.into()),
            },
            State::InBlock { header, offset, hasher } => {
                if *offset == self.block_bytes {
                    let (header, matches) = (*header, hasher.digest() == header.checksum);
                    self.state = State::BetweenBlocks;
                    self.block_ended(header, matches);
                    return Ok(true);
                }
                let rest = usize::try_from(self.block_bytes - *offset).unwrap_or(usize::MAX);
                let Some(bytes) = self.inbox.payload(rest) else { return Ok(false) };
                // The bytes were just decrypted, and will be copied next: they are read while in the cache.
                hasher.update(&bytes);
                let at = *offset as usize;
                *offset += bytes.len() as u64;
                self.bytes += bytes.len() as u64;
                let index = header.index;
                if self.bytes > self.granted {
                    return Err(ErrorCode::Protocol.into());
                }
                self.outbox.push_back(ReceiverAction::Write { index, offset: at, bytes });
                self.grant();
                Ok(true)
            }
        }
    }

    /// Grants more, when half the window was used and more is needed than granted.
    fn grant(&mut self) {
        let repeated = u64::from(self.corrupt);
        let needed = (u64::from(self.pull.blocks) + repeated).saturating_mul(self.block_bytes);
        let grant = self.bytes.saturating_add(self.pull.credit);
        if self.granted < needed && grant - self.granted >= self.pull.credit.div_ceil(2) {
            self.granted = grant;
            self.outbox.push_back(ReceiverAction::Send(Frame::Credit(grant).encode()));
        }
    }

    fn block_ended(&mut self, header: BlockHeader, matches: bool) {
        let BlockHeader { index, checksum } = header;
        let repeated = self.again.remove(&index);
        if !repeated {
            self.next += 1;
        }
        self.checksums[index as usize] = checksum;
        if !matches {
            self.corrupt += 1;
            if repeated && self.direct {
                return self.stop(Stop::Here(ErrorCode::CorruptBlock.into()));
            }
            if repeated {
                self.failed.push(index as usize);
            } else {
                self.again.insert(index);
                self.outbox.push_back(ReceiverAction::Send(Frame::Again(index).encode()));
                self.grant();
            }
        }
        if self.next == self.pull.blocks && self.again.is_empty() {
            let mut failed = std::mem::take(&mut self.failed);
            failed.sort_unstable();
            let error =
                (!failed.is_empty()).then(|| WireError::new(ErrorCode::CorruptBlock, failed.len() as u64));
            self.outbox.push_back(ReceiverAction::Send(Frame::Finish(error).encode()));
            self.outbox.push_back(ReceiverAction::Done(Ok(Received {
                bytes: self.bytes,
                corrupt: self.corrupt,
                failed,
                checksums: std::mem::take(&mut self.checksums),
                waited: self.waited,
            })));
            self.state = State::Done;
        }
    }

    fn stop(&mut self, stop: Stop) {
        if matches!(self.state, State::Done) {
            return;
        }
        self.state = State::Done;
        self.outbox.clear();
        // The peer that stopped by itself knows, and the one that broke the protocol would not understand; its hold
        // stays until its lease ends. In the direct way only those are the end that no other way would mend.
        if let Stop::Here(error) = stop
            && !matches!(error.code, ErrorCode::Protocol | ErrorCode::Version)
            && (!self.direct || matches!(error.code, ErrorCode::Cancelled | ErrorCode::Deadline))
        {
            self.outbox.push_back(ReceiverAction::Send(Frame::Finish(Some(error)).encode()));
        }
        self.outbox.push_back(ReceiverAction::Done(Err(stop)));
    }
}
