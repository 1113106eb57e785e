//! A double of an engine: its HTTP server, its KV events, and its connectors with real shared memory.

use std::collections::VecDeque;
use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use baton_proto::connector::{
    Computed, Content, HeadSpan, Heads, Hello, Hold, Layout, Piece, Pull, Side, ToAgent, ToConnector, VERSION,
};
use baton_proto::plan::Source;
use baton_proto::{ContentKeys, Epoch, TransferId};
use bytes::Bytes;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::json;
use tokio::io::Interest;
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

use crate::fleet::LONG;

pub(crate) const MODEL: &str = "m";
pub(crate) const BLOCK: u32 = 16;
pub(crate) const BLOCKS: u64 = 64;

/// Its HTTP server, and where it publishes events.
pub(crate) struct Engine {
    pub(crate) url: String,
    pub(crate) events: String,
    pub(crate) replay: Option<String>,
    up: Arc<AtomicBool>,
}

impl Engine {
    /// With an HTTP server, and events on sockets in `dir` that nobody publishes on yet.
    pub(crate) async fn start(dir: &Path, name: &str) -> Self {
        let up = Arc::new(AtomicBool::new(true));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let models = json!({"data": [{"id": MODEL}, {"id": "adapter", "parent": MODEL}]}).to_string();
        let metrics = format!(
            "vllm:num_requests_running{{engine=\"0\"}} 3\nvllm:kv_cache_usage_perc 0.5\n\
             vllm:cache_config_info{{block_size=\"{BLOCK}\",num_gpu_blocks=\"{BLOCKS}\"}} 1\n"
        );
        let answer = |body: String| {
            let up = up.clone();
            get(move || async move {
                if up.load(Ordering::Relaxed) { Ok(body) } else { Err(StatusCode::SERVICE_UNAVAILABLE) }
            })
        };
        let app = Router::new().route("/v1/models", answer(models)).route("/metrics", answer(metrics));
        tokio::spawn(async move { axum::serve(listener, app).await });
        let endpoint = |kind: &str| format!("ipc://{}/{name}.{kind}", dir.display());
        Self { url, events: endpoint("events"), replay: Some(endpoint("replay")), up }
    }

    /// Whether its HTTP server answers.
    pub(crate) fn set_up(&self, up: bool) {
        self.up.store(up, Ordering::Relaxed);
    }
}

/// What becomes of a batch of events.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is sent, and can be replayed.
    Sent,
    /// It is lost, and can be replayed.
    Lost,
    /// It is lost for good.
    Forgotten,
}

/// One life of an engine's event publisher.
pub(crate) struct Publisher {
    batches: mpsc::Sender<(Bytes, Fate)>,
    stop: Option<oneshot::Sender<oneshot::Sender<()>>>,
}

impl Publisher {
    pub(crate) async fn start(engine: &Engine) -> Self {
        for endpoint in [Some(&engine.events), engine.replay.as_ref()].into_iter().flatten() {
            let _ = std::fs::remove_file(endpoint.strip_prefix("ipc://").unwrap());
        }
        let mut publisher = PubSocket::new();
        publisher.bind(&engine.events).await.unwrap();
        let mut replay = RouterSocket::new();
        if let Some(endpoint) = &engine.replay {
            replay.bind(endpoint).await.unwrap();
        }
        let (batches, mut queue) = mpsc::channel::<(Bytes, Fate)>(64);
        let (stop, mut stopped) = oneshot::channel::<oneshot::Sender<()>>();
        tokio::spawn(async move {
            let mut kept: VecDeque<(u64, Bytes)> = VecDeque::new();
            let mut next = 0u64;
            let done = loop {
                tokio::select! {
                    done = &mut stopped => break done,
                    Some((payload, fate)) = queue.recv() => {
                        if fate != Fate::Forgotten {
                            kept.push_back((next, payload.clone()));
                        }
                        if fate == Fate::Sent {
                            let frames = [Bytes::from_static(b"kv-events"), number(next), payload];
                            publisher.send(message(frames)).await.unwrap();
                        }
                        next += 1;
                    }
                    Ok(request) = replay.recv() => {
                        let frames = request.into_vec();
                        let [id, _, from] = &frames[..] else { panic!("{frames:?}") };
                        let from = u64::from_be_bytes(from[..].try_into().unwrap());
                        let topic = Bytes::from_static(b"kv-events");
                        for (seq, payload) in kept.iter().filter(|(seq, _)| *seq >= from) {
                            let frames = [id.clone(), Bytes::new(), topic.clone(), number(*seq), payload.clone()];
                            let _ = replay.send(message(frames)).await;
                        }
                        let end = [id.clone(), Bytes::new(), Bytes::new(), number(u64::MAX), Bytes::new()];
                        let _ = replay.send(message(end)).await;
                    }
                }
            };
            // Closing removes the sockets' files; dropping does so at some later time.
            assert!(publisher.close().await.is_empty() && replay.close().await.is_empty());
            if let Ok(done) = done {
                let _ = done.send(());
            }
        });
        Self { batches, stop: Some(stop) }
    }

