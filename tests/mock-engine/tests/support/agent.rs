//! A small agent: accepts an engine's connector, maps nothing, and copies blocks with `pread` and `pwrite`.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use baton_mock_engine::connector::{frame, read};
use baton_proto::connector::{Hello, Hold, Layout, Pull, Side, ToAgent, ToConnector, VERSION};
use baton_proto::ids::Epoch;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

/// An engine's KV memory, as its worker described it.
pub(crate) struct Memory {
    pub(crate) storages: Vec<(OwnedFd, u64)>,
    pub(crate) layout: Layout,
}

impl Memory {
    pub(crate) fn read(&self, block: u32) -> Vec<Vec<u8>> {
        let read = |piece: &baton_proto::connector::Piece| {
            let (fd, len) = &self.storages[piece.storage as usize];
            let at = piece.offset + u64::from(block) * piece.stride;
            assert!(at + u64::from(piece.len) <= *len);
            let mut bytes = vec![0; piece.len as usize];
            assert_eq!(rustix::io::pread(fd, &mut bytes[..], at).unwrap(), bytes.len());
            bytes
        };
        self.layout.pieces.iter().map(read).collect()
    }

    pub(crate) fn write(&self, block: u32, pieces: &[Vec<u8>]) {
        for (piece, bytes) in self.layout.pieces.iter().zip(pieces) {
            let (fd, _) = &self.storages[piece.storage as usize];
            let at = piece.offset + u64::from(block) * piece.stride;
            assert_eq!(rustix::io::pwrite(fd, bytes, at).unwrap(), bytes.len());
        }
    }
}

/// What an engine said.
#[derive(Debug)]
pub(crate) enum Said {
    /// Scheduler and worker are there.
    Registered,
    Hold(Hold),
    Pull(Pull),
    Cancel(String),
    /// Either connection ended.
    Lost,
}

/// One engine's connections, from the agent's side.
pub(crate) struct Agent {
    pub(crate) hellos: Vec<Hello>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) said: mpsc::UnboundedReceiver<Said>,
    worker: OwnedWriteHalf,
    scheduler: Option<OwnedWriteHalf>,
}

impl Agent {
    /// Waits for an engine at this socket, and welcomes it to an epoch.
    pub(crate) async fn accept(listener: &UnixListener, epoch: u64) -> Self {
        let (sender, said) = mpsc::unbounded_channel();
        let (mut scheduler, _) = listener.accept().await.unwrap();
        let scheduler_hello = hello(&mut scheduler, epoch).await;
        assert_eq!(scheduler_hello.side, Side::Scheduler);
        let (mut worker, _) = listener.accept().await.unwrap();
        let worker_hello = hello(&mut worker, epoch).await;
        assert_eq!(worker_hello.side, Side::Worker(0));
        let mut receiver = Receiver { stream: &worker, bytes: VecDeque::new(), fds: VecDeque::new() };
        let mut storages = Vec::new();
        let layout = loop {
            match receiver.message().await {
                ToAgent::Storage { len } => storages.push((receiver.fds.pop_front().unwrap(), len)),
                ToAgent::Layout(layout) => break layout,
                other => panic!("{other:?}"),
            }
        };
        assert!(receiver.bytes.is_empty() && receiver.fds.is_empty());
        let welcome = ToConnector::Welcome { version: VERSION, epoch: Epoch(epoch) };
        worker.write_all(&frame(&welcome)).await.unwrap();

        let (mut from_worker, worker) = worker.into_split();
        let (mut from_scheduler, scheduler) = scheduler.into_split();
        sender.send(Said::Registered).unwrap();
        let worker_sender = sender.clone();
        tokio::spawn(async move {
            while let Ok(Some(message)) = read::<ToAgent>(&mut from_worker).await {
                let ToAgent::Pull(pull) = message else { panic!("{message:?}") };
                let _ = worker_sender.send(Said::Pull(pull));
            }
            let _ = worker_sender.send(Said::Lost);
        });
        tokio::spawn(async move {
            while let Ok(Some(message)) = read::<ToAgent>(&mut from_scheduler).await {
                let said = match message {
                    ToAgent::Hold(hold) => Said::Hold(hold),
                    ToAgent::Cancel { request_id } => Said::Cancel(request_id),
                    other => panic!("{other:?}"),
                };
                let _ = sender.send(said);
            }
            let _ = sender.send(Said::Lost);
        });
        let memory = Arc::new(Memory { storages, layout });
        let mut agent = Self {
            hellos: vec![scheduler_hello, worker_hello],
            memory,
            said,
            worker,
            scheduler: Some(scheduler),
        };
        assert!(matches!(agent.next().await, Said::Registered));
        agent
    }

