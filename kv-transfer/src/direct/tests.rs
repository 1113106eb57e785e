//! What a process that comes by the socket is given, and when.

use std::sync::Arc;
use std::time::Duration;

use baton_kernels::EngineMemory;
use baton_proto::Epoch;
use baton_proto::wire::{Direct, ErrorCode, Frame, NearReply, PullHeader, Purpose, WireDtype};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

use super::socket::{self, NotGiven};
use crate::{Endpoint, HoldEnd, Limits};

#[path = "../../tests/support/mod.rs"]
mod support;

use support::{Authority, Shape, TableSource, hash, id};

const SHAPE: Shape = Shape { pieces: 3, piece_bytes: 4096, blocks: 16 };
const SECOND: Duration = Duration::from_secs(1);

struct Two {
    source: Arc<TableSource>,
    holder: Endpoint,
    puller: Endpoint,
    theirs: Arc<EngineMemory>,
}

impl Two {
    fn new() -> Self {
        let authority = Authority::new();
        let source = TableSource::new(1);
        let holder = support::endpoint(authority.issue("holder"), source.clone(), Limits::default());
        let puller = support::endpoint(authority.issue("puller"), TableSource::new(1), Limits::default());
        let theirs = SHAPE.memory();
        support::fill(&theirs, 0..16, 5);
        Self { source, holder, puller, theirs }
    }

    /// As the puller learns of it over QUIC.
    async fn near(&self) -> NearReply {
        let peer = support::peer("holder", &self.holder);
        let (link, _) = self.puller.shared().peers.get(&peer).await.unwrap();
        link.near().expect("the holder is on this host")
    }

    fn hold(&self, number: u8, blocks: Vec<u32>) -> PullHeader {
        let count = blocks.len() as u32;
        self.source.hold(id(number), &self.theirs, SHAPE, blocks, Duration::from_secs(60));
        PullHeader {
            transfer_id: id(number),
            epoch: Epoch(1),
            layout: SHAPE.fingerprint(),
            content: None,
            dtype: WireDtype::AsStored,
            last_hash: hash(count - 1),
            first_block: 0,
            blocks: count,
            rank: 0,
            ranks: 1,
            deadline_ms: 20_000,
            credit: u64::MAX,
        }
    }
}

/// Comes by the socket as any process might.
async fn call(near: &NearReply, token: [u8; 16], purpose: Purpose, pull: PullHeader) -> UnixStream {
    let mut stream = socket::connect(&near.name).unwrap();
    for frame in [Frame::Direct(Direct { token, purpose }), Frame::Pull(pull)] {
        stream.write_all(frame.encode().as_ref()).await.unwrap();
    }
    stream
}

async fn frame(stream: &mut UnixStream) -> Frame {
    let mut bytes = Vec::new();
    loop {
        if let Some((frame, _)) = Frame::decode(&bytes).unwrap() {
            return frame;
        }
        bytes.push(stream.read_u8().await.unwrap());
    }
}