    pub(crate) async fn publish(&self, events: serde_json::Value, fate: Fate) {
        let batch = rmp_serde::to_vec_named(&json!([0.5, events, 0])).unwrap();
        self.batches.send((batch.into(), fate)).await.unwrap();
    }

    /// Closes its sockets.
    pub(crate) async fn stop(mut self) {
        let (done, stopped) = oneshot::channel();
        let _ = self.stop.take().unwrap().send(done);
        stopped.await.unwrap();
    }
}

fn number(seq: u64) -> Bytes {
    Bytes::copy_from_slice(&seq.to_be_bytes())
}

fn message<const N: usize>(frames: [Bytes; N]) -> ZmqMessage {
    ZmqMessage::try_from(frames.to_vec()).unwrap()
}

/// `BlockStored` of a block under each hash, its tokens following from the hash.
pub(crate) fn stored(parent: Option<u64>, hashes: &[u64]) -> serde_json::Value {
    let tokens: Vec<u64> = hashes.iter().flat_map(|hash| tokens_of(*hash)).collect();
    json!({
        "type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens,
        "block_size": BLOCK, "lora_id": null, "medium": "GPU", "lora_name": null
    })
}

pub(crate) fn removed(hash: u64) -> serde_json::Value {
    json!({"type": "BlockRemoved", "block_hashes": [hash], "medium": "GPU"})
}

pub(crate) fn tokens_of(hash: u64) -> impl Iterator<Item = u64> {
    (0..u64::from(BLOCK)).map(move |i| hash * 1000 + i)
}

/// The KV memory of one worker: two storages, three pieces to a block. A block has `scale` heads, one after another.
pub(crate) struct Memory {
    files: [File; 2],
    pieces: Vec<Piece>,
    scale: u32,
}

/// Bytes of one of its heads in a block.
pub(crate) const HEAD: u32 = 4096 + 1024 + 512;

impl Memory {
    pub(crate) fn new(scale: u32) -> Self {
        let pieces = vec![
            Piece { storage: 0, offset: 0, stride: u64::from(4096 * scale), len: 4096 * scale },
            Piece { storage: 1, offset: 512, stride: u64::from(3072 * scale), len: 1024 * scale },
            Piece {
                storage: 1,
                offset: 512 + u64::from(2048 * scale),
                stride: u64::from(3072 * scale),
                len: 512 * scale,
            },
        ];
        let files = [4096, 3072].map(|stride: u64| {
            let file = File::from(memfd_create("kv", MemfdFlags::CLOEXEC).unwrap());
            file.set_len(stride * u64::from(scale) * BLOCKS + 1024).unwrap();
            file
        });
        Self { files, pieces, scale }
    }

    fn runs(&self, block: u32) -> impl Iterator<Item = (&File, u64, usize)> {
        self.pieces.iter().map(move |piece| {
            (
                &self.files[piece.storage as usize],
                piece.offset + u64::from(block) * piece.stride,
                piece.len as usize,
            )
        })
    }

    pub(crate) fn read(&self, block: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (file, offset, len) in self.runs(block) {
            let start = bytes.len();
            bytes.resize(start + len, 0);
            file.read_exact_at(&mut bytes[start..], offset).unwrap();
        }
        bytes
    }

