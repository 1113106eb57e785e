//! Two agents, their memories, and the network between.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use baton_kernels::{BlockLayout, BlockMemory, Filling, Guard, MemoryError, Sliced};
use baton_proto::connector::{HeadSpan, Heads, Layout, Piece};
use baton_proto::wire::{BlockForm, ErrorCode, LayoutFingerprint, PullHeader, WireDtype, WireError};
use baton_proto::{BlockHash, Epoch, TransferId};
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::checksum::Checksums;
use crate::hold::{HeldBlocks, Hold, HoldEnd, HoldTable, RankHold};
use crate::protocol::*;

pub(super) const BLOCK_BYTES: usize = 200;
pub(super) const LAYOUT: LayoutFingerprint = LayoutFingerprint::from_bytes([1; 16]);
pub(super) const LEASE: Duration = Duration::from_secs(20);

/// How all blocks lie: two heads in each of two layers, of five tokens with five values of bf16.
pub(super) fn layout() -> BlockLayout {
    let span = |start| HeadSpan { start, head_stride: 50, dims: vec![(5, 10)], len: 10 };
    let layout = Layout {
        facts: BTreeMap::from([("dtype".to_owned(), "bfloat16".to_owned())]),
        order: BTreeMap::new(),
        pieces: vec![Piece { storage: 0, offset: 0, stride: BLOCK_BYTES as u64, len: BLOCK_BYTES as u32 }],
        heads: Some(Heads { total: 2, count: 2, spans: vec![span(0), span(100)] }),
    };
    BlockLayout { fingerprint: LAYOUT, ..BlockLayout::of(&layout, 1).unwrap() }
}

/// Bytes of a block that travels packed.
pub(super) fn packed_bytes() -> u64 {
    layout().packed_bytes().unwrap() as u64
}

/// What packing makes of a block.
pub(super) fn through_fp8(bytes: &[u8]) -> Vec<u8> {
    let (from, to) = (Memory::new(1, |_, at| bytes[at]), Memory::new(1, |_, _| 0));
    let (map, guard): (_, Guard) = (layout().heads.unwrap(), Arc::new(()));
    let packed = Sliced::whole(from, map.clone(), WireDtype::Fp8).unwrap().read(0, guard).unwrap().concat();
    Filling::new(to.clone(), map, WireDtype::Fp8).unwrap().write(0, 0, &packed).unwrap();
    to.block(0)
}

/// Blocks in plain vectors, which know how often each is being read.
pub(super) struct Memory {
    pub(super) blocks: Mutex<Vec<Vec<u8>>>,
    pub(super) readers: Arc<Mutex<BTreeMap<u32, usize>>>,
}

impl Memory {
    pub(super) fn new(blocks: usize, byte: impl Fn(usize, usize) -> u8) -> Arc<Self> {
        let block = |block| (0..BLOCK_BYTES).map(|at| byte(block, at)).collect();
        Arc::new(Self { blocks: Mutex::new((0..blocks).map(block).collect()), readers: Arc::default() })
    }

    pub(super) fn readers(&self, block: u32) -> usize {
        self.readers.lock().unwrap().get(&block).copied().unwrap_or(0)
    }

    pub(super) fn block(&self, block: u32) -> Vec<u8> {
        self.blocks.lock().unwrap()[block as usize].clone()
    }

    pub(super) fn flip(&self, block: u32, at: usize) {
        self.blocks.lock().unwrap()[block as usize][at] ^= 0x10;
    }
}

pub(super) struct Reading {
    pub(super) bytes: Vec<u8>,
    pub(super) block: u32,
    pub(super) readers: Arc<Mutex<BTreeMap<u32, usize>>>,
    pub(super) _guard: Guard,
}

impl AsRef<[u8]> for Reading {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        *self.readers.lock().unwrap().get_mut(&self.block).unwrap() -= 1;
    }
}

impl BlockMemory for Memory {
    fn block_bytes(&self) -> usize {
        BLOCK_BYTES
    }

    fn num_blocks(&self) -> u64 {
        self.blocks.lock().unwrap().len() as u64
    }

    fn read(self: Arc<Self>, block: u32, guard: Guard) -> Result<Vec<Bytes>, MemoryError> {
        let bytes = self.block(block);
        *self.readers.lock().unwrap().entry(block).or_default() += 1;
        let readers = self.readers.clone();
        Ok(vec![Bytes::from_owner(Reading { bytes, block, readers, _guard: guard })])
    }

