//! The model: KV bytes from tokens, and the next token from KV bytes.
//!
//! The KV of a position is a pseudo-random function of the tokens up to it, whatever chunks they were computed in. The
//! next token is a hash over every KV byte of the sequence, read from the shared memory at each step. So two engines
//! agree on an output exactly if they agree on the cache, and one wrong byte anywhere changes it.
//!
//! K and V of each layer are hashed as streams of their own, so that the output depends on neither block size nor which
//! blocks a sequence lies in.

use std::io;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::block_pool::BlockId;
use crate::kv_memory::KvMemory;

/// Bytes read or written with one system call, at most; one block at least.
const RUN_BYTES: usize = 256 << 10;

/// What is computed from a prefix of tokens, from which the KV of the next one follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain(u64);

impl Chain {
    /// The chain of no tokens.
    pub const START: Self = Self(0x9e37_79b9_7f4a_7c15);

    /// The chain with one more token.
    pub fn then(self, token: u32) -> Self {
        Self(fold(self.0 ^ (u64::from(token) << 1 | 1), 0xd6e8_feb8_6659_fd93))
    }

    /// The chain with more tokens.
    pub fn then_all(self, tokens: &[u32]) -> Self {
        tokens.iter().fold(self, |chain, token| chain.then(*token))
    }

    /// The KV bytes of the last token in one stream (K or V of one layer); `bytes` is a multiple of 8 long.
    fn fill(self, stream: u64, bytes: &mut [u8]) {
        let mut state = fold(self.0 ^ stream, 0xa076_1d64_78bd_642f);
        for word in bytes.chunks_exact_mut(8) {
            state = state.wrapping_add(0xe703_7ed1_a0b4_28db);
            word.copy_from_slice(&fold(state, state ^ 0x8ebc_6af0_9c88_c6e3).to_le_bytes());
        }
    }
}

/// Both halves of the product, folded.
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product >> 64) as u64 ^ product as u64
}

fn stream(layer: u32, part: usize) -> u64 {
    xxh3_64(&[layer.to_le_bytes(), (part as u32).to_le_bytes()].concat())
}

/// Computes on the KV memory.
#[derive(Debug)]
pub struct Model {
    memory: KvMemory,
    chains: Vec<Chain>,
    buffer: Vec<u8>,
}

impl Model {
    /// A model on this memory.
    pub fn new(memory: KvMemory) -> Self {
        Self { memory, chains: Vec::new(), buffer: Vec::new() }
    }

    /// The memory it works on.
    pub fn memory(&self) -> &KvMemory {
        &self.memory
    }

    /// Computes the KV of `tokens`, which stand at positions `start ..` after a prefix with chain `chain`, into the
    /// sequence's blocks. Returns the chain behind them.
    pub fn compute(
        &mut self,
        blocks: &[BlockId],
        start: usize,
        tokens: &[u32],
        chain: Chain,
    ) -> io::Result<Chain> {
        self.chains.clear();
        let end = tokens.iter().fold(chain, |chain, token| {
            let chain = chain.then(*token);
            self.chains.push(chain);
            chain
        });
        for layer in 0..self.memory.shape().layers {
            self.compute_layer(layer, blocks, start)?;
        }
        Ok(end)
    }

    fn compute_layer(&mut self, layer: u32, blocks: &[BlockId], start: usize) -> io::Result<()> {
        let shape = *self.memory.shape();
        let (size, piece, width) = (shape.block_size as usize, shape.piece_bytes(), shape.token_bytes());
        let streams = [stream(layer, 0), stream(layer, 1)];
        let end = start + self.chains.len();
        let mut position = start;
        while position < end {
            let (index, slot) = (position / size, position % size);
            self.buffer.clear();
            let chains = &self.chains[position - start..];
            if slot == 0 && end - position >= size {
                let full = &blocks[index..index + (end - position) / size];
                let run = contiguous(full, 2 * piece);
                self.buffer.resize(run * 2 * piece, 0);
                for (block, chains) in self.buffer.chunks_exact_mut(2 * piece).zip(chains.chunks(size)) {
                    for (part, bytes) in block.chunks_exact_mut(piece).enumerate() {
                        fill_all(chains, streams[part], bytes, width);
                    }
                }
                self.memory.write_blocks(layer, blocks[index], &self.buffer)?;
                position += run * size;
            } else {
                let count = (size - slot).min(end - position);
                self.buffer.resize(count * width, 0);
                for (part, stream) in streams.into_iter().enumerate() {
                    fill_all(&chains[..count], stream, &mut self.buffer, width);
                    self.memory.write_slots(layer, blocks[index], part, slot, &self.buffer)?;
                }
                position += count;
            }
        }
        Ok(())
    }

