import msgspec
import pytest
from baton_connector import protocol
from baton_connector.protocol import FrameReader, Hello, ProtocolError, PullDone, Refused, Released, Welcome


def test_messages_are_maps_with_a_type():
    hello = Hello(instance="i", side={"worker": 1}, tp_size=2, model="m", block_size=16, num_blocks=9, chunk_tokens=512)
    body = protocol.frame(hello)
    assert int.from_bytes(body[:4], "little") == len(body) - 4
    assert msgspec.msgpack.decode(body[4:]) == {
        "type": "hello",
        "version": 3,
        "instance": "i",
        "side": {"worker": 1},
        "tp_size": 2,
        "model": "m",
        "block_size": 16,
        "num_blocks": 9,
        "chunk_tokens": 512,
    }


def test_computed_blocks_are_named_by_their_place_and_ids():
    plain = msgspec.msgpack.decode(protocol.frame(protocol.Computed("r", 2, [7, 5]))[4:])
    assert plain == {"type": "computed", "request_id": "r", "first_block": 2, "block_ids": [7, 5]}


def test_handles_travel_as_bytes():
    storage = protocol.CudaStorage(handle=b"\x07" * 64, len=9)
    plain = msgspec.msgpack.decode(protocol.frame(storage)[4:])
    assert plain == {"type": "cuda_storage", "handle": b"\x07" * 64, "len": 9}


def test_token_ids_travel_as_bytes():
    content = protocol.Content(tokens=protocol.token_bytes([1, 2**31]), keys=protocol.ContentKeys(salt="s"))
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(content))
    assert plain == {
        "tokens": b"\x01\0\0\0\0\0\0\x80",
        "keys": {"lora": None, "salt": "s", "multimodal": []},
    }


def test_frames_come_whole_however_they_are_cut():
    messages = [Welcome(1, 5), Released(["a", "b"]), PullDone("r", [3], "late"), Refused("no")]
    data = b"".join(protocol.frame(message) for message in messages)
    for size in (1, 3, 7, len(data)):
        reader = FrameReader()
        got = [m for at in range(0, len(data), size) for m in reader.feed(data[at : at + size])]
        assert got == messages


def test_fields_of_later_versions_are_passed_over():
    body = msgspec.msgpack.encode({"type": "welcome", "version": 1, "epoch": 2, "mood": "good"})
    assert list(FrameReader().feed(len(body).to_bytes(4, "little") + body)) == [Welcome(1, 2)]


@pytest.mark.parametrize(
    "data",
    [
        (protocol.MAX_MESSAGE + 1).to_bytes(4, "little"),
        b"\x01\0\0\0\xc1",
        b"\x01\0\0\0\x80",
        b"\x09\0\0\0" + b"\x82\xa4type\xa3we",
    ],
    ids=["too long", "no msgpack", "no type", "cut"],
)
def test_what_is_no_message_is_an_error(data):
    with pytest.raises(ProtocolError):
        list(FrameReader().feed(data))


def test_the_good_messages_before_a_bad_one_are_kept():
    reader, got = FrameReader(), []
    with pytest.raises(ProtocolError):
        for message in reader.feed(protocol.frame(Welcome(1, 2)) + b"\xff\xff\xff\xff"):
            got.append(message)
    assert got == [Welcome(1, 2)]


def test_a_message_over_the_limit_is_not_sent():
    with pytest.raises(ProtocolError):
        protocol.frame(Refused("x" * (protocol.MAX_MESSAGE + 1)))
