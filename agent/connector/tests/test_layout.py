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
    pieces, facts = describe([v])
    assert len(pieces) == count
    assert facts["inner"] == f"1x {inner}"
    for block in (0, 1, NB - 1):
        assert list(gathered(pieces, block)) == list(addresses(v, {dim: block}))


def test_kernel_blocks_are_put_together():
    v = view((NB * 2, 3, 16, 8))
    pieces, facts = describe([v])
    assert facts["inner"] == "1x s:2,0:3,1:16,2:8"
    expected = [a for sub in (0, 1) for a in addresses(v, {0: 4 * 2 + sub})]
    assert list(gathered(pieces, 4)) == expected


def test_k_and_v_together_or_apart_travel_alike():
    apart, apart_facts = describe([view((2, NB, 3, 32, 8))])
    together, together_facts = describe([view((NB, 2, 3, 32, 8))])
    assert apart_facts == together_facts
    assert (len(apart), len(together)) == (2, 1)


def test_heads_and_tokens_are_told_apart_even_where_they_are_as_many():
    by_head, by_token = view((NB, 32, 32, 16)), view((NB, 32, 32, 16), (0, 2, 1, 3))
    assert describe([by_head])[1] != describe([by_token])[1]


def test_layers_inside_each_block_become_one_piece():
    page, layers = 3 * 32 * 16 * 2, 4
    views = [
        View(f"model.layers.{i}.attn", 0, i * page, (NB, 3, 32, 16), (layers * page, 1024, 32, 2), 2)
        for i in range(layers)
    ]
    pieces, _ = describe(views)
    assert [(p.offset, p.stride, p.len) for p in pieces] == [(0, layers * page, layers * page)]


def test_layers_travel_in_their_own_order():
    page = 3 * 32 * 16 * 2
    names = [f"model.layers.{i}.attn" for i in (10, 2, 1)]
    views = [view((NB, 3, 32, 16), layer=name, offset=i * NB * page) for i, name in enumerate(names)]
    pieces, facts = describe(views)
    assert [p.offset for p in pieces] == [2 * NB * page, NB * page, 0]
    assert facts == describe(views[::-1])[1]
    assert facts["layers"].startswith("3 ")
    assert facts["layers"] != describe([view((NB, 3, 32, 16), layer="x")])[1]["layers"]


def test_a_cache_that_layers_share_travels_once():
    v = view((NB, 3, 32, 16))
    pieces, facts = describe([v, View("model.layers.1.attn", v.storage, v.offset, v.shape, v.strides, v.itemsize)])
    assert len(pieces) == 1
    assert facts["block_bytes"] == str(3 * 32 * 16 * 2)


def test_padding_between_blocks_stays_behind():
    v = View("l", 0, 0, (NB, 3, 32, 16), (4096, 1024, 32, 2), 2)
    pieces, _ = describe([v], page_bytes=[4096])
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
