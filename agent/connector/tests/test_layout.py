"""Layouts against a reference: gathering a block's bytes by its pieces gives what the tensor's elements say."""

import itertools

import pytest
from baton_connector import layout
from baton_connector.layout import LayoutError, View

NB = 7


def view(shape, order=None, layer="model.layers.0.attn", storage=0, offset=0, itemsize=2):
    """A tensor of this logical shape whose dimensions lie in memory in the given order."""
    order = order or range(len(shape))
    strides, step = [0] * len(shape), itemsize
    for dim in reversed(list(order)):
        strides[dim] = step
        step *= shape[dim]
    return View(layer, storage, offset, tuple(shape), tuple(strides), itemsize)


def addresses(v, index):
    """Addresses of a block's elements, in memory order of the dimensions inside it; `index` fixes the others."""
    free = [dim for dim in range(len(v.shape)) if dim not in index]
    free.sort(key=lambda dim: -v.strides[dim])
    base = v.offset + sum(v.strides[dim] * at for dim, at in index.items())
    for at in itertools.product(*(range(v.shape[dim]) for dim in free)):
        start = base + sum(v.strides[dim] * i for dim, i in zip(free, at))
        yield from range(start, start + v.itemsize)


def gathered(pieces, block):
    for piece in pieces:
        start = piece.offset + block * piece.stride
        yield from range(start, start + piece.len)


def describe(views, **more):
    end = max(v.offset + sum(s * (n - 1) for n, s in zip(v.shape, v.strides)) + v.itemsize for v in views)
    return layout.describe(views, [end], NB, 32, **more)


@pytest.mark.parametrize(
    ("shape", "order", "dim", "count", "inner"),
    [
        ((NB, 3, 32, 16), None, 0, 1, "0:3,1:32,2:16"),  # blocks of heads, tokens, K and V together
        ((NB, 3, 32, 16), (0, 2, 1, 3), 0, 1, "1:32,0:3,2:16"),  # the same, tokens outside heads
        ((NB, 3, 32, 16), (1, 0, 2, 3), 0, 3, "0:3,1:32,2:16"),  # heads outside blocks
        ((2, NB, 3, 32, 8), None, 1, 2, "0:2,1:3,2:32,3:8"),  # K and V apart
        ((NB, 2, 32, 3, 8), None, 0, 1, "0:2,1:32,2:3,3:8"),  # K and V side by side in each block
        ((NB, 32, 576), None, 0, 1, "0:32,1:576"),  # MLA
        ((NB, 1, 32, 16), None, 0, 1, "1:32,2:16"),  # one head says nothing about order
    ],
)
def test_pieces_gather_a_block_in_memory_order(shape, order, dim, count, inner):
    v = view(shape, order)
    described = describe([v])
    pieces = described.pieces
    assert len(pieces) == count
    assert described.order["inner"] == f"1x {inner}"
    for block in (0, 1, NB - 1):
        assert list(gathered(pieces, block)) == list(addresses(v, {dim: block}))


def test_kernel_blocks_are_put_together():
    v = view((NB * 2, 3, 16, 8))
    described = describe([v])
    assert described.order["inner"] == "1x s:2,0:3,1:16,2:8"
    expected = [a for sub in (0, 1) for a in addresses(v, {0: 4 * 2 + sub})]
    assert list(gathered(described.pieces, 4)) == expected


def test_k_and_v_together_or_apart_travel_alike():
    apart = describe([view((2, NB, 3, 32, 8))])
    together = describe([view((NB, 2, 3, 32, 8))])
    assert (apart.facts, apart.order) == (together.facts, together.order)
    assert (len(apart.pieces), len(together.pieces)) == (2, 1)


def test_heads_and_tokens_are_told_apart_even_where_they_are_as_many():
    by_head, by_token = view((NB, 32, 32, 16)), view((NB, 32, 32, 16), (0, 2, 1, 3))
    assert describe([by_head]).order != describe([by_token]).order


def test_layers_inside_each_block_become_one_piece():
    page, layers = 3 * 32 * 16 * 2, 4
    views = [
        View(f"model.layers.{i}.attn", 0, i * page, (NB, 3, 32, 16), (layers * page, 1024, 32, 2), 2)
        for i in range(layers)
    ]
    pieces = describe(views).pieces
    assert [(p.offset, p.stride, p.len) for p in pieces] == [(0, layers * page, layers * page)]


def test_layers_travel_in_their_own_order():
    page = 3 * 32 * 16 * 2
    names = [f"model.layers.{i}.attn" for i in (10, 2, 1)]
    views = [view((NB, 3, 32, 16), layer=name, offset=i * NB * page) for i, name in enumerate(names)]
    pieces, facts = describe(views).pieces, describe(views).facts
    assert [p.offset for p in pieces] == [2 * NB * page, NB * page, 0]
    assert facts == describe(views[::-1]).facts
    assert facts["layers"].startswith("3 ")
    assert facts["layers"] != describe([view((NB, 3, 32, 16), layer="x")]).facts["layers"]


def test_a_cache_that_layers_share_travels_once():
    v = view((NB, 3, 32, 16))
    described = describe([v, View("model.layers.1.attn", v.storage, v.offset, v.shape, v.strides, v.itemsize)])
    assert len(described.pieces) == 1
    assert described.order["block_bytes"] == str(3 * 32 * 16 * 2)


