"""How blocks lie in a worker's KV memory, read from the tensors' shapes and strides.

A layer's tensor has one dimension that counts blocks and others that make up a block, in any memory order.
The dimensions inside a block are walked in memory order, largest stride first; what is contiguous at the
inner end makes one piece, and pieces that touch are joined, over layers too. So the same bytes travel in the
same order whether an engine keeps K and V together or apart, layer by layer or block by block, and blocks travel
between two engines as they lie when their facts are equal, those about the order (`inner`, `shape`) included.

Where the dimension that counts heads is known, the agents can also exchange heads one by one, between engines of
another number of ranks or another order of dimensions: see `heads_of`.

Nothing here needs torch: a [`View`] is plain numbers.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .protocol import Heads, HeadSpan, Layout, Piece

# 2^16 pieces of a block make a layout of 2 MiB and a copy that is all overhead.
MAX_PIECES = 1 << 16
MAX_PIECE_LEN = (1 << 32) - 1
# Rows of all heads of a block that an agent takes; with more, blocks travel as they lie or not at all.
MAX_ROWS = 1 << 20


class LayoutError(Exception):
    """KV memory that cannot be described; the text says what it is and what would do."""


@dataclass(frozen=True)
class View:
    """One layer's KV tensor. Offset and strides are in bytes."""

    layer: str
    storage: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int


@dataclass(frozen=True)
class Block:
    """What a layer's tensor holds of one block: where block 0 begins, how far the next is, and the dimensions
    inside, as (size, stride, name), in memory order. Their names are their places in `sizes`, the tensor's dimensions but
    for the one that counts blocks; `s` is the one of the kernel's blocks."""

    view: View
    stride: int
    dims: tuple[tuple[int, int, str], ...]
    sizes: tuple[int, ...]
    split: int
    shape: str
    inner: str

    @property
    def len(self) -> int:
        """Bytes of one block in this layer."""
        total = self.view.itemsize
        for size, _, _ in self.dims:
            total *= size
        return total


def block_of(view: View, num_blocks: int, block_size: int) -> Block:
    """Finds the dimension that counts blocks and sorts the others."""
    where = f"layer {view.layer}: KV tensor of shape {list(view.shape)}"
    # An attention kernel may use smaller blocks than the engine: then the dimension counts those, and
    # `split` of them, one after the other, make one of the engine's.
    split = 0
    block_dim = -1
    # vLLM puts blocks first, or second behind the two halves K and V.
    behind_halves = len(view.shape) > 2 and view.shape[0] == 2
    for dim in [1, 0] if behind_halves else [0]:
        count, rest = divmod(view.shape[dim], num_blocks)
        if rest == 0 and count > 0 and block_size % count == 0:
            if block_dim >= 0:
                raise LayoutError(f"{where}: with {num_blocks} blocks, either of its first two dimensions may count them")
            block_dim, split = dim, count
    if block_dim < 0:
        raise LayoutError(f"{where}: no dimension counts the engine's {num_blocks} blocks")

    step = view.strides[block_dim]
    others = [i for i in range(len(view.shape)) if i != block_dim]
    dims = [(view.shape[i], view.strides[i], str(place)) for place, i in enumerate(others)]
    if split > 1:
        dims.append((split, step, "s"))
    shape = ",".join(str(size) for size, _, _ in dims)
    dims = [(size, stride, name) for size, stride, name in dims if size > 1]
    if any(stride <= 0 for _, stride, _ in dims) or step <= 0:
        raise LayoutError(f"{where}, strides {list(view.strides)}: elements overlap")
    dims.sort(key=lambda dim: -dim[1])
    return Block(
        view=view,
        stride=step * split,
        dims=tuple(dims),
        sizes=tuple(view.shape[i] for i in others),
        split=split,
        shape=shape,
        inner=",".join(f"{name}:{size}" for size, _, name in dims),
    )


def pieces_of(block: Block) -> list[Piece]:
    """The contiguous runs of one layer's share of a block, in the order in which they travel."""
    run = block.view.itemsize
    outer = list(block.dims)
    while outer and outer[-1][1] == run:
        run *= outer.pop()[0]
    steps = [[i * stride for i in range(size)] for size, stride, _ in outer]
    count = 1
    for step in steps:
        count *= len(step)
    if count > MAX_PIECES:
        raise LayoutError(
            f"layer {block.view.layer}: a block lies in {count} runs of {run} bytes, more than {MAX_PIECES}"
        )
    return [
        Piece(block.view.storage, block.view.offset + sum(at), block.stride, run) for at in itertools.product(*steps)
    ]


