//! The holder's side of one pull.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use baton_proto::wire::{Accepted, BlockHeader, Encoded, ErrorCode, Frame, PullHeader, WireError};
use bytes::Bytes;

use super::inbox::Inbox;
use super::{StreamEnd, UNKNOWN_GRACE};

/// From one look for an unknown transfer to the next.
const UNKNOWN_INTERVAL: Duration = Duration::from_millis(5);

/// A block that is not held for so long is said to come later, and again each time it took that long.
const LATER: Duration = Duration::from_millis(5);
const LATER_AGAIN: Duration = Duration::from_millis(500);

/// What a sender goes by.
#[derive(Clone, Debug)]
pub struct SenderConfig {
    /// How long a puller may take to say what it wants.
    pub hello: Duration,
    /// Longest deadline that a pull may have; a longer one counts as this.
    pub max_deadline: Duration,
}

/// Does the holder's part of one pull.
#[derive(Debug)]
pub struct Sender {
    config: SenderConfig,
    state: State,
    inbox: Inbox,
    outbox: VecDeque<SenderAction>,
    deadline: Instant,
    pull: Option<PullHeader>,
    block_bytes: u64,
    /// First block that was never begun.
    next: u32,
    /// Blocks to be sent again.
    again: VecDeque<u32>,
    /// Blocks that were asked for again, ever.
    repeated: BTreeSet<u32>,
    granted: u64,
    sent: u64,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Waiting,
    /// Looking for the hold; `since` the pull came, `at` the next look where one failed.
    Opening {
        since: Instant,
        at: Option<Instant>,
    },
    /// Nothing to send, or no credit to begin.
    BetweenBlocks,
    /// The shell gathers a block. `later`: when to say that it is not held yet, where it is not.
    Gathering {
        index: u32,
        later: Option<Instant>,
    },
    InBlock {
        index: u32,
        offset: u64,
    },
    Done,
}

/// What to do for a [`Sender`].
#[derive(Debug)]
pub enum SenderAction {
    /// Open the hold, and call [`Sender::handle_opened`].
    Open(PullHeader),
    /// Send a frame.
    Send(Encoded),
    /// Gather a block and its checksum, and call [`Sender::handle_block`].
    Gather(u32),
    /// Send a part of the block that was gathered last.
    Payload(Range<usize>),
    /// The puller needs nothing more of the hold for its rank.
    Finished,
    /// It is over; the last action.
    Done(Close, Result<(), WireError>),
}

/// How to end the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Close {
    /// After what was sent.
    Finish,
    /// At once, with the code's number.
    Reset(ErrorCode),
}

impl Sender {
    /// Waits for a pull.
    pub fn new(now: Instant, config: SenderConfig) -> Self {
        Self {
            deadline: now + config.hello,
            config,
            state: State::Waiting,
            inbox: Inbox::default(),
            outbox: VecDeque::new(),
            pull: None,
            block_bytes: 0,
            next: 0,
            again: VecDeque::new(),
            repeated: BTreeSet::new(),
            granted: 0,
            sent: 0,
        }
    }

    /// What was asked for, once it is known.
    pub fn pull(&self) -> Option<&PullHeader> {
        self.pull.as_ref()
    }

    /// Whether [`SenderAction::Done`] was said, or will be without anything else happening.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// KV bytes sent.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Blocks begun at least once: the first so many of the pull.
    pub fn begun(&self) -> u32 {
        self.next
    }

    /// Blocks that were asked for again.
    pub fn repeated(&self) -> u32 {
        self.repeated.len() as u32
    }

    /// Bytes arrived.
    pub fn handle_bytes(&mut self, now: Instant, bytes: Bytes) {
        if matches!(self.state, State::Done) {
            return;
        }
        self.inbox.push(bytes);
        loop {
            match self.inbox.frame() {
                Ok(Some(frame)) => {
                    if let Err(error) = self.handle_frame(now, frame) {
                        return self.stop(error);
                    }
                }
                Ok(None) => return,
                Err(error) => return self.stop(error.into()),
            }
            if matches!(self.state, State::Done) {
                return;
            }
        }
    }

    fn handle_frame(&mut self, now: Instant, frame: Frame) -> Result<(), WireError> {
        let protocol = Err(ErrorCode::Protocol.into());
        match (frame, self.state) {
            (Frame::Pull(pull), State::Waiting) => {
                let deadline = Duration::from_millis(u64::from(pull.deadline_ms));
                self.deadline = now + deadline.min(self.config.max_deadline);
                self.granted = pull.credit;
                self.pull = Some(pull);
                self.state = State::Opening { since: now, at: None };
                self.outbox.push_back(SenderAction::Open(pull));
            }
            (_, State::Waiting) => return protocol,
            (Frame::Credit(granted), _) => {
                if granted < self.granted {
                    return protocol;
                }
                self.granted = granted;
            }
            (Frame::Again(index), State::BetweenBlocks | State::Gathering { .. } | State::InBlock { .. }) => {
                let sending = match self.state {
                    State::Gathering { index: at, .. } | State::InBlock { index: at, .. } => Some(at),
                    _ => None,
                };
                let was_sent = index < self.next && sending != Some(index);
                if !was_sent || !self.repeated.insert(index) {
                    return protocol;
                }
                self.again.push_back(index);
            }
            (Frame::Finish(error), _) => {
                let complete = matches!(self.state, State::BetweenBlocks)
                    && self.pull.is_some_and(|pull| self.next == pull.blocks)
                    && self.again.is_empty();
                self.state = State::Done;
                self.outbox.clear();
                self.outbox.push_back(SenderAction::Finished);
                let close = if complete { Close::Finish } else { Close::Reset(ErrorCode::Cancelled) };
                self.outbox.push_back(SenderAction::Done(close, error.map_or(Ok(()), Err)));
            }
            _ => return protocol,
        }
        Ok(())
    }