    /// Reads all KV of a sequence of `len` tokens and hashes it.
    pub fn digest(&mut self, blocks: &[BlockId], len: usize) -> io::Result<u64> {
        let shape = *self.memory.shape();
        let (size, piece, width) = (shape.block_size as usize, shape.piece_bytes(), shape.token_bytes());
        let mut digests = Vec::with_capacity(shape.layers as usize * 16);
        for layer in 0..shape.layers {
            let mut hashers = [Xxh3::new(), Xxh3::new()];
            let mut rest = &blocks[..len.div_ceil(size)];
            let mut tokens = len;
            while !rest.is_empty() {
                let run = contiguous(rest, 2 * piece);
                self.buffer.resize(run * 2 * piece, 0);
                self.memory.read_blocks(layer, rest[0], &mut self.buffer)?;
                for block in self.buffer.chunks_exact(2 * piece) {
                    let filled = tokens.min(size);
                    for (hasher, bytes) in hashers.iter_mut().zip(block.chunks_exact(piece)) {
                        hasher.update(&bytes[..filled * width]);
                    }
                    tokens -= filled;
                }
                rest = &rest[run..];
            }
            for hasher in hashers {
                digests.extend_from_slice(&hasher.digest().to_le_bytes());
            }
        }
        Ok(xxh3_64(&digests))
    }
}

fn fill_all(chains: &[Chain], stream: u64, bytes: &mut [u8], width: usize) {
    for (chain, bytes) in chains.iter().zip(bytes.chunks_exact_mut(width)) {
        chain.fill(stream, bytes);
    }
}

/// How many of the first blocks lie side by side in memory, as far as one system call goes.
fn contiguous(blocks: &[BlockId], block_bytes: usize) -> usize {
    let most = (RUN_BYTES / block_bytes).max(1);
    let side_by_side = blocks.windows(2).take_while(|pair| pair[0] + 1 == pair[1]).count() + 1;
    side_by_side.min(most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv_memory::KvShape;

    fn model(block_size: u32) -> Model {
        let shape = KvShape { layers: 3, heads: 2, head_bytes: 8, block_size, num_blocks: 64 };
        Model::new(KvMemory::new(shape).unwrap())
    }

    fn tokens(count: u32) -> Vec<u32> {
        (0..count).map(|i| i * 7919 % 4096).collect()
    }

    #[test]
    fn chunks_blocks_and_block_size_do_not_matter() {
        let tokens = tokens(50);
        let mut whole = model(8);
        let blocks: Vec<BlockId> = (1..8).collect();
        let end = whole.compute(&blocks, 0, &tokens, Chain::START).unwrap();
        let digest = whole.digest(&blocks, 50).unwrap();

        let mut chunked = model(16);
        let scattered = [9, 3, 4, 40];
        let mut chain = Chain::START;
        for (start, len) in [(0, 1), (1, 20), (21, 11), (32, 16), (48, 2)] {
            chain = chunked.compute(&scattered, start, &tokens[start..start + len], chain).unwrap();
        }
        assert_eq!(chain, end);
        assert_eq!(chain, Chain::START.then_all(&tokens));
        assert_eq!(chunked.digest(&scattered, 50).unwrap(), digest);
        assert_ne!(chunked.digest(&scattered, 49).unwrap(), digest);
    }

    #[test]
    fn any_changed_byte_of_the_sequence_changes_the_digest_and_no_other_does() {
        let mut model = model(8);
        let blocks = [5, 6, 2];
        model.compute(&blocks, 0, &tokens(20), Chain::START).unwrap();
        let digest = model.digest(&blocks, 20).unwrap();
        let piece = model.memory().shape().piece_bytes();
        let mut block = vec![0; 2 * piece];
        for layer in 0..3 {
            for id in 0..8 {
                for at in 0..2 * piece {
                    model.memory.read_blocks(layer, id, &mut block).unwrap();
                    block[at] ^= 0x10;
                    model.memory.write_blocks(layer, id, &block).unwrap();
                    let slot = at % piece / 16;
                    let part_of = [5, 6].contains(&id) || (id == 2 && slot < 4);
                    assert_eq!(model.digest(&blocks, 20).unwrap() != digest, part_of, "{layer} {id} {at}");
                    block[at] ^= 0x10;
                    model.memory.write_blocks(layer, id, &block).unwrap();
                }
            }
        }
        assert_eq!(model.digest(&blocks, 20).unwrap(), digest);
    }

    #[test]
    fn the_layout_describes_the_bytes() {
        let mut model = model(8);
        let blocks = [5, 6, 2];
        model.compute(&blocks, 0, &tokens(24), Chain::START).unwrap();
        let mut by_piece = Vec::new();
        for piece in &model.memory().shape().layout().pieces {
            let mut bytes = vec![0; piece.len as usize];
            let (fd, _) = model.memory().storages().nth(piece.storage as usize).unwrap();
            rustix::io::pread(fd, &mut bytes[..], piece.offset + 6 * piece.stride).unwrap();
            by_piece.push(bytes);
        }
        let chains: Vec<Chain> = (9..=16).map(|n| Chain::START.then_all(&tokens(24)[..n])).collect();
        for (i, bytes) in by_piece.iter().enumerate() {
            let mut expected = vec![0; bytes.len()];
            fill_all(&chains, stream(i as u32 / 2, i % 2), &mut expected, 16);
            assert_eq!(*bytes, expected);
        }
    }
}
