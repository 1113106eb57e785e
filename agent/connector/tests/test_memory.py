"""Storages move to shared memory in place. Needs torch, which comes with vLLM."""

import mmap
import os

import pytest
from baton_connector import layout, memory

torch = pytest.importorskip("torch")


def test_every_tensor_over_a_storage_sees_the_shared_memory():
    base = torch.zeros(4 * 7 * 3 * 32 * 8, dtype=torch.int8)
    old = base.view(7, -1)
    tensors = {
        f"layers.{i}": base.view(4, 7, 3, 32, 8)[i].view(torch.int16) for i in range(4)
    } | {"other": torch.ones(7, 3, 32, 8)}
    tensors["layers.1"][2].fill_(7)
    storages, views = memory.share(tensors)
    assert [storage.len for storage in storages] == [base.nbytes, 7 * 3 * 32 * 8 * 4]
    assert [view.storage for view in views] == [0, 0, 0, 0, 1]

    pieces, _ = layout.describe(views[:4], [s.len for s in storages], 7, 32)
    mapped = mmap.mmap(storages[0].fd, storages[0].len)
    piece = pieces[1]
    at = piece.offset + 2 * piece.stride
    assert mapped[at : at + piece.len] == (7).to_bytes(2, "little") * (piece.len // 2)
    mapped[at : at + 2] = b"\x05\x01"
    assert tensors["layers.1"][2].flatten()[0] == 0x105
    tensors["layers.3"][6].fill_(-1)
    assert old.flatten()[-1] == -1
    assert mapped[-1] == 0xFF
    for storage in storages:
        os.close(storage.fd)


def test_too_little_shared_memory_is_refused_before_anything_is_touched(monkeypatch):
    tensor = torch.zeros(1 << 20, dtype=torch.int8)
    place = tensor.data_ptr()

    class Little:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr(memory.os, "statvfs", lambda path: Little)
    with pytest.raises(memory.MemoryRefused, match="--shm-size"):
        memory.share({"layer": tensor})
    assert tensor.data_ptr() == place


def test_memory_of_devices_is_refused():
    with pytest.raises(memory.MemoryRefused, match="meta is not supported"):
        memory.share({"layer": torch.zeros(4, device="meta")})
