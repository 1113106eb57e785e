//! KV events as vLLM 0.32 publishes them: three ZMQ frames (topic, sequence number, msgpack batch) on a PUB socket, and a
//! ROUTER socket that replays batches from a bounded buffer.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::Serialize;
use serde::ser::SerializeSeq;
use tokio::sync::mpsc;
use zeromq::{
    PubSocket, RouterRecvHalf, RouterSendHalf, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage,
};

/// A change of the prefix cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvEvent {
    /// Full blocks were cached.
    Stored(BlockStored),
    /// A block was evicted.
    Removed {
        /// Its hash.
        block_hash: u64,
    },
    /// Nothing is cached any more.
    Cleared,
}

/// Full blocks of one request that were cached together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockStored {
    /// Hashes of the blocks, in order.
    pub block_hashes: Vec<u64>,
    /// Hash of the block before them; `None` where they begin the prompt.
    pub parent_block_hash: Option<u64>,
    /// The tokens of all the blocks.
    pub token_ids: Vec<u32>,
    /// Tokens in a block.
    pub block_size: u32,
    /// LoRA adapter: its number and its name.
    pub lora: Option<(u32, String)>,
    /// For each block, its extra keys.
    pub extra_keys: Vec<Option<Vec<String>>>,
}

#[derive(Serialize)]
struct StoredForm<'a> {
    r#type: &'static str,
    block_hashes: &'a [u64],
    parent_block_hash: Option<u64>,
    token_ids: &'a [u32],
    block_size: u32,
    lora_id: Option<u32>,
    medium: &'static str,
    lora_name: Option<&'a str>,
    extra_keys: &'a [Option<Vec<String>>],
    group_idx: u32,
    kv_cache_spec_kind: &'static str,
}

#[derive(Serialize)]
struct RemovedForm {
    r#type: &'static str,
    block_hashes: [u64; 1],
    medium: &'static str,
    group_idx: u32,
}

#[derive(Serialize)]
struct ClearedForm {
    r#type: &'static str,
}

impl Serialize for KvEvent {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            KvEvent::Stored(stored) => StoredForm {
                r#type: "BlockStored",
                block_hashes: &stored.block_hashes,
                parent_block_hash: stored.parent_block_hash,
                token_ids: &stored.token_ids,
                block_size: stored.block_size,
                lora_id: stored.lora.as_ref().map(|(id, _)| *id),
                medium: "GPU",
                lora_name: stored.lora.as_ref().map(|(_, name)| name.as_str()),
                extra_keys: &stored.extra_keys,
                group_idx: 0,
                kv_cache_spec_kind: "full_attention",
            }
            .serialize(serializer),
            KvEvent::Removed { block_hash } => RemovedForm {
                r#type: "BlockRemoved",
                block_hashes: [*block_hash],
                medium: "GPU",
                group_idx: 0,
            }
            .serialize(serializer),
            KvEvent::Cleared => ClearedForm { r#type: "AllBlocksCleared" }.serialize(serializer),
        }
    }
}

/// The events of one engine step.
struct Batch<'a> {
    ts: f64,
    events: &'a [KvEvent],
}

impl Serialize for Batch<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut batch = serializer.serialize_seq(Some(3))?;
        batch.serialize_element(&self.ts)?;
        batch.serialize_element(self.events)?;
        batch.serialize_element(&0u32)?;
        batch.end()
    }
}

/// A batch in its wire form, for data-parallel rank 0. `ts` is in seconds since the Unix epoch.
pub fn encode_batch(ts: f64, events: &[KvEvent]) -> Vec<u8> {
    rmp_serde::to_vec_named(&Batch { ts, events }).expect("events have a msgpack form")
}

/// Where and how events are published.
#[derive(Clone, Debug)]
pub struct PublisherConfig {
    /// Address of the PUB socket, to bind.
    pub endpoint: String,
    /// Address of the replay ROUTER, to bind.
    pub replay_endpoint: Option<String>,
    /// First frame of each message.
    pub topic: String,
    /// Batches that can be replayed.
    pub buffer_steps: usize,
}

/// The sockets could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum PublisherError {
    /// An address cannot be bound.
    #[error("cannot bind {option} {endpoint}: {source}; give a free address such as tcp://127.0.0.1:5557")]
    Bind {
        /// The option with the address.
        option: &'static str,
        /// The address.
        endpoint: String,
        /// Why not.
        source: zeromq::ZmqError,
    },
}

/// Batches that wait to be published; past them the engine waits, as vLLM's does.
pub const QUEUE: usize = 100_000;

/// Publishes batches until the sender is dropped.
pub async fn publisher(
    config: PublisherConfig,
) -> Result<(mpsc::Sender<Vec<KvEvent>>, impl Future<Output = ()>), PublisherError> {
    let mut publish = PubSocket::new();
    bind(&mut publish, "--kv-events-endpoint", &config.endpoint).await?;
    let replay = match &config.replay_endpoint {
        None => None,
        Some(endpoint) => {
            let mut router = RouterSocket::new();
            bind(&mut router, "--kv-replay-endpoint", endpoint).await?;
            Some(router.split())
        }
    };
    let (sender, receiver) = mpsc::channel(QUEUE);
    Ok((sender, run(config, publish, replay, receiver)))
}