    fn write(&self, block: u32, offset: usize, bytes: &[u8]) -> Result<(), MemoryError> {
        self.blocks.lock().unwrap()[block as usize][offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Side {
    Puller,
    Holder,
}

/// A packet of a stream: bytes at an offset, or its end.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    pub(super) to: Side,
    pub(super) stream: usize,
    pub(super) offset: u64,
    pub(super) bytes: Bytes,
    pub(super) end: Option<StreamEnd>,
}

/// One direction of a stream: what was sent, and what arrived out of order.
#[derive(Default)]
pub(super) struct Direction {
    pub(super) sent: u64,
    pub(super) arrived: u64,
    pub(super) early: BTreeMap<u64, Packet>,
    pub(super) over: bool,
}

/// What goes wrong in one run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weather {
    pub(super) loss: f64,
    pub(super) duplicate: f64,
    /// Longest delay of a packet.
    pub(super) delay: Duration,
    pub(super) mtu: usize,
}

pub(super) struct Transfer {
    pub(super) id: TransferId,
    pub(super) first: u32,
    pub(super) blocks: u32,
    pub(super) window: u64,
    pub(super) target: Arc<Memory>,
    pub(super) filling: Option<Filling>,
    pub(super) receiver: Receiver,
    pub(super) sender: Option<Sender>,
    pub(super) held: Option<HeldBlocks>,
    pub(super) gathered: Option<Bytes>,
    pub(super) outcome: Option<Result<Received, Stop>>,
    pub(super) served: Option<Result<(), WireError>>,
    /// KV bytes sent and not arrived at the receiver.
    pub(super) flying: i64,
    pub(super) directions: BTreeMap<Side, Direction>,
}

pub(super) struct Pair {
    pub(super) seed: u64,
    pub(super) rng: StdRng,
    pub(super) start: Instant,
    pub(super) now: Instant,
    pub(super) weather: Weather,
    /// By time, then by order of sending.
    pub(super) network: BTreeMap<(Instant, u64), Packet>,
    pub(super) packets: u64,
    pub(super) table: HoldTable,
    pub(super) source: Arc<Memory>,
    /// Which blocks each hold has.
    pub(super) holds: BTreeMap<TransferId, Vec<u32>>,
    pub(super) ended: BTreeMap<TransferId, HoldEnd>,
    pub(super) transfers: Vec<Transfer>,
    pub(super) next_block: u32,
}

pub(super) fn hash(block: usize) -> BlockHash {
    BlockHash::from_bytes((block as u128 + 1).to_le_bytes())
}

pub(super) fn original(block: usize, at: usize) -> u8 {
    (block * 31 + at * 7 + (block * at) % 5) as u8
}

impl Pair {
    pub(super) fn new(seed: u64, weather: Weather) -> Self {
        // Shown when the test fails; `replay_one_seed` repeats it.
        eprintln!("seed {seed}");
        let start = Instant::now();
        Self {
            seed,
            rng: StdRng::seed_from_u64(seed),
            start,
            now: start,
            weather,
            network: BTreeMap::new(),
            packets: 0,
            table: HoldTable::new(Epoch(1), 100, Arc::new(|| {})),
            source: Memory::new(400, original),
            holds: BTreeMap::new(),
            ended: BTreeMap::new(),
            transfers: Vec::new(),
            next_block: 0,
        }
    }

    pub(super) fn hold(&mut self, number: u8, blocks: u32) -> TransferId {
        let id = TransferId::from_bytes([number; 16]);
        // Not in order, as an engine's blocks are not.
        let block_ids: Vec<u32> = (self.next_block..self.next_block + blocks).rev().collect();
        self.next_block += blocks;
        let checksums = Checksums::pending(blocks as usize);
        let memory: Arc<dyn BlockMemory> = self.source.clone();
        let hold = Hold {
            request_id: format!("r{number}"),
            transfer_id: id,
            hashes: (0..blocks as usize).map(hash).collect(),
            block_ids: block_ids.clone(),
            ranks: vec![RankHold { memory: memory.clone(), layout: layout(), checksums }],
        };
        let making = self.table.insert(self.now, hold, LEASE).unwrap();
        making.iter().for_each(|making| making.run().unwrap());
        self.holds.insert(id, block_ids);
        id
    }

