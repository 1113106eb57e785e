//! The transfer protocol: how blocks get from the agent that holds them to the agent that pulls them.
//!
//! # Participants
//! The *holder* has blocks in its engine's memory, under a hold ([`crate::hold`]). The *puller* has allocated blocks in its
//! own engine's memory and knows what they should contain. Each agent is both, for different transfers. They meet on a
//! QUIC connection with mutual TLS; whichever needs one opens it. Each pull has a bidirectional stream of its own,
//! opened by the puller, so any number of pulls share a connection without waiting for each other, up to the caps.
//! Frames are those of [`baton_proto::wire`].
//!
//! # Goals
//! - No wrong byte is taken for a right one: id, epoch, lease, layout, range and content are checked before any byte
//!   moves; a checksum made when the hold was taken is checked after each block was written.
//! - The puller ends by its deadline, whatever the holder or the network do.
//! - No copy outlives the hold unseen: everything that reads a held block keeps a guard, see [`crate::hold`].
//! - Either side can stop at any time, and both sides' memory use has a bound that they choose themselves.
//! - KV bytes are not copied or interpreted by the protocol. Where the order of bytes differs on the two sides, or they are
//!   to travel packed, the shells see to it, a block at a time.
//!
//! # Non-goals
//! - Resuming: a pull that breaks is over, and the engine computes. Repeating costs less than deciding what is still
//!   true after a break.
//! - Pushing: a holder sends only what was asked for.
//! - Hiding who has which prefix from other agents: all agents with a certificate of the fleet trust each other.
//!
//! # A pull
//! ```text
//! puller                                                     holder
//! Pull{id, epoch, layout, content, type, range, last hash, rank of ranks, credit}
//!                                         -->          opens the hold, or: Refused, end of stream
//!                                             <-- Accepted{bytes of a block, their form}
//!                                             <-- Block{0, checksum}, bytes
//!                                             <-- Block{1, checksum}, bytes ...
//!                                             <-- Later{2}, again each 0.5 s until block 2 is held
//! Credit{bytes granted in all}            -->
//! Again{1}                                -->          where block 1 did not match its checksum
//!                                             <-- Block{1, checksum}, bytes
//! Finish                                  -->          the rank's part of the hold is over
//! ```
//! **Order.** Blocks come in order; a repeated one comes between any two others. Every block may be asked for again
//! once; if it is corrupt again it *failed*, and the pull goes on without it.
//!
//! **Ranks.** A pull is of one rank of the puller's engine, of as many as it says. Where the holder's engine has as many and
//! the worker of that rank the same layout, blocks travel as they lie in memory. Else, where the contents of heads are the
//! same on both sides (the pull's `content`), they travel in the *common order* of [`baton_kernels::Sliced`]: the holder
//! puts together the heads that the puller's rank has, from the ranks of its own that have them, and the puller puts them
//! where they lie in its memory. Else the pull is refused. The hold ends when every rank of a puller is finished with it.
//!
//! **Packed.** A puller may ask for KV as fp8 (the pull's `dtype`). Then the blocks come as heads in the common order, each
//! packed ([`baton_kernels::reference::fp8`]), also between equal layouts: half the bytes, within a stated error of what is
//! held. The holder has no say in it but that heads that cannot be packed so, or not told apart, come as they are stored:
//! exact bytes are never wrong. Which it is, `Accepted` says, so that a puller never takes packed blocks for exact ones, and
//! one that did not ask refuses them. Their checksums are of the packed bytes, and spoilt where those were not made of what was
//! held; a puller whose memory is not written where it lies packs what lies there once more, and compares. A packed block that
//! no packing makes ends its pull, and is written nowhere.
//!
//! **Credit.** The holder sends at most as many KV bytes as were granted in all, block headers not counted. It
//! gathers a block when it has credit to begin it. The puller grants more as it writes bytes to memory.
//!
//! **A pull may overtake its hold**, since the two take different ways to the holder: an unknown id is looked up again for
//! [`UNKNOWN_GRACE`] before it is refused.
//!
//! **A pull may overtake the computation**, too: a hold may grow while its prompt is computed. A block that is not held when its
//! turn comes is said to come later, so that the puller does not take the holder for stalled, and can tell what the link
//! took from what the engine took. Its deadline goes on.
//!
//! **End.** `Finish` says that the puller's rank needs nothing more of the hold, for whatever reason: success, its
//! deadline, a cancelled request. A stream that breaks without one says nothing about the hold, which stays until its
//! lease ends: the puller may connect anew and ask again.
//!
//! **Stopping.** The holder stops by resetting the stream with the number of an [`ErrorCode`]: a block may be half
//! sent, and no frame fits there. It does so when the hold ends, when the puller's deadline passed, and when the puller
//! breaks the protocol. The puller stops by `Finish` with an error; it need not wait for an answer.
//!
//! **Truncation.** A stream that ends before the last block is an error like any other: blocks count only together, at
//! the end of the pull.
//!
//! # States
//! ```text
//! puller:  asking --Accepted--> receiving --last block--> done
//! holder:  waiting --Pull--> opening --opened--> sending --Finish--> done
//! ```
//! plus, from each, errors to *done*. [`Receiver`] and [`Sender`] are these machines. They do no I/O and read no clock:
//! `handle_*` takes what happened, `poll` says what to do, `poll_timeout` when to call `handle_timeout`.

mod inbox;
mod receiver;
mod sender;

use std::time::Duration;

use baton_proto::wire::ErrorCode;

pub use receiver::{Received, Receiver, ReceiverAction, ReceiverConfig, Stop};
pub use sender::{Close, Sender, SenderAction, SenderConfig};

/// How long a holder looks for an unknown transfer.
pub const UNKNOWN_GRACE: Duration = Duration::from_millis(250);

/// How a stream ended, as seen by the side that reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// The peer finished it.
    Finished,
    /// The peer reset it, with this number.
    Reset(u64),
    /// The connection is gone.
    Lost,
}

impl StreamEnd {
    fn code(self) -> Option<ErrorCode> {
        match self {
            Self::Finished => Some(ErrorCode::Protocol),
            Self::Reset(number) => {
                let code = u16::try_from(number).ok().and_then(ErrorCode::from_number);
                Some(code.unwrap_or(ErrorCode::Internal))
            }
            Self::Lost => None,
        }
    }
}

#[cfg(test)]
mod tests;
