"""Several processes of one job, each with a part of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(eq=False)
class Processes:
    """Those of a process group; one alone where there is none."""

    group: Any = None

    def __post_init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(self.group) if several else 0
        self.count = dist.get_world_size(self.group) if several else 1
        on_gpu = several and "nccl" in dist.get_backend(self.group)
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else None

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"Process {self.rank} of {self.count} could not exchange results with the others: one of them has "
                f"probably ended; its own message says why."
            ) from error

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count == 1:
            return tensor
        given = tensor.to(self._device or tensor.device, copy=True).contiguous()
        with self._together():
            dist.all_reduce(given, group=self.group)
        return given.to(tensor.device)

    def all_objects(self, value: T) -> list[T]:
        """What each process gives, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with self._together():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def same(self, make: Callable[[], T]) -> T:
        """What the first process makes."""
        if self.count == 1:
            return make()
        return next(value for value in self.all_objects(make() if self.rank == 0 else None) if value is not None)

    def all_rows(self, rows: Tensor) -> Tensor:
        """Those of all processes, one after the other."""
        if self.count == 1:
            return rows
        counts = self.all_objects(len(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:], device=self._device or rows.device)
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        with self._together():
            dist.all_gather(found, padded, group=self.group)
        return torch.cat([own[:n].to(rows.device) for own, n in zip(found, counts, strict=True)])