    /// Fills a block with bytes that follow from `seed`. As bf16 they are values from 2^-7 to 2, of either sign.
    pub(crate) fn fill(&self, block: u32, seed: u64) {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for (file, offset, len) in self.runs(block) {
            let bytes: Vec<u8> = (0..len)
                .map(|at| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    if at % 2 == 0 { state as u8 } else { state as u8 & 0x83 | 0x3C }
                })
                .collect();
            file.write_all_at(&bytes, offset).unwrap();
        }
    }

    /// Changes one bit in the last piece of a block.
    pub(crate) fn flip(&self, block: u32) {
        let (file, offset, len) = self.runs(block).last().unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset + len as u64 - 1).unwrap();
        file.write_all_at(&[byte[0] ^ 4], offset + len as u64 - 1).unwrap();
    }

    pub(crate) fn layout(&self, dtype: &str, rank: u32, ranks: u32) -> Layout {
        let order = [("tp_rank", rank.to_string()), ("tp_size", ranks.to_string())];
        Layout {
            facts: [("dtype".to_owned(), dtype.to_owned())].into(),
            order: order.map(|(name, value)| (name.to_owned(), value)).into(),
            pieces: self.pieces.clone(),
            heads: Some(Heads {
                total: self.scale * ranks,
                count: self.scale,
                spans: vec![HeadSpan { start: 0, head_stride: HEAD, dims: vec![], len: HEAD }],
            }),
        }
    }
}

/// One connection to the agent.
pub(crate) struct Connection {
    stream: Arc<UnixStream>,
    said: mpsc::Receiver<ToConnector>,
}

impl Connection {
    pub(crate) async fn open(socket: &Path) -> Self {
        let stream = crate::fleet::eventually("the agent's socket", || async {
            UnixStream::connect(socket).await.ok()
        })
        .await;
        let stream = Arc::new(stream);
        let (tell, said) = mpsc::channel(256);
        let reader = stream.clone();
        tokio::spawn(async move {
            let mut buffer = Vec::new();
            loop {
                while let Some((length, rest)) = buffer.split_first_chunk::<4>() {
                    let length = u32::from_le_bytes(*length) as usize;
                    let Some(body) = rest.get(..length) else { break };
                    if tell.send(rmp_serde::from_slice(body).unwrap()).await.is_err() {
                        return;
                    }
                    buffer.drain(..4 + length);
                }
                let mut chunk = [0; 4096];
                reader.readable().await.unwrap();
                match reader.try_read(&mut chunk) {
                    Ok(0) => return,
                    Ok(n) => buffer.extend_from_slice(&chunk[..n]),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(_) => return,
                }
            }
        });
        Self { stream, said }
    }

    pub(crate) async fn say(&self, message: &ToAgent) {
        self.send(&framed(message), None).await;
    }

    pub(crate) async fn say_with(&self, message: &ToAgent, file: &File) {
        self.send(&framed(message), Some(file)).await;
    }

    pub(crate) async fn send(&self, mut bytes: &[u8], mut file: Option<&File>) {
        while !bytes.is_empty() {
            let sent = self.stream.async_io(Interest::WRITABLE, || {
                let fds = file.map(|file| [file.as_fd()]);
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                if let Some(fds) = &fds {
                    assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
                }
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                Ok(sendmsg(self.stream.as_fd(), &[IoSlice::new(bytes)], &mut ancillary, flags)?)
            });
            let sent = sent.await.unwrap();
            file = None;
            bytes = &bytes[sent..];
        }
    }

    /// The agent's next word; `None` when it has closed the connection.
    pub(crate) async fn next(&mut self) -> Option<ToConnector> {
        tokio::time::timeout(LONG, self.said.recv()).await.expect("waited in vain for the agent's next word")
    }

    /// Says that nothing more comes, as a dying engine does, and leaves open what the agent may still say.
    pub(crate) fn hang_up(&self) {
        rustix::net::shutdown(self.stream.as_fd(), rustix::net::Shutdown::Write).unwrap();
    }

    /// Waits for the agent to close the connection.
    pub(crate) async fn closed(&mut self) {
        while self.next().await.is_some() {}
    }
}

impl Drop for Connection {
    /// As the death of its process does. The task that reads has a handle of its own.
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(self.stream.as_fd(), rustix::net::Shutdown::Both);
    }
}

pub(crate) fn framed(message: &ToAgent) -> Vec<u8> {
    let body = rmp_serde::to_vec_named(message).unwrap();
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend(body);
    bytes
}

