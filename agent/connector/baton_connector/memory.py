"""Gives the agent the engine's own KV memory: no copy is made, both processes map the same pages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .layout import View

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


def share(tensors: Mapping[str, torch.Tensor]) -> tuple[list[SharedStorage], list[View]]:
    """Shares the storages behind these tensors and says where each tensor lies in them.

    Storages on the CPU are moved to shared memory in place: every tensor over them, the engine's included,
    sees the new memory. Several tensors over one storage share it once.
    """
    by_device = {tensor.device.type for tensor in tensors.values()}
    if by_device == {"cpu"}:
        return _share_cpu(tensors)
    if by_device == {"cuda"}:
        return _share_cuda(tensors)
    raise MemoryRefused(f"KV memory on {', '.join(sorted(by_device)) or 'no device'} is not supported by this agent yet")


def _share_cuda(tensors: Mapping[str, torch.Tensor]) -> tuple[list[SharedStorage], list[View]]:
    raise MemoryRefused("CUDA memory is not supported by this agent yet")


def _share_cpu(tensors: Mapping[str, torch.Tensor]) -> tuple[list[SharedStorage], list[View]]:
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

    views = []
    for layer, tensor in tensors.items():
        itemsize = tensor.element_size()
        views.append(
            View(
                layer=layer,
                storage=index[tensor.untyped_storage()._cdata],
                offset=tensor.storage_offset() * itemsize,
                shape=tuple(tensor.shape),
                strides=tuple(stride * itemsize for stride in tensor.stride()),
                itemsize=itemsize,
            )
        )
    return shared, views