    pub(super) fn header(&self, id: TransferId, first: u32, blocks: u32) -> PullHeader {
        PullHeader {
            transfer_id: id,
            epoch: Epoch(1),
            layout: LAYOUT,
            content: None,
            dtype: WireDtype::AsStored,
            last_hash: hash((first + blocks).saturating_sub(1) as usize),
            first_block: first,
            blocks,
            rank: 0,
            ranks: 1,
            deadline_ms: 10_000,
            credit: 1_000,
        }
    }

    pub(super) fn pull(&mut self, header: PullHeader) -> usize {
        let config = ReceiverConfig {
            pull: header,
            block_bytes: BLOCK_BYTES as u64,
            packed_bytes: (header.dtype == WireDtype::Fp8).then(packed_bytes),
            deadline: self.now + Duration::from_millis(u64::from(header.deadline_ms)),
            stall: Duration::from_secs(4),
            direct: false,
        };
        self.transfers.push(Transfer {
            id: header.transfer_id,
            first: header.first_block,
            blocks: header.blocks,
            window: header.credit,
            target: Memory::new(header.blocks as usize, |_, _| 0xee),
            filling: None,
            receiver: Receiver::new(self.now, config),
            sender: None,
            held: None,
            gathered: None,
            outcome: None,
            served: None,
            flying: 0,
            directions: BTreeMap::from([
                (Side::Puller, Direction::default()),
                (Side::Holder, Direction::default()),
            ]),
        });
        self.transfers.len() - 1
    }

    /// Puts bytes on the way, in packets, each of which arrives at last unless its stream is over by then.
    pub(super) fn send(&mut self, stream: usize, to: Side, mut bytes: Bytes, end: Option<StreamEnd>) {
        loop {
            let len = self.rng.random_range(1..=self.weather.mtu).min(bytes.len());
            let direction = self.transfers[stream].directions.get_mut(&to).unwrap();
            let piece = bytes.split_to(len);
            let last = bytes.is_empty();
            let packet =
                Packet { to, stream, offset: direction.sent, bytes: piece, end: end.filter(|_| last) };
            direction.sent += len as u64;
            loop {
                let mut delay = self.weather.delay.mul_f64(self.rng.random::<f64>());
                while self.rng.random_bool(self.weather.loss) {
                    delay += self.weather.delay * 3;
                }
                self.packets += 1;
                self.network.insert((self.now + delay, self.packets), packet.clone());
                if !self.rng.random_bool(self.weather.duplicate) {
                    break;
                }
            }
            if last {
                return;
            }
        }
    }

    /// Ends a direction at once: nothing that is under way arrives.
    pub(super) fn cut(&mut self, stream: usize, to: Side, end: StreamEnd) {
        self.network.retain(|_, packet| (packet.stream, packet.to) != (stream, to));
        let direction = self.transfers[stream].directions.get_mut(&to).unwrap();
        if !std::mem::replace(&mut direction.over, true) {
            direction.early.clear();
            self.ended(stream, to, end);
        }
    }

    pub(super) fn lose(&mut self, stream: usize) {
        self.cut(stream, Side::Puller, StreamEnd::Lost);
        self.cut(stream, Side::Holder, StreamEnd::Lost);
    }

    /// Another life of the holder: connections and holds are gone, and its engine's memory has new content.
    pub(super) fn restart_holder(&mut self) {
        for stream in 0..self.transfers.len() {
            self.lose(stream);
            self.transfers[stream].sender = None;
            self.transfers[stream].held = None;
            self.transfers[stream].gathered = None;
        }
        self.table.drop_epoch(Epoch(2));
        self.release();
    }

    pub(super) fn ended(&mut self, stream: usize, side: Side, end: StreamEnd) {
        let transfer = &mut self.transfers[stream];
        match side {
            Side::Puller => transfer.receiver.handle_end(end),
            Side::Holder => {
                if let Some(sender) = &mut transfer.sender {
                    sender.handle_end(end);
                }
            }
        }
        self.act(stream);
    }

    pub(super) fn arrive(&mut self, packet: Packet) {
        let Packet { to, stream, .. } = packet;
        let direction = self.transfers[stream].directions.get_mut(&to).unwrap();
        if direction.over || packet.offset < direction.arrived {
            return;
        }
        direction.early.insert(packet.offset, packet);
        loop {
            let direction = self.transfers[stream].directions.get_mut(&to).unwrap();
            let Some(packet) = direction.early.remove(&direction.arrived) else { return };
            direction.arrived += packet.bytes.len() as u64;
            direction.over |= packet.end.is_some();
            // An empty end may share its offset with nothing else.
            if !packet.bytes.is_empty() {
                let transfer = &mut self.transfers[stream];
                match to {
                    Side::Puller => transfer.receiver.handle_bytes(self.now, packet.bytes),
                    Side::Holder => {
                        let (now, config) = (self.now, sender_config());
                        let sender = transfer.sender.get_or_insert_with(|| Sender::new(now, config));
                        sender.handle_bytes(now, packet.bytes);
                    }
                }
                self.act(stream);
            }
            if let Some(end) = packet.end {
                return self.ended(stream, to, end);
            }
            if self.transfers[stream].directions[&to].over {
                return;
            }
        }
    }

