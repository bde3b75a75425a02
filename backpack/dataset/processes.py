"""Exchange between the processes of one job, each of which has a part of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

T = TypeVar("T")


@dataclass(frozen=True)
class Form:
    """The shape, data type and kind of device of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """That of a tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.device.type)

    def zeros(self) -> Tensor:
        """Zeros of this form."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return prod(self.shape) * self.dtype.itemsize


BUCKET = 2**25
"""The most bytes of several tensors that are sent in one message; a larger tensor is sent by itself."""


def bundles(sizes: list[int]) -> Iterator[slice]:
    """Slices of a list of sizes in bytes, each as long as fits into one message."""
    start = filled = 0
    for place, size in enumerate(sizes):
        if filled and filled + size > BUCKET:
            yield slice(start, place)
            start, filled = place, 0
        filled += size
    if sizes:
        yield slice(start, len(sizes))


def alike(tensors: Iterable[Tensor], owners: Iterable[int | None] | None = None) -> list[list[int]]:
    """The places of tensors, grouped by data type and device, and by the process that receives them."""
    found: dict[tuple[torch.dtype, torch.device, int | None], list[int]] = {}
    for place, (tensor, owner) in enumerate(zip(tensors, owners or repeat(None), strict=False)):
        found.setdefault((tensor.dtype, tensor.device, owner), []).append(place)
    return list(found.values())


@dataclass(eq=False)
class Processes:
    """The processes of a group; a single one without ``torch.distributed``."""

    group: Any = None

    def __post_init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(self.group) if several else 0
        self.count = dist.get_world_size(self.group) if several else 1
        on_gpu = several and "nccl" in dist.get_backend(self.group)
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else None

    @contextmanager
    def _failures_explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"Process {self.rank} of {self.count} could not exchange results with the others: one of them has "
                f"probably ended; its own message says why."
            ) from error

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.all_sums([tensor])[0]

    def all_sums(self, tensors: Sequence[Tensor], owners: Sequence[int | None] | None = None) -> list[Tensor]:
        """The sums over all processes, with one message for each data type.

        ``owners``: for each tensor, the only process that receives its sum; ``None``: all do. What others get for it
        has no meaning.
        """
        if self.count == 1:
            return list(tensors)
        found: list[Tensor] = [*tensors]
        for places in alike(tensors, owners):
            flat = self._message([tensors[place] for place in places])
            owner = None if owners is None else owners[places[0]]
            with self._failures_explained():
                if owner is None:
                    dist.all_reduce(flat, group=self.group)
                else:
                    dist.reduce(flat, self._global(owner), group=self.group)
            pieces = flat.split([tensors[place].numel() for place in places])
            for place, piece in zip(places, pieces, strict=True):
                found[place] = piece.view(tensors[place].shape).to(tensors[place].device)
        return found

    def from_owners(self, values: Mapping[str, Any], owners: Mapping[str, int]) -> dict[str, Any]:
        """Tensors in nested containers, by name, each sent to all by the process that owns the name."""
        if self.count == 1:
            return dict(values)
        forms: dict[str, Any] = {}
        for own in self.all_objects({name: tree_map(Form.of, value) for name, value in values.items()}):
            forms |= own
        found = {name: values[name] if name in values else tree_map(Form.zeros, forms[name]) for name in sorted(forms)}
        for owner in range(self.count):
            tensors = [t for name, value in found.items() if owners[name] == owner for t in tree_leaves(value)]
            for bundle in bundles([tensor.nbytes for tensor in tensors]):
                self._send(tensors[bundle], owner)
        return found

    def _send(self, tensors: list[Tensor], owner: int) -> None:
        for places in alike(tensors):
            own = [tensors[place] for place in places]
            flat = self._message(own)
            with self._failures_explained():
                dist.broadcast(flat, self._global(owner), group=self.group)
            for tensor, piece in zip(own, flat.split([tensor.numel() for tensor in own]), strict=True):
                if owner != self.rank:
                    tensor.copy_(piece.view(tensor.shape))

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def all_rows(self, tensors: Sequence[Tensor], counts: list[list[int]]) -> list[Tensor]:
        """For each tensor, the rows of all processes joined, with one message for each data type.

        ``counts``: the number of rows, by process and tensor.
        """
        if self.count == 1:
            return list(tensors)
        found: list[Tensor] = [*tensors]
        for places in alike(tensors):
            sizes = [[own[place] * prod(tensors[place].shape[1:]) for place in places] for own in counts]
            flat = self._message([tensors[place] for place in places])
            padded = flat.new_zeros(max(map(sum, sizes)))
            padded[: len(flat)] = flat
            messages = [torch.empty_like(padded) for _ in counts]
            with self._failures_explained():
                dist.all_gather(messages, padded, group=self.group)
            parts = [message[: sum(own)].split(own) for message, own in zip(messages, sizes, strict=True)]
            for place, pieces in zip(places, zip(*parts, strict=True), strict=True):
                joined = torch.cat(pieces).to(tensors[place].device)
                found[place] = joined.view(-1, *tensors[place].shape[1:])
        return found

    def _message(self, tensors: list[Tensor]) -> Tensor:
        """A copy of all entries in one vector, on a device that can send it."""
        return torch.cat([tensor.reshape(-1).to(self._device or tensor.device) for tensor in tensors])

    def all_objects(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with self._failures_explained():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def same(self, make: Callable[[], T]) -> T:
        """The value that the first process makes."""
        if self.count == 1:
            return make()
        return next(value for value in self.all_objects(make() if self.rank == 0 else None) if value is not None)