    /// The hold was opened, or not. What blocks it has goes to the puller, which compares their length with its own.
    pub fn handle_opened(&mut self, now: Instant, opened: Result<Accepted, WireError>) {
        let State::Opening { since, at: None } = self.state else { return };
        match opened {
            Ok(accepted) => {
                self.block_bytes = accepted.block_bytes;
                self.state = State::BetweenBlocks;
                self.outbox.push_back(SenderAction::Send(Frame::Accepted(accepted).encode()));
            }
            Err(error) if error.code == ErrorCode::UnknownTransfer && now < since + UNKNOWN_GRACE => {
                self.state = State::Opening { since, at: Some(now + UNKNOWN_INTERVAL) };
            }
            Err(error) => {
                self.state = State::Done;
                self.outbox.push_back(SenderAction::Send(Frame::Refused(error).encode()));
                self.outbox.push_back(SenderAction::Done(Close::Finish, Err(error)));
            }
        }
    }

    /// The block that [`SenderAction::Gather`] asked for is not held yet.
    pub fn handle_not_held(&mut self, now: Instant) {
        if let State::Gathering { later, .. } = &mut self.state {
            *later = Some(now + LATER);
        }
    }

    /// The block that [`SenderAction::Gather`] asked for is at hand, or cannot be had.
    pub fn handle_block(&mut self, checksum: Result<u64, WireError>) {
        let State::Gathering { index, .. } = self.state else { return };
        match checksum {
            Ok(checksum) => {
                let header = Frame::Block(BlockHeader { index, checksum });
                self.outbox.push_back(SenderAction::Send(header.encode()));
                self.state = State::InBlock { index, offset: 0 };
            }
            Err(error) => self.stop(error),
        }
    }

    /// The hold ended.
    pub fn handle_hold_ended(&mut self, code: ErrorCode) {
        self.stop(code.into());
    }

    /// The puller sends nothing more. Without a `Finish` before, that is a puller that is gone.
    pub fn handle_end(&mut self, end: StreamEnd) {
        match end {
            StreamEnd::Finished => self.stop(ErrorCode::Protocol.into()),
            StreamEnd::Reset(_) | StreamEnd::Lost => self.stop(ErrorCode::Cancelled.into()),
        }
    }

    /// To be called at [`Self::poll_timeout`] or later.
    pub fn handle_timeout(&mut self, now: Instant) {
        if now >= self.deadline {
            let opened =
                matches!(self.state, State::BetweenBlocks | State::Gathering { .. } | State::InBlock { .. });
            self.stop(ErrorCode::Deadline.into());
            if opened {
                // The puller counts from an earlier moment: it gave up before, and will not come back.
                self.outbox.push_front(SenderAction::Finished);
            }
            return;
        }
        if let (State::Opening { since, at: Some(at) }, Some(pull)) = (self.state, self.pull)
            && now >= at
        {
            self.state = State::Opening { since, at: None };
            self.outbox.push_back(SenderAction::Open(pull));
        }
        if let State::Gathering { index, later: Some(later) } = &mut self.state
            && now >= *later
        {
            *later = now + LATER_AGAIN;
            self.outbox.push_back(SenderAction::Send(Frame::Later(*index).encode()));
        }
    }

    /// When [`Self::handle_timeout`] is due; `None` when all is over.
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.state {
            State::Done => None,
            State::Opening { at: Some(at), .. } | State::Gathering { later: Some(at), .. } => {
                Some(at.min(self.deadline))
            }
            _ => Some(self.deadline),
        }
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<SenderAction> {
        if let Some(action) = self.outbox.pop_front() {
            return Some(action);
        }
        let credit = self.granted.saturating_sub(self.sent);
        match self.state {
            State::BetweenBlocks if credit > 0 => {
                let index = match self.again.pop_front() {
                    Some(index) => index,
                    None if self.next < self.pull?.blocks => {
                        self.next += 1;
                        self.next - 1
                    }
                    None => return None,
                };
                self.state = State::Gathering { index, later: None };
                Some(SenderAction::Gather(index))
            }
            State::InBlock { index, offset } if credit > 0 => {
                let end = self.block_bytes.min(offset.saturating_add(credit));
                self.sent += end - offset;
                self.state = if end == self.block_bytes {
                    State::BetweenBlocks
                } else {
                    State::InBlock { index, offset: end }
                };
                Some(SenderAction::Payload(offset as usize..end as usize))
            }
            _ => None,
        }
    }

    fn stop(&mut self, error: WireError) {
        if matches!(self.state, State::Done) {
            return;
        }
        self.state = State::Done;
        self.outbox.clear();
        self.outbox.push_back(SenderAction::Done(Close::Reset(error.code), Err(error)));
    }
}