    /// Does what both machines of a stream say.
    pub(super) fn act(&mut self, stream: usize) {
        self.act_receiver(stream);
        self.act_sender(stream);
    }

    pub(super) fn act_receiver(&mut self, stream: usize) {
        while let Some(action) = self.transfers[stream].receiver.poll() {
            match action {
                ReceiverAction::Send(frame) => {
                    self.send(stream, Side::Holder, Bytes::copy_from_slice(frame.as_ref()), None);
                }
                ReceiverAction::Write { index, offset, bytes } => {
                    let transfer = &mut self.transfers[stream];
                    transfer.flying -= bytes.len() as i64;
                    let Transfer { target, filling, receiver, .. } = transfer;
                    match receiver.form() {
                        BlockForm::AsItLies => target.write(index, offset, &bytes).unwrap(),
                        form => {
                            let map = layout().heads.unwrap();
                            let new = || Filling::new(target.clone(), map, form.dtype()).unwrap();
                            filling.get_or_insert_with(new).write(index, offset, &bytes).unwrap();
                        }
                    }
                }
                ReceiverAction::Copy { .. } => panic!("a place in a pull over a network"),
                ReceiverAction::Done(result) => {
                    let stopped = result.is_err();
                    assert!(self.transfers[stream].outcome.replace(result).is_none(), "done twice");
                    self.send(stream, Side::Holder, Bytes::new(), Some(StreamEnd::Finished));
                    if stopped {
                        let direction = self.transfers[stream].directions.get_mut(&Side::Puller).unwrap();
                        direction.over = true;
                        direction.early.clear();
                        self.network.retain(|_, packet| (packet.stream, packet.to) != (stream, Side::Puller));
                    }
                }
            }
        }
    }

    pub(super) fn act_sender(&mut self, stream: usize) {
        loop {
            let transfer = &mut self.transfers[stream];
            let Some(action) = transfer.sender.as_mut().and_then(Sender::poll) else { return };
            match action {
                SenderAction::Open(pull) => {
                    let opened = self.table.open(self.now, &pull);
                    let accepted = opened.as_ref().map(HeldBlocks::accepted).map_err(|error| *error);
                    transfer.held = opened.ok();
                    transfer.sender.as_mut().unwrap().handle_opened(self.now, accepted);
                }
                SenderAction::Send(frame) => {
                    self.send(stream, Side::Puller, Bytes::copy_from_slice(frame.as_ref()), None);
                }
                SenderAction::Gather(index) => {
                    let held = transfer.held.as_ref().unwrap();
                    let (pieces, checksum) = match held.checksum(index) {
                        Some(checksum) => {
                            let block = held.block(index).unwrap();
                            (held.memory.clone().read(block, held.claim.guard()).unwrap(), checksum)
                        }
                        None => {
                            let part = &held.parts[0];
                            let known = part.checksums.get(part.first_block + index as usize).unwrap();
                            let made = held.make_now(held.block(index).unwrap(), known).unwrap();
                            (made.pieces, made.checksum)
                        }
                    };
                    transfer.gathered = Some(pieces[0].clone());
                    transfer.sender.as_mut().unwrap().handle_block(Ok(checksum));
                }
                SenderAction::Payload(range) => {
                    transfer.flying += range.len() as i64;
                    let window = transfer.window as i64;
                    assert!(transfer.flying <= window, "{} of {window} bytes", transfer.flying);
                    let bytes = transfer.gathered.as_ref().unwrap().slice(range);
                    self.send(stream, Side::Puller, bytes, None);
                }
                SenderAction::Finished => transfer.held.as_ref().unwrap().claim.finish(),
                SenderAction::Done(close, result) => {
                    assert!(transfer.served.replace(result).is_none(), "done twice");
                    transfer.held = None;
                    transfer.gathered = None;
                    match close {
                        Close::Finish => {
                            self.send(stream, Side::Puller, Bytes::new(), Some(StreamEnd::Finished));
                        }
                        Close::Reset(code) => {
                            let end = StreamEnd::Reset(code as u64);
                            self.network
                                .retain(|_, packet| (packet.stream, packet.to) != (stream, Side::Puller));
                            self.cut(stream, Side::Puller, end);
                        }
                    }
                }
            }
        }
    }

