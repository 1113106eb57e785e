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
    shared = memory.share(tensors)
    storages, views = shared.storages, shared.views
    assert shared.gpu is None and shared.ready is None
    assert [storage.len for storage in storages] == [base.nbytes, 7 * 3 * 32 * 8 * 4]
    assert [view.storage for view in views] == [0, 0, 0, 0, 1]

    pieces = layout.describe(views[:4], [s.len for s in storages], 7, 32).pieces
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


def test_tensors_of_one_allocation_are_placed_in_it():
    # An allocator cuts large pieces of memory: two storages may lie in one, at any distance from its beginning.
    one, other = torch.zeros(2, 6, 8, dtype=torch.bfloat16), torch.zeros(5, 4, dtype=torch.int8)
    tensors = {"layers.0": one[0], "layers.1": one[1], "layers.2": other}
    start = one.data_ptr() - 512
    lens, views = memory.place(tensors, {"layers.0": start, "layers.1": start, "layers.2": other.data_ptr()})
    assert lens == {start: 512 + 2 * 6 * 8 * 2, other.data_ptr(): 20}
    assert [(view.storage, view.offset) for view in views] == [(0, 512), (0, 512 + 96), (1, 0)]
    assert views[1].strides == (16, 2)


def test_without_a_driver_a_gpus_memory_is_refused(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(memory.ctypes, "CDLL", missing)
    with pytest.raises(memory.MemoryRefused, match="libcuda.so.1"):
        memory.Driver()


def test_a_gpus_memory_is_shared_and_described():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    tensors = {f"layers.{i}": torch.zeros(2, 7, 16, 4, 64, dtype=torch.bfloat16, device="cuda") for i in range(3)}
    shared = memory.share(tensors)
    assert len(shared.gpu.uuid) == 16 and len(shared.gpu.ready) == 64
    assert all(len(storage.handle) == 64 for storage in shared.storages)
    pieces = layout.describe(shared.views, [storage.len for storage in shared.storages], 7, 16).pieces
    assert len(pieces) == 6 and all(piece.len == 16 * 4 * 64 * 2 for piece in pieces)
