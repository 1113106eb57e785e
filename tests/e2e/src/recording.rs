//! An engine's KV events and what it found cached, kept in a file, so that the same comparison runs where there is no engine.
//!
//! A recording is one msgpack value. It holds events as the engine published them, byte by byte, and between them the prompts
//! that it was asked for, with the tokens that it reported as cached.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use zeromq::{Socket, SocketRecv, SubSocket};

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Recording {
    /// What was recorded, for people.
    pub about: String,
    /// The namespace of its block hashes.
    pub model: String,
    /// Tokens in a block.
    pub block_size: u32,
    /// Blocks in its cache.
    pub num_blocks: u64,
    /// What happened, in order.
    pub steps: Vec<Step>,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Step {
    /// The engine published this batch.
    Events(#[serde(with = "serde_bytes")] Vec<u8>),
    /// It was asked for a completion of this prompt while it did nothing else.
    Prompt {
        /// The prompt.
        tokens: Vec<u32>,
        /// Its cache salt.
        salt: Option<String>,
        /// Leading tokens that it had cached.
        cached: u64,
    },
}

impl Recording {
    /// Reads a recording.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        rmp_serde::from_slice(&bytes).with_context(|| format!("{}: no recording", path.display()))
    }

    /// Largest recording, in bytes.
    pub const LARGEST: usize = 288 << 10;

    /// Writes it, as far as it is not too large. Returns its size in bytes.
    pub fn write(&self, path: &Path) -> anyhow::Result<usize> {
        let mut steps = Vec::new();
        let mut left = Self::LARGEST;
        for step in &self.steps {
            let Some(rest) = left.checked_sub(rmp_serde::to_vec(step)?.len()) else { break };
            left = rest;
            steps.push(step.clone());
        }
        let bytes = rmp_serde::to_vec(&Self { steps, ..self.clone() })?;
        std::fs::write(path, &bytes).with_context(|| path.display().to_string())?;
        Ok(bytes.len())
    }
}

/// Listens to an engine's KV events from their first on.
pub struct Listener {
    socket: SubSocket,
    next: u64,
}

impl Listener {
    /// Longest wait for the connection.
    const PATIENCE: Duration = Duration::from_secs(5);

    /// Listens at a ZMQ address. The engine has not published anything yet.
    pub async fn start(address: &str) -> anyhow::Result<Self> {
        let mut socket = SubSocket::new();
        socket.subscribe("").await?;
        tokio::time::timeout(Self::PATIENCE, socket.connect(address))
            .await
            .with_context(|| format!("{address}: no connection"))??;
        // The engine's side learns of the subscription a little later.
        tokio::time::sleep(Duration::from_millis(300)).await;
        Ok(Self { socket, next: 0 })
    }

    /// All batches published since the last call, until for so long none comes.
    ///
    /// # Errors
    /// A batch is missing.
    pub async fn heard(&mut self, quiet: Duration) -> anyhow::Result<Vec<Bytes>> {
        let mut batches = Vec::new();
        while let Ok(message) = tokio::time::timeout(quiet, self.socket.recv()).await {
            let frames = message?.into_vec();
            let [_, number, payload] = &frames[..] else {
                anyhow::bail!("an event message of {} frames", frames.len());
            };
            let number = u64::from_be_bytes(number[..].try_into().context("a number of other than 8 bytes")?);
            ensure!(number == self.next, "event batch {number} came, {} was due", self.next);
            self.next += 1;
            batches.push(payload.clone());
        }
        Ok(batches)
    }
}