    /// Gives released blocks back to the engine, which writes to them at once.
    pub(super) fn release(&mut self) {
        for released in self.table.poll(self.now) {
            for block in &self.holds[&released.transfer_id] {
                assert_eq!(self.source.readers(*block), 0, "a copy of a released block is in flight");
                self.source.blocks.lock().unwrap()[*block as usize].fill(0xdd);
            }
            assert!(self.ended.insert(released.transfer_id, released.end).is_none(), "released twice");
        }
    }

    pub(super) fn next_event(&self) -> Option<Instant> {
        let timers = self.transfers.iter().flat_map(|transfer| {
            let sender = transfer.sender.as_ref().and_then(Sender::poll_timeout);
            transfer.receiver.poll_timeout().into_iter().chain(sender)
        });
        let packet = self.network.keys().next().map(|(at, _)| *at);
        timers.chain(packet).chain(self.table.poll_timeout()).min()
    }

    /// Goes on to the next thing that happens; `false` where nothing does any more.
    pub(super) fn step(&mut self) -> bool {
        let Some(next) = self.next_event() else { return false };
        self.now = self.now.max(next);
        while let Some(entry) = self.network.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let packet = entry.remove();
            self.arrive(packet);
        }
        for stream in 0..self.transfers.len() {
            let transfer = &mut self.transfers[stream];
            transfer.receiver.handle_timeout(self.now);
            if let Some(sender) = &mut transfer.sender {
                sender.handle_timeout(self.now);
            }
            self.act(stream);
        }
        self.release();
        for stream in 0..self.transfers.len() {
            let transfer = &mut self.transfers[stream];
            let end = transfer.held.as_ref().and_then(|held| held.claim.end());
            if let (Some(end), Some(sender)) = (end, &mut transfer.sender) {
                sender.handle_hold_ended(end.code());
                self.act(stream);
            }
        }
        self.release();
        true
    }

    pub(super) fn start(&mut self) {
        for stream in 0..self.transfers.len() {
            self.act(stream);
        }
    }

    /// Until nothing happens any more; then checks what always holds.
    pub(super) fn run(&mut self) {
        self.start();
        while self.step() {
            assert!(self.now < self.start + Duration::from_secs(120), "seed {}: never ends", self.seed);
        }
        assert!(self.network.is_empty());
        assert!(self.table.is_empty(), "holds remain");
        for transfer in &self.transfers {
            let Some(Ok(received)) = &transfer.outcome else {
                assert!(transfer.outcome.is_some(), "a pull has no end");
                continue;
            };
            for block in 0..transfer.blocks as usize {
                if received.failed.contains(&block) {
                    continue;
                }
                let source = self.holds[&transfer.id][transfer.first as usize + block] as usize;
                let mut expected: Vec<u8> = (0..BLOCK_BYTES).map(|at| original(source, at)).collect();
                if transfer.receiver.form() == BlockForm::Packed {
                    expected = through_fp8(&expected);
                }
                assert!(transfer.target.block(block as u32) == expected, "block {block} is wrong");
            }
        }
    }

    pub(super) fn outcome(&self, stream: usize) -> &Result<Received, Stop> {
        self.transfers[stream].outcome.as_ref().expect("an end")
    }

    pub(super) fn refusal(&self, stream: usize) -> ErrorCode {
        match self.outcome(stream) {
            Err(Stop::ByPeer(error)) => error.code,
            other => panic!("not refused: {other:?}"),
        }
    }
}

pub(super) fn sender_config() -> SenderConfig {
    SenderConfig { hello: Duration::from_secs(5), max_deadline: Duration::from_secs(60) }
}

pub(super) fn calm() -> Weather {
    Weather { loss: 0.0, duplicate: 0.0, delay: Duration::from_millis(1), mtu: 300 }
}

pub(super) fn weather(rng: &mut StdRng) -> Weather {
    Weather {
        loss: rng.random_range(0.0..0.3),
        duplicate: rng.random_range(0.0..0.2),
        delay: Duration::from_micros(rng.random_range(1..20_000)),
        mtu: rng.random_range(1..700),
    }
}
