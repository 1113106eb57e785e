"""Gives the agent the engine's own KV memory: no copy is made, both processes map the same pages.

On a GPU the agent opens the allocations behind the tensors by CUDA IPC. Its copies and the engine's kernels are kept in
order so: what it reads of a held block waits for an event that the engine records behind every forward pass; what it
wrote is in place, on the GPU, before it says that a pull is done.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .layout import View
from .protocol import CudaStorage, Gpu

if TYPE_CHECKING:
    import torch

SHM = "/dev/shm"


class MemoryRefused(Exception):
    """KV memory that cannot be shared; the text says why, and what would mend it."""


@dataclass(frozen=True)
class SharedStorage:
    """One storage of the engine. The descriptor is ours, and stays open for as long as the engine lives."""

    fd: int
    len: int


@dataclass(frozen=True)
class Shared:
    """What the agent is given."""

    storages: list[SharedStorage] | list[CudaStorage]
    views: list[View]
    gpu: Gpu | None = None
    # To be recorded behind every forward pass.
    ready: torch.cuda.Event | None = None


def share(tensors: Mapping[str, torch.Tensor]) -> Shared:
    """Shares the storages behind these tensors and says where each tensor lies in them.

    Storages on the CPU are moved to shared memory in place: every tensor over them, the engine's included,
    sees the new memory. Several tensors over one storage, or one allocation of a GPU, share it once.
    """
    by_device = {tensor.device.type for tensor in tensors.values()}
    if by_device == {"cpu"}:
        return _share_cpu(tensors)
    if by_device == {"cuda"}:
        return _share_cuda(tensors)
    raise MemoryRefused(f"KV memory on {', '.join(sorted(by_device)) or 'no device'} is not supported by this agent yet")


class Driver:
    """What is needed of the CUDA driver, which the engine has loaded already. Calls are about the calling thread's
    GPU."""

    HANDLE = 64
    UUID = 16

    def __init__(self) -> None:
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise MemoryRefused(f"the CUDA driver's library cannot be loaded: {error}") from None

    def _call(self, name: str, *args: Any) -> int:
        return int(getattr(self._lib, name)(*args))

    def allocation(self, address: int) -> int:
        """Where the allocation begins that an address lies in."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        status = self._call(
            "cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
        )
        if status != 0:
            raise MemoryRefused(f"cuMemGetAddressRange: CUDA error {status}")
        return base.value

    def handle(self, base: int) -> bytes:
        """Names an allocation to other processes on the host."""
        handle = ctypes.create_string_buffer(self.HANDLE)
        status = self._call("cuIpcGetMemHandle", handle, ctypes.c_uint64(base))
        if status != 0:
            raise MemoryRefused(
                f"the KV cache's GPU memory cannot be shared (cuIpcGetMemHandle: CUDA error {status}): it was not taken "
                "by plain cudaMalloc. Take expandable_segments:True out of PYTORCH_CUDA_ALLOC_CONF (or PYTORCH_ALLOC_CONF), "
                "and --enable-sleep-mode off the command line"
            )
        return handle.raw

    def uuid(self) -> bytes:
        """Of the GPU."""
        device, uuid = ctypes.c_int(), ctypes.create_string_buffer(self.UUID)
        status = self._call("cuCtxGetDevice", ctypes.byref(device)) or self._call("cuDeviceGetUuid_v2", uuid, device)
        if status != 0:
            raise MemoryRefused(f"cuDeviceGetUuid: CUDA error {status}")
        return uuid.raw


def _share_cuda(tensors: Mapping[str, torch.Tensor]) -> Shared:
    import torch

    devices = {tensor.device.index for tensor in tensors.values()}
    if len(devices) != 1:
        raise MemoryRefused(f"the KV cache lies on {len(devices)} GPUs; a worker's has to lie on one")
    driver = Driver()
    with torch.cuda.device(devices.pop()):
        bases = {layer: driver.allocation(tensor.data_ptr()) for layer, tensor in tensors.items()}
        lens, views = place(tensors, bases)
        storages = [CudaStorage(handle=driver.handle(base), len=size) for base, size in lens.items()]
        ready = torch.cuda.Event(enable_timing=False, interprocess=True)
        ready.record()
        gpu = Gpu(uuid=driver.uuid(), ready=bytes(ready.ipc_handle()))
    return Shared(storages, views, gpu, ready)


def place(tensors: Mapping[str, torch.Tensor], bases: Mapping[str, int]) -> tuple[dict[int, int], list[View]]:
    """Where each tensor lies in the allocation that begins at its base; and of each allocation, in order, how many
    bytes the tensors in it need."""
    lens: dict[int, int] = {}
    views = []
    for layer, tensor in tensors.items():
        base = bases[layer]
        storage = tensor.untyped_storage()
        lens[base] = max(lens.get(base, 0), storage.data_ptr() + storage.nbytes() - base)
        views.append(_view(layer, tensor, list(lens).index(base), tensor.data_ptr() - base))
    return lens, views


def _view(layer: str, tensor: torch.Tensor, storage: int, offset: int) -> View:
    itemsize = tensor.element_size()
    return View(
        layer=layer,
        storage=storage,
        offset=offset,
        shape=tuple(tensor.shape),
        strides=tuple(stride * itemsize for stride in tensor.stride()),
        itemsize=itemsize,
    )


def _share_cpu(tensors: Mapping[str, torch.Tensor]) -> Shared:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors.values()}
    needed = sum(storage.nbytes() for storage in storages.values() if not storage.is_shared())
    # Past this limit the kernel would kill the engine on first touch instead of failing the allocation.
    shm = os.statvfs(SHM)
    free = shm.f_bavail * shm.f_frsize
    if needed > free:
        raise MemoryRefused(
            f"the KV cache takes {needed >> 20} MiB of shared memory and {SHM} has {free >> 20} MiB free: "
            f"mount it larger (for a container: --shm-size)"
        )

    shared: list[SharedStorage] = []
    index: dict[int, int] = {}
    for key, storage in storages.items():
        fd, size = storage._share_fd_cpu_()
        index[key] = len(shared)
        shared.append(SharedStorage(os.dup(fd), size))

    views = [
        _view(layer, tensor, index[tensor.untyped_storage()._cdata], tensor.storage_offset() * tensor.element_size())
        for layer, tensor in tensors.items()
    ]
    return Shared(shared, views)
