"""Memory for large results, how much is computed at a time, and copies to other devices.

On a CPU, a fresh result of a hundred megabytes costs more in page faults than in arithmetic: 23 ms against 3 ms for
an outer product into 75 MB. So large results lie in huge pages, which Linux gives on request. When a result is deleted,
its memory is kept for the next one, as PyTorch does it on a GPU.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from math import prod

import torch
from torch import Tensor

LARGE = 2**23
"""Smallest result, in bytes, that gets memory of its own."""

KEPT = 2**30
"""Most bytes of unused memory that are kept for the next results."""

FREED = 2**25 - 2**13
"""Largest block, in bytes without its header, whose release makes glibc keep blocks of this size."""

AT_A_TIME = {"scratch": 2**20, "cotangents": 2**22, "columns": 2**23}
"""How many entries are computed at a time on a CPU, of which caches hold some.

``scratch``: of what a reduction over individual gradients fills; ``cotangents``: of all samples that are sent through a
node; ``columns``: of the widest layer's output, over all columns that are pulled back together.
"""

SHARE = 64
"""Which part of a GPU's memory the entries that are computed at a time may take, in float64."""

_unused: list[mmap.mmap] = []


def at_a_time(what: str, device: torch.device) -> int:
    """How many entries are computed at a time on a device; on a GPU as many as fit, for fewer and larger kernels.

    ``what``: a key of ``AT_A_TIME``.
    """
    return AT_A_TIME[what] if device.type != "cuda" else max(AT_A_TIME[what], _of_gpu(device))


@cache
def _of_gpu(device: torch.device) -> int:
    """How many entries in float64 a share of a GPU's memory holds."""
    return int(torch.cuda.get_device_properties(device).total_memory) // (8 * SHARE)


@cache
def keep_what_is_freed() -> None:
    """Let the C library reuse the memory that PyTorch frees, up to 64 MiB.

    glibc gives fresh pages to each block that is larger than all blocks freed before. It also returns the end of its
    heap to the system when twice that size is free. So each step has to fetch its pages again, which takes a fifth of
    its time. Both thresholds grow when a program frees a block of 32 MiB: this function does so, without writing to it.
    """
    torch.empty(FREED, dtype=torch.uint8, device="cpu")


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialized tensor of this shape, with the data type and device of ``like``."""
    entries = prod(shape)
    size = entries * like.element_size()
    if size < LARGE or like.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    memory = _take(size)
    view = memoryview(memory)
    weakref.finalize(view, _give_back, memory).atexit = False
    return torch.frombuffer(view, dtype=like.dtype, count=entries).reshape(list(shape))


def _take(size: int) -> mmap.mmap:
    fitting = [memory for memory in _unused if size <= len(memory) <= 2 * size]
    if fitting:
        memory = min(fitting, key=len)
        _unused.remove(memory)
        return memory
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _give_back(memory: mmap.mmap) -> None:
    _unused.append(memory)
    while sum(map(len, _unused)) > KEPT:
        _unused.pop(0)


def release() -> None:
    """Return the memory that is kept for further results to the system."""
    _unused.clear()


def sent_to(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what is queued there: only pinned memory allows that."""
    source = tensor.pin_memory() if device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)


def contiguous(view: Tensor) -> Tensor:
    """A copy of a strided view; differentiable where gradients are tracked."""
    return view.contiguous() if torch.is_grad_enabled() else empty(view.shape, view).copy_(view)


def product(operation: Callable[..., Tensor], left: Tensor, right: Tensor, shape: Sequence[int]) -> Tensor:
    """Compute ``operation(left, right)``, whose result has this shape; gradients can flow through it if they are on."""
    if torch.is_grad_enabled():
        return operation(left, right)
    return operation(left, right, out=empty(shape, left))