async fn bind(socket: &mut impl Socket, option: &'static str, endpoint: &str) -> Result<(), PublisherError> {
    let address = endpoint.replace("://*:", "://0.0.0.0:");
    let bound = socket.bind(&address).await;
    bound.map(drop).map_err(|source| PublisherError::Bind { option, endpoint: endpoint.to_owned(), source })
}

/// Published batches with their numbers, the latest ones.
type Buffer = Arc<Mutex<VecDeque<(u64, Bytes)>>>;

async fn run(
    config: PublisherConfig,
    mut publish: PubSocket,
    replay: Option<(RouterSendHalf, RouterRecvHalf)>,
    mut batches: mpsc::Receiver<Vec<KvEvent>>,
) {
    let topic = Bytes::from(config.topic.into_bytes());
    let buffer = Buffer::default();
    let mut sequence = 0u64;
    let publishing = async {
        while let Some(events) = batches.recv().await {
            let ts = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64());
            let payload = Bytes::from(encode_batch(ts, &events));
            {
                let mut buffer = lock(&buffer);
                buffer.push_back((sequence, payload.clone()));
                while buffer.len() > config.buffer_steps {
                    buffer.pop_front();
                }
            }
            let number = Bytes::copy_from_slice(&sequence.to_be_bytes());
            if let Err(error) = publish.send(frames([topic.clone(), number, payload])).await {
                tracing::warn!(%error, sequence, "cannot publish a KV event batch");
            }
            sequence += 1;
        }
    };
    match replay {
        None => publishing.await,
        // A subscriber that reads its replay slowly holds up other replays, and no publishing.
        Some((answers, requests)) => tokio::select! {
            () = publishing => {}
            () = answer_replays(answers, requests, &topic, &buffer) => {}
        },
    }
}

fn lock(buffer: &Buffer) -> MutexGuard<'_, VecDeque<(u64, Bytes)>> {
    buffer.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers replay requests, one after the other. Never ends.
async fn answer_replays(
    mut answers: RouterSendHalf,
    mut requests: RouterRecvHalf,
    topic: &Bytes,
    buffer: &Buffer,
) {
    loop {
        let answered = match requests.recv().await {
            Ok(request) => answer(&mut answers, request, topic, buffer).await,
            Err(error) => Err(error),
        };
        if let Err(error) = answered {
            tracing::warn!(%error, "cannot answer a replay request");
            // An error that stays must not take a whole core.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Sends the batches from the wanted sequence number on, and the end marker (sequence −1, no payload).
async fn answer(
    answers: &mut RouterSendHalf,
    request: ZmqMessage,
    topic: &Bytes,
    buffer: &Buffer,
) -> zeromq::ZmqResult<()> {
    let request = request.into_vec();
    let [client, _, start] = request.as_slice() else {
        tracing::warn!(
            frames = request.len(),
            "a replay request has the client, an empty frame and a number"
        );
        return Ok(());
    };
    // As in vLLM, any length is a big-endian number; more than 64 bits lie behind every batch.
    let start = start
        .iter()
        .fold(0u64, |value, byte| value.checked_mul(256).map_or(u64::MAX, |value| value | u64::from(*byte)));
    let wanted: Vec<_> = lock(buffer).iter().filter(|(number, _)| *number >= start).cloned().collect();
    for (number, payload) in wanted {
        let number = Bytes::copy_from_slice(&number.to_be_bytes());
        answers.send(frames([client.clone(), Bytes::new(), topic.clone(), number, payload])).await?;
    }
    let end = Bytes::copy_from_slice(&(-1i64).to_be_bytes());
    answers.send(frames([client.clone(), Bytes::new(), Bytes::new(), end, Bytes::new()])).await
}

fn frames<const N: usize>(frames: [Bytes; N]) -> ZmqMessage {
    let mut frames = frames.into_iter();
    let mut message = ZmqMessage::from(frames.next().expect("a message has a frame"));
    for frame in frames {
        message.push_back(frame);
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_have_vllms_form() {
        let stored = BlockStored {
            block_hashes: vec![7, u64::MAX],
            parent_block_hash: None,
            token_ids: vec![1, 2, 3, 4],
            block_size: 2,
            lora: None,
            extra_keys: vec![Some(vec!["salt".into()]), None],
        };
        let events = [KvEvent::Stored(stored), KvEvent::Removed { block_hash: 7 }, KvEvent::Cleared];
        let value: serde_json::Value = rmp_serde::from_slice(&encode_batch(1.5, &events)).unwrap();
        assert_eq!(
            value,
            serde_json::json!([1.5, [
                {"type": "BlockStored", "block_hashes": [7, u64::MAX], "parent_block_hash": null,
                 "token_ids": [1, 2, 3, 4], "block_size": 2, "lora_id": null, "medium": "GPU", "lora_name": null,
                 "extra_keys": [["salt"], null], "group_idx": 0, "kv_cache_spec_kind": "full_attention"},
                {"type": "BlockRemoved", "block_hashes": [7], "medium": "GPU", "group_idx": 0},
                {"type": "AllBlocksCleared"},
            ], 0])
        );
    }
}