def heads_of(block: Block, start: int, block_size: int, kv_heads: int) -> HeadSpan | None:
    """Where heads lie in one layer, in a block whose part of this layer begins at `start`, once its bytes are put end to
    end in memory order. `None` where the dimensions are none of vLLM's."""
    tokens = block_size // block.split
    # By vLLM's shapes, without the blocks: heads, tokens and their content; K and V apart, in earlier versions; latent
    # vectors without heads.
    match block.sizes:
        case (n, _) if n == tokens and kv_heads == 1:
            head, token, half, content = "", "0", "", "1"
        case (h, n, _) if (h, n) == (kv_heads, tokens):
            head, token, half, content = "0", "1", "", "2"
        case (2, n, h, _) if (h, n) == (kv_heads, tokens):
            head, token, half, content = "2", "1", "0", "3"
        case _:
            return None
    # Where each dimension's steps lie once the bytes are put end to end.
    strides: dict[str, tuple[int, int]] = {}
    step = block.view.itemsize
    for size, _, name in reversed(block.dims):
        strides[name] = (size, step)
        step *= size
    dims = [strides[name] for name in ("s", token, half) if name in strides]
    size, stride = strides.get(content, (1, block.view.itemsize))
    if stride == block.view.itemsize:
        run = size * stride
    else:
        dims.append((size, stride))
        run = block.view.itemsize
    return HeadSpan(start, strides.get(head, (1, 0))[1], dims, run)


def join(pieces: Iterable[Piece]) -> list[Piece]:
    """Joins pieces that touch, as long as they stay neighbours in every block."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last.storage, last.stride) == (piece.storage, piece.stride)
            and last.offset + last.len == piece.offset
            and last.len + piece.len <= min(piece.stride, MAX_PIECE_LEN)
        ):
            joined[-1] = Piece(last.storage, last.offset, last.stride, last.len + piece.len)
        else:
            joined.append(piece)
    return joined


def in_layer_order(name: str) -> list[tuple[bool, int, str]]:
    """Sorts `layers.2` before `layers.10`."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def describe(
    views: Sequence[View],
    storage_lens: Sequence[int],
    num_blocks: int,
    block_size: int,
    page_bytes: Sequence[int] | None = None,
    kv_heads: tuple[int, int] | None = None,
) -> Layout:
    """The pieces of a block, the facts about its inside, and where heads lie.

    `page_bytes`, in the order of `views`, is what the engine says a layer's share of a block takes; more than
    the tensor holds is padding and stays behind. `kv_heads` are those of the model and those on this rank, where heads may
    travel one by one.
    """
    if num_blocks < 1 or block_size < 1 or not views:
        raise LayoutError(f"the engine has {len(views)} layers of {num_blocks} blocks of {block_size} tokens")
    seen: set[tuple[object, ...]] = set()
    blocks: list[Block] = []
    order = sorted(range(len(views)), key=lambda i: in_layer_order(views[i].layer))
    for i in order:
        view = views[i]
        # Layers that share one cache (cross-layer sharing) travel once.
        place = (view.storage, view.offset, view.shape, view.strides)
        if place in seen:
            continue
        seen.add(place)
        block = block_of(view, num_blocks, block_size)
        if page_bytes is not None and block.len > page_bytes[i]:
            raise LayoutError(
                f"layer {view.layer}: a block takes {block.len} bytes by its tensor, "
                f"but {page_bytes[i]} by the engine's configuration"
            )
        blocks.append(block)

    pieces = join(piece for block in blocks for piece in pieces_of(block))
    if len(pieces) > MAX_PIECES:
        raise LayoutError(f"a block lies in {len(pieces)} runs, more than {MAX_PIECES}")
    for piece in pieces:
        if piece.len > MAX_PIECE_LEN:
            raise LayoutError(f"a block has a run of {piece.len} bytes, more than {MAX_PIECE_LEN}")
        if piece.offset + (num_blocks - 1) * piece.stride + piece.len > storage_lens[piece.storage]:
            raise LayoutError(f"blocks reach beyond storage {piece.storage} of {storage_lens[piece.storage]} bytes")

    names = "\n".join(block.view.layer for block in blocks)
    facts = {
        "layers": f"{len(blocks)} {hashlib.blake2b(names.encode(), digest_size=8).hexdigest()}",
        "block_size": str(block_size),
        "itemsize": _by_layer(str(block.view.itemsize) for block in blocks),
    }
    order = {
        "block_bytes": str(sum(piece.len for piece in pieces)),
        "shape": _by_layer(block.shape for block in blocks),
        "inner": _by_layer(block.inner for block in blocks),
    }
    heads = None
    if kv_heads is not None:
        total, count = kv_heads
        starts = itertools.accumulate((block.len for block in blocks), initial=0)
        spans = [heads_of(block, start, block_size, count) for block, start in zip(blocks, starts)]
        known = [span for span in spans if span is not None]
        rows = sum(math.prod(size for size, _ in span.dims) for span in known)
        if len(known) == len(blocks) and rows * count <= MAX_ROWS and total <= MAX_ROWS:
            heads = Heads(total, count, known)
            facts["head_bytes"] = _by_layer(str(block.len // count) for block in blocks)
    return Layout(facts=facts, order=order, pieces=pieces, heads=heads)


def _by_layer(values: Iterable[str]) -> str:
    """`30x 2,32,3,64`: equal neighbours counted."""
    return "; ".join(f"{len(list(same))}x {value}" for value, same in itertools.groupby(values))