def test_padding_between_blocks_stays_behind():
    v = View("l", 0, 0, (NB, 3, 32, 16), (4096, 1024, 32, 2), 2)
    pieces = describe([v], page_bytes=[4096]).pieces
    assert [(p.stride, p.len) for p in pieces] == [(4096, 3072)]


@pytest.mark.parametrize(
    ("v", "says"),
    [
        (view((NB + 1, 3, 32, 16)), "no dimension counts"),
        (view((3, NB, 32, 16)), "no dimension counts"),
        (View("l", 0, 0, (NB, 3, 32, 16), (3072, 0, 32, 2), 2), "overlap"),
    ],
)
def test_what_cannot_be_described_is_refused(v, says):
    with pytest.raises(LayoutError, match=says):
        describe([v])


def test_blocks_of_a_size_the_engine_does_not_know_are_refused():
    with pytest.raises(LayoutError, match="by the engine's configuration"):
        describe([view((NB, 3, 32, 16))], page_bytes=[3071])


def test_two_blocks_behind_two_halves_are_ambiguous():
    with pytest.raises(LayoutError, match="either of its first two"):
        layout.describe([view((2, 2, 3, 32, 8))], [1 << 20], 2, 32)


def test_pieces_stay_inside_their_storage():
    with pytest.raises(LayoutError, match="beyond storage"):
        layout.describe([view((NB, 3, 32, 16))], [NB * 3072 - 1], NB, 32)


def common(v, block, head, roles):
    """Addresses of one head's bytes in the common order, by what each dimension of the tensor is."""
    sizes, strides = dict(zip(roles, v.shape)), dict(zip(roles, v.strides))
    split = sizes["b"] // NB
    for sub, token, half in itertools.product(range(split), range(sizes["n"]), range(sizes.get("kv", 1))):
        at = v.offset + (block * split + sub) * strides["b"] + token * strides["n"] + half * strides.get("kv", 0)
        at += head * strides.get("h", 0)
        yield from range(at, at + sizes["c"] * v.itemsize)


@pytest.mark.parametrize(
    ("roles", "shape", "order"),
    [
        ("b h n c", (NB, 3, 32, 16), None),  # HND
        ("b h n c", (NB, 3, 32, 16), (0, 2, 1, 3)),  # NHD
        ("b h n c", (NB, 3, 32, 16), (1, 0, 2, 3)),  # heads outside blocks
        ("b h n c", (NB * 2, 3, 16, 16), None),  # a kernel of smaller blocks
        ("b h n c", (NB * 2, 3, 16, 16), (0, 2, 1, 3)),
        ("b h n c", (NB, 32, 32, 16), (0, 2, 1, 3)),  # as many heads as tokens
        ("b h n c", (NB, 1, 32, 16), None),
        ("kv b n h c", (2, NB, 32, 3, 8), None),  # K and V apart
        ("kv b n h c", (2, NB, 32, 3, 8), (0, 1, 3, 2, 4)),
        ("b kv n h c", (NB, 2, 32, 3, 8), None),
        ("b n c", (NB, 32, 576), None),  # MLA
    ],
)
def test_heads_lie_where_the_tensor_has_them(roles, shape, order):
    roles = roles.split()
    views = [
        view(shape, order, layer="layers.1", storage=1),
        view(shape, order, layer="layers.0", itemsize=1),
    ]
    count = dict(zip(roles, shape)).get("h", 1)
    described = layout.describe(views, [1 << 30] * 2, NB, 32, None, (count * 2, count))
    heads = described.heads
    assert (heads.total, heads.count) == (count * 2, count)
    for block in (0, NB - 1):
        # Which byte of which storage each byte of the block is, its pieces end to end.
        bytes_of = [
            (piece.storage, at)
            for piece in described.pieces
            for at in range(piece.offset + block * piece.stride, piece.offset + block * piece.stride + piece.len)
        ]
        for head in range(count):
            rows = [
                span.start + head * span.head_stride + sum(i * stride for i, (_, stride) in zip(at, span.dims)) + byte
                for span in heads.spans
                for at in itertools.product(*(range(size) for size, _ in span.dims))
                for byte in range(span.len)
            ]
            expected = [(v.storage, at) for v in views[::-1] for at in common(v, block, head, roles)]
            assert [bytes_of[at] for at in rows] == expected


def test_heads_say_the_same_whatever_the_order_and_the_ranks():
    by_head, by_token = view((NB, 4, 32, 16)), view((NB, 4, 32, 16), (0, 2, 1, 3))
    facts = describe([by_head], kv_heads=(8, 4)).facts
    assert facts["head_bytes"] == "1x 1024"
    assert facts == describe([by_token], kv_heads=(8, 4)).facts
    assert facts == describe([view((NB, 8, 32, 16))], kv_heads=(8, 8)).facts
    assert facts == describe([view((2, NB, 32, 4, 8))], kv_heads=(8, 4)).facts
    assert facts != describe([view((NB, 4, 32, 32))], kv_heads=(8, 4)).facts


def test_heads_that_cannot_be_told_apart_are_left_out():
    for v, kv_heads in [
        (view((NB, 3, 32, 16)), None),
        (view((NB, 3, 32, 16)), (4, 4)),  # the engine has other heads than the tensor
        (view((NB, 32, 48)), (3, 3)),  # heads inside the content
        (view((NB, 3, 32, 16)), (1 << 21, 3)),  # more than an agent takes
    ]:
        assert describe([v], kv_heads=kv_heads).heads is None