pub(crate) fn hello(instance: &str, side: Side, tp_size: u32) -> ToAgent {
    ToAgent::Hello(Hello {
        version: VERSION,
        instance: instance.to_owned(),
        side,
        tp_size,
        model: MODEL.to_owned(),
        block_size: BLOCK,
        num_blocks: BLOCKS,
        chunk_tokens: 2 * BLOCK,
    })
}

/// All connectors of an engine, attached.
pub(crate) struct Attached {
    pub(crate) scheduler: Connection,
    pub(crate) workers: Vec<(Connection, Memory)>,
    pub(crate) epoch: Epoch,
}

impl Attached {
    pub(crate) async fn one(socket: &Path, instance: &str) -> Self {
        Self::new(socket, instance, 1, "bf16", 1).await
    }

    pub(crate) async fn new(socket: &Path, instance: &str, tp_size: u32, dtype: &str, scale: u32) -> Self {
        let mut scheduler = Connection::open(socket).await;
        scheduler.say(&hello(instance, Side::Scheduler, tp_size)).await;
        let Some(ToConnector::Welcome { epoch, .. }) = scheduler.next().await else { panic!("no welcome") };
        let mut workers = Vec::new();
        for rank in 0..tp_size {
            let mut worker = Connection::open(socket).await;
            let memory = Memory::new(scale);
            worker.say(&hello(instance, Side::Worker(rank), tp_size)).await;
            for file in &memory.files {
                worker.say_with(&ToAgent::Storage { len: file.metadata().unwrap().len() }, file).await;
            }
            worker.say(&ToAgent::Layout(memory.layout(dtype, rank, tp_size))).await;
            for _ in 0..2 {
                assert_eq!(worker.next().await, Some(ToConnector::Welcome { version: VERSION, epoch }));
            }
            workers.push((worker, memory));
        }
        Self { scheduler, workers, epoch }
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.workers[0].1
    }

    /// Holds blocks of a prompt of so many tokens.
    pub(crate) async fn hold(&self, transfer: u8, block_ids: &[u32], tokens: u32, lease_ms: u32) {
        let hold = Hold {
            request_id: format!("hold-{transfer}"),
            transfer_id: transfer_id(transfer),
            lease_ms,
            content: content(tokens),
            block_ids: block_ids.to_vec(),
        };
        self.scheduler.say(&ToAgent::Hold(hold)).await;
    }

    /// A rank has computed more of a held prompt.
    pub(crate) async fn computed(&self, rank: usize, transfer: u8, first_block: u32, block_ids: &[u32]) {
        let request_id = format!("hold-{transfer}");
        let computed = Computed { request_id, first_block, block_ids: block_ids.to_vec() };
        self.workers[rank].0.say(&ToAgent::Computed(computed)).await;
    }

    /// Starts to pull what `source` holds into blocks of one rank.
    pub(crate) async fn pull(
        &self,
        rank: usize,
        transfer: u8,
        source: Source,
        first_block: u32,
        block_ids: &[u32],
        tokens: u32,
    ) {
        let pull = Pull {
            request_id: format!("pull-{transfer}"),
            transfer_id: transfer_id(transfer),
            source,
            deadline_ms: 20_000,
            content: content(tokens),
            first_block,
            block_ids: block_ids.to_vec(),
        };
        self.workers[rank].0.say(&ToAgent::Pull(pull)).await;
    }

    /// The end of a pull: the blocks that failed, and why.
    pub(crate) async fn pulled(&mut self, rank: usize) -> (Vec<u32>, String) {
        match self.workers[rank].0.next().await {
            Some(ToConnector::PullDone { failed_blocks, error, .. }) => (failed_blocks, error),
            other => panic!("{other:?} instead of the end of a pull"),
        }
    }

    /// The requests that are released next.
    pub(crate) async fn released(&mut self, rank: usize) -> Vec<String> {
        match self.workers[rank].0.next().await {
            Some(ToConnector::Released { request_ids }) => request_ids,
            other => panic!("{other:?} instead of a release"),
        }
    }
}

pub(crate) fn transfer_id(i: u8) -> TransferId {
    TransferId::from_bytes([i; 16])
}

pub(crate) fn content(tokens: u32) -> Content {
    Content { tokens: (0..tokens).flat_map(u32::to_le_bytes).collect(), keys: ContentKeys::default() }
}
