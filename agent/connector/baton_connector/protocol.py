"""Messages between an engine's connector and its agent. The contract is `proto/src/connector.rs`.

A frame is a 32-bit little-endian length and that many bytes of msgpack: a map whose `type` names the variant.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from .plan import Source

VERSION = 3
MAX_MESSAGE = 16 << 20

_LENGTH = struct.Struct("<I")


class ProtocolError(Exception):
    """The peer sent what is no message of this protocol; the connection is of no more use."""


class _Message(msgspec.Struct, tag_field="type", frozen=True):
    pass


class Hello(_Message, tag="hello"):
    instance: str
    side: Literal["scheduler"] | dict[Literal["worker"], int]
    tp_size: int
    model: str
    block_size: int
    num_blocks: int
    # Most prompt tokens that one step computes; 0 where a prompt is computed at once.
    chunk_tokens: int
    version: int = VERSION


class Storage(_Message, tag="storage"):
    """Its file descriptor travels with it."""

    len: int


class Gpu(_Message, tag="gpu"):
    """The storages that follow lie on this GPU."""

    uuid: bytes
    # CUDA IPC handle of an event recorded behind every forward pass.
    ready: bytes


class CudaStorage(_Message, tag="cuda_storage"):
    """An allocation on the GPU, by its CUDA IPC handle."""

    handle: bytes
    len: int


class Piece(msgspec.Struct, frozen=True):
    """One contiguous run of every block: `len` bytes at `offset + block * stride` of a storage."""

    storage: int
    offset: int
    stride: int
    len: int


class HeadSpan(msgspec.Struct, frozen=True):
    """A rank's heads in one layer. Head `h` has a row of `len` bytes at `start + h * head_stride` of a block, its pieces end
    to end, and at each place that is further by a multiple below `size` of each of the strides; the last runs fastest."""

    start: int
    head_stride: int
    # (size, stride)
    dims: list[tuple[int, int]]
    len: int


class Heads(msgspec.Struct, frozen=True):
    """Where heads lie, for engines of another tensor parallelism or order of dimensions."""

    # KV heads of the model; 1 for latent vectors, which every rank has.
    total: int
    # On this rank.
    count: int
    spans: list[HeadSpan]


class Layout(_Message, tag="layout"):
    # Equal on both sides of any transfer.
    facts: dict[str, str]
    # Equal too where blocks travel as they lie.
    order: dict[str, str]
    pieces: list[Piece]
    heads: Heads | None = None


class MultimodalItem(msgspec.Struct, frozen=True):
    identifier: str
    offset: int
    length: int


class ContentKeys(msgspec.Struct, frozen=True):
    lora: str | None = None
    salt: str | None = None
    multimodal: list[MultimodalItem] = []


class Content(msgspec.Struct, frozen=True):
    """What a prompt's KV was computed from."""

    tokens: bytes
    keys: ContentKeys


class Hold(_Message, tag="hold"):
    """Begins a hold. `content` is all of the prompt; `block_ids` those of its first blocks that every rank has computed
    already, and the others follow as each worker's `Computed`."""

    request_id: str
    transfer_id: str
    lease_ms: int
    content: Content
    block_ids: list[int]


class Computed(_Message, tag="computed"):
    """Blocks of a held prompt that this rank has computed, all layers of them."""

    request_id: str
    # The place of the first of them in the prompt.
    first_block: int
    block_ids: list[int]


class Pull(_Message, tag="pull"):
    request_id: str
    transfer_id: str
    source: Source
    deadline_ms: int
    content: Content
    first_block: int
    block_ids: list[int]


class Cancel(_Message, tag="cancel"):
    request_id: str


class Welcome(_Message, tag="welcome"):
    version: int
    epoch: int


class Refused(_Message, tag="refused"):
    reason: str


class Released(_Message, tag="released"):
    request_ids: list[str]


class PullDone(_Message, tag="pull_done"):
    request_id: str
    failed_blocks: list[int]
    error: str


ToAgent = Hello | Storage | Layout | Hold | Computed | Pull | Cancel
ToConnector = Welcome | Refused | Released | PullDone

_encoder = msgspec.msgpack.Encoder()


def frame(message: _Message) -> bytes:
    """The message as it goes over the socket."""
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE:
        raise ProtocolError(f"a message of {len(body)} bytes is over the limit of {MAX_MESSAGE}")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Takes bytes as they come and gives whole messages. Holds at most one message's bytes and one read's."""

    def __init__(self, type: Any = ToConnector) -> None:
        self._decoder = msgspec.msgpack.Decoder(type)
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[Any]:
        """The messages that `data` completes. Exhaust it before the next call."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, start)
                if length > MAX_MESSAGE:
                    raise ProtocolError(f"the agent sent a message of {length} bytes, over the limit")
                end = start + _LENGTH.size + length
                if len(self._buffer) < end:
                    break
                body = bytes(self._buffer[start + _LENGTH.size : end])
                start = end
                try:
                    yield self._decoder.decode(body)
                except (msgspec.DecodeError, msgspec.ValidationError) as error:
                    raise ProtocolError(f"the agent sent a message that cannot be read: {error}") from None
        finally:
            del self._buffer[:start]


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids, 32-bit little-endian."""
    ids = array("I", tokens)
    if ids.itemsize != 4:
        raise ProtocolError("this platform has no 32-bit unsigned array")
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()
