//! Bytes that arrived, as frames and payload.

use std::collections::VecDeque;

use baton_proto::wire::{Frame, FrameError, MAX_FRAME};
use bytes::Bytes;

/// What arrived and was not looked at yet. Holds whatever it is given: whoever fills it drains it first.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    chunks: VecDeque<Bytes>,
    /// The beginning of a frame whose rest is in later chunks.
    partial: Vec<u8>,
}

impl Inbox {
    pub(super) fn push(&mut self, chunk: Bytes) {
        if !chunk.is_empty() {
            self.chunks.push_back(chunk);
        }
    }

    /// The next frame, `None` where it did not arrive in full yet.
    pub(super) fn frame(&mut self) -> Result<Option<Frame>, FrameError> {
        while let Some(chunk) = self.chunks.front_mut() {
            if self.partial.is_empty() {
                if let Some((frame, len)) = Frame::decode(chunk)? {
                    self.consume(len);
                    return Ok(Some(frame));
                }
                self.partial.extend_from_slice(chunk);
                self.chunks.pop_front();
                continue;
            }
            let had = self.partial.len();
            let take = chunk.len().min(MAX_FRAME - had);
            self.partial.extend_from_slice(&chunk[..take]);
            if let Some((frame, len)) = Frame::decode(&self.partial)? {
                self.partial.clear();
                self.consume(len - had);
                return Ok(Some(frame));
            }
            // All of the chunk was too little, as `MAX_FRAME` bytes are enough for any frame.
            self.chunks.pop_front();
        }
        Ok(None)
    }

    /// The next bytes, at most `max`, `None` where there are none. To be called between frames only.
    pub(super) fn payload(&mut self, max: usize) -> Option<Bytes> {
        debug_assert!(self.partial.is_empty(), "payload in the middle of a frame");
        let chunk = self.chunks.front_mut()?;
        if chunk.len() > max {
            return Some(chunk.split_to(max));
        }
        self.chunks.pop_front()
    }

    fn consume(&mut self, len: usize) {
        let Some(chunk) = self.chunks.front_mut() else { return };
        if len < chunk.len() {
            let _ = chunk.split_to(len);
        } else {
            self.chunks.pop_front();
        }
    }
}