    pub(crate) async fn next(&mut self) -> Said {
        self.said.recv().await.unwrap()
    }

    pub(crate) async fn hold(&mut self) -> Hold {
        match self.next().await {
            Said::Hold(hold) => hold,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn pull(&mut self) -> Pull {
        match self.next().await {
            Said::Pull(pull) => pull,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn release(&mut self, request_id: &str) {
        let released = ToConnector::Released { request_ids: vec![request_id.to_owned()] };
        self.worker.write_all(&frame(&released)).await.unwrap();
    }

    pub(crate) async fn done(&mut self, request_id: &str, failed_blocks: Vec<u32>, error: &str) {
        let done = ToConnector::PullDone {
            request_id: request_id.to_owned(),
            failed_blocks,
            error: error.to_owned(),
        };
        self.worker.write_all(&frame(&done)).await.unwrap();
    }

    /// Copies what a hold of another engine has into the blocks of a pull.
    pub(crate) fn copy(&self, from: &Memory, hold: &Hold, pull: &Pull) {
        assert_eq!(hold.content.keys, pull.content.keys);
        assert!(hold.content.tokens.starts_with(&pull.content.tokens));
        assert_eq!(from.layout, self.memory.layout);
        for (source, target) in hold.block_ids[pull.first_block as usize..].iter().zip(&pull.block_ids) {
            self.memory.write(*target, &from.read(*source));
        }
    }

    /// Ends the scheduler's connection.
    pub(crate) fn hang_up_on_scheduler(&mut self) {
        self.scheduler = None;
    }
}

async fn hello(stream: &mut UnixStream, epoch: u64) -> Hello {
    let message: Option<ToAgent> = read(stream).await.unwrap();
    let Some(ToAgent::Hello(hello)) = message else { panic!("{message:?}") };
    let welcome = ToConnector::Welcome { version: VERSION, epoch: Epoch(epoch) };
    stream.write_all(&frame(&welcome)).await.unwrap();
    hello
}

/// Receives messages with their file descriptors.
struct Receiver<'a> {
    stream: &'a UnixStream,
    bytes: VecDeque<u8>,
    fds: VecDeque<OwnedFd>,
}

impl Receiver<'_> {
    async fn message(&mut self) -> ToAgent {
        loop {
            if self.bytes.len() >= 4 {
                let head: Vec<u8> = self.bytes.iter().take(4).copied().collect();
                let len = u32::from_le_bytes(head.try_into().unwrap()) as usize;
                if self.bytes.len() >= 4 + len {
                    let message: Vec<u8> = self.bytes.drain(..4 + len).skip(4).collect();
                    return rmp_serde::from_slice(&message).unwrap();
                }
            }
            let received = Mutex::new(Vec::new());
            let read = self.stream.async_io(Interest::READABLE, || {
                let mut bytes = [0; 1024];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let mut slices = [IoSliceMut::new(&mut bytes)];
                let got =
                    rustix::net::recvmsg(self.stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
                for message in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(fds) = message {
                        received.lock().unwrap().extend(fds);
                    }
                }
                Ok(bytes[..got.bytes].to_vec())
            });
            let bytes = read.await.unwrap();
            assert!(!bytes.is_empty(), "the connection ended");
            self.bytes.extend(bytes);
            self.fds.extend(received.into_inner().unwrap());
        }
    }
}

/// A socket in a folder of its own.
pub(crate) fn socket() -> (tempfile::TempDir, PathBuf, UnixListener) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    let listener = listen(&path);
    (folder, path, listener)
}

/// Listens at a path, which is taken over.
pub(crate) fn listen(path: &Path) -> UnixListener {
    let _ = std::fs::remove_file(path);
    UnixListener::bind(path).unwrap()
}