#[tokio::test]
async fn without_a_ticket_nothing_is_said() {
    let two = Two::new();
    let near = two.near().await;
    let pull = two.hold(1, vec![3, 4]);
    for purpose in [Purpose::Map, Purpose::Copy] {
        let mut token = near.token;
        token[15] ^= 1;
        let mut stream = call(&near, token, purpose, pull).await;
        let mut said = Vec::new();
        timeout(SECOND, stream.read_to_end(&mut said)).await.unwrap().unwrap();
        assert!(said.is_empty());
    }
    // Nor with one whose connection is over.
    two.puller.close().await;
    let gone = async {
        loop {
            let mut stream = call(&near, near.token, Purpose::Map, pull).await;
            if stream.read(&mut [0; 1]).await.unwrap() == 0 {
                return;
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(5 * SECOND, gone).await.unwrap();
}

#[tokio::test]
async fn memory_is_given_for_a_pull_that_the_hold_admits_and_until_the_epoch_ends() {
    let two = Two::new();
    let near = two.near().await;
    let good = two.hold(1, vec![3, 4]);
    for (wrong, code) in [
        (PullHeader { transfer_id: id(9), ..good }, ErrorCode::UnknownTransfer),
        (PullHeader { epoch: Epoch(2), ..good }, ErrorCode::StaleEpoch),
        (PullHeader { last_hash: hash(7), ..good }, ErrorCode::ContentMismatch),
    ] {
        let stream = call(&near, near.token, Purpose::Map, wrong).await;
        match socket::take(&stream).await {
            Err(NotGiven::Refused(error)) => assert_eq!(error.code, code),
            other => panic!("{:?}", other.err().is_some()),
        }
    }
    let mut stream = call(&near, near.token, Purpose::Map, good).await;
    let Ok(shared) = socket::take(&stream).await else { panic!("nothing was given") };
    assert_eq!((shared.memory.num_blocks, shared.files.len()), (16, 3));
    let mut nothing = [0; 1];
    assert!(timeout(SECOND / 10, stream.read(&mut nothing)).await.is_err(), "it lasts");
    // It is no claim on the blocks: those can go.
    two.source.table.lock().unwrap().release(id(1));
    assert_eq!(two.source.released().await.end, HoldEnd::Released);
    assert!(timeout(SECOND / 10, stream.read(&mut nothing)).await.is_err(), "it lasts");
    two.source.table.lock().unwrap().drop_epoch(Epoch(2));
    assert_eq!(timeout(SECOND, stream.read(&mut nothing)).await.unwrap().unwrap(), 0);
}

#[tokio::test]
async fn blocks_stay_until_a_puller_that_hangs_lets_go_of_them() {
    let two = Two::new();
    let near = two.near().await;
    let pull = two.hold(1, vec![3, 4]);
    let mut stream = call(&near, near.token, Purpose::Copy, pull).await;
    let block_bytes = SHAPE.block_bytes() as u64;
    assert!(matches!(frame(&mut stream).await, Frame::Accepted(said) if said.block_bytes == block_bytes));
    for place in [3, 4] {
        assert!(matches!(frame(&mut stream).await, Frame::Block(_)));
        assert_eq!(frame(&mut stream).await, Frame::Place(place));
    }
    two.source.table.lock().unwrap().release(id(1));
    assert_eq!(frame(&mut stream).await, Frame::Refused(ErrorCode::Released.into()));
    assert!(timeout(SECOND / 5, two.source.released()).await.is_err(), "it may still read them");
    drop(stream);
    assert_eq!(timeout(SECOND, two.source.released()).await.unwrap().end, HoldEnd::Released);
}

#[tokio::test]
async fn a_puller_that_dies_leaves_the_hold_for_another_try() {
    let two = Two::new();
    let near = two.near().await;
    let pull = two.hold(1, vec![3, 4]);
    let mut stream = call(&near, near.token, Purpose::Copy, pull).await;
    frame(&mut stream).await;
    drop(stream);
    assert!(two.source.report().await.result.is_err());
    let ours = SHAPE.memory();
    let peer = support::peer("holder", &two.holder);
    let request = support::request(peer, id(1), 1, SHAPE, 0, 2);
    assert!(two.puller.pull(request, ours, vec![0, 1]).await.unwrap().direct);
    assert_eq!(two.source.released().await.end, HoldEnd::Finished);
}

#[tokio::test]
async fn a_port_that_is_not_the_holders_own_is_not_near() {
    let two = Two::new();
    let near = two.near().await;
    let shared = two.puller.shared();
    let peer = support::peer("holder", &two.holder);
    let (link, _) = shared.peers.get(&peer).await.unwrap();
    let asked = |port| {
        let connection = link.connection.clone();
        async move {
            let (mut send, mut recv) = connection.open_bi().await.unwrap();
            let near = Frame::Near(baton_proto::wire::Near { port }).encode();
            send.write_all(near.as_ref()).await.unwrap();
            send.finish().unwrap();
            let bytes = recv.read_to_end(256).await.unwrap();
            Frame::decode(&bytes).unwrap().unwrap().0
        }
    };
    let port = two.holder.local_addr().port();
    assert_eq!(asked(port).await, Frame::NearReply(near));
    assert_eq!(asked(port ^ 1).await, Frame::Refused(ErrorCode::Elsewhere.into()));
}
