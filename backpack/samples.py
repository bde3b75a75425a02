"""Which entries of a tensor belong to which sample: layouts of the sample axis, and subsets of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the ``n`` samples of a tensor lie.

    ``factor == 1``: along ``axis``. Otherwise axis 0 holds ``factor * n`` entries, those of one sample
    side by side (``strided=False``) or ``n`` apart (``strided=True``).
    """

    n: int
    axis: int = 0
    factor: int = 1
    strided: bool = False

    def split(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """Move the sample axis to the front, behind ``leading`` further axes: ``[*leading, n, ...]``."""
        if self.factor == 1:
            return tensor.movedim(leading + self.axis, leading) if self.axis else tensor
        if self.strided:
            return tensor.unflatten(leading, (self.factor, self.n)).movedim(leading + 1, leading)
        return tensor.unflatten(leading, (self.n, self.factor))

    def join(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """Undo ``split``."""
        if self.factor == 1:
            return tensor.movedim(leading, leading + self.axis) if self.axis else tensor
        return (tensor.transpose(leading, leading + 1) if self.strided else tensor).flatten(leading, leading + 1)

    def owners(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """The sample each entry belongs to, broadcastable to ``shape``."""
        index = torch.arange(self.n, device=device)
        if self.factor > 1:
            index = index.repeat(self.factor) if self.strided else index.repeat_interleave(self.factor)
        return index.reshape([-1 if a == self.axis else 1 for a in range(len(shape))])


@lru_cache(2**12)
def layouts(shape: tuple[int, ...], n: int, axes: tuple[int, ...] | range) -> Sequence[Layout]:
    """All layouts of ``n`` samples that a tensor of this shape admits; ``axes`` may hold samples."""
    if n == 1 and shape and shape[0] != 1:
        return (Layout(1, 0, shape[0]),)
    found = [Layout(n, axis) for axis in axes if shape[axis] == n]
    if 0 in axes and n > 1 and shape[0] % n == 0 and shape[0] > n:
        found += [Layout(n, 0, shape[0] // n), Layout(n, 0, shape[0] // n, strided=True)]
    return tuple(found[:1] if n == 1 else found)


def layout_like(layout: Layout, tensor: Tensor) -> Layout:
    """The layout of an argument, given that of the output: the same where the shape admits it."""
    possible = layouts(tensor.shape, layout.n, range(tensor.dim()))
    similar = [other for other in possible if other.strided == layout.strided]
    return layout if layout in possible else (similar or possible)[0]


@dataclass
class Rows:
    """Some samples (``index``; ``None``: all) of tensors with this layout."""

    layout: Layout
    index: Tensor | None = None

    @property
    def count(self) -> int:
        return self.layout.n if self.index is None else len(self.index)

    def take(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """``[*leading, rows, ...]``."""
        layout = self.layout
        if layout.axis or layout.factor > 1:
            tensor = layout.split(tensor, leading)
        return tensor if self.index is None else tensor.index_select(leading, self.index)


class Subset:
    """A choice of samples, as users write it, checked as far as that is possible without a batch.

    Args:
        entries: ``None`` (all samples), integers in a sequence, tensor or array, a boolean mask, a slice
            or a range. Negative numbers count from the end; duplicates are allowed.

    Raises:
        TypeError: An entry is no integer.
        ValueError: No sample is selected, or the entries are not one-dimensional.
    """

    def __init__(self, entries: Any = None) -> None:
        self.given = entries
        self._entries = entries if entries is None or isinstance(entries, slice) else _tensor(entries)
        self._ready: dict[tuple[int, torch.device], Tensor | None] = {}

    @property
    def key(self) -> Any:
        """Equal for subsets that select the same samples in the same order."""
        if self._entries is None:
            return None
        return (
            str(self._entries) if isinstance(self._entries, slice) else (self._entries.dtype, *self._entries.tolist())
        )

    def rows(self, n: int, device: torch.device) -> Tensor | None:
        """The selected samples of a batch of ``n`` as an index tensor; ``None`` for all of them.

        Raises:
            IndexError: An entry is out of range, or a mask has another length than the batch.
            ValueError: No sample is selected.
        """
        key = (n, device)
        if key not in self._ready:
            self._ready = {key: self._resolve(n, device)}
        return self._ready[key]

    def _resolve(self, n: int, device: torch.device) -> Tensor | None:
        if self._entries is None:
            return None
        if isinstance(self._entries, slice):
            index = torch.tensor(range(n)[self._entries], dtype=torch.int64)
        elif self._entries.dtype == torch.bool:
            if len(self._entries) != n:
                raise IndexError(
                    f"The sub-sampling mask has {len(self._entries)} entries, but the batch has {n} samples."
                )
            index = self._entries.nonzero().flatten()
        else:
            index = self._entries
            wrong = index[(index < -n) | (index >= n)]
            if len(wrong):
                raise IndexError(
                    f"Sub-sampling index {wrong[0].item()} is out of range for a batch of {n} samples: "
                    f"valid are {-n} to {n - 1}."
                )
            index = index.where(index >= 0, index + n)
        if len(index) == 0:
            raise ValueError(f"subsampling={self.given!r} selects none of the {n} samples of the batch.")
        return index.to(device)


def _tensor(entries: Any) -> Tensor:
    if isinstance(entries, (str, bytes)) or not (hasattr(entries, "__len__") or hasattr(entries, "__iter__")):
        raise TypeError(f"subsampling must hold sample numbers, a mask, a slice or a range; got {entries!r}.")
    if not isinstance(entries, Tensor) and not hasattr(entries, "__array__"):
        entries = list(entries)
        for entry in entries:
            if not isinstance(entry, bool) and not hasattr(entry, "__index__"):
                raise TypeError(f"subsampling must hold integers or booleans; got {entry!r}.")
        if len({isinstance(entry, bool) for entry in entries}) > 1:
            raise TypeError(f"subsampling mixes integers and booleans: {entries!r}.")
        entries = [entry if isinstance(entry, bool) else int(entry) for entry in entries]
    tensor = torch.as_tensor(entries).detach().cpu()
    if tensor.dim() != 1:
        raise ValueError(f"subsampling must be one-dimensional; its shape is {list(tensor.shape)}.")
    if tensor.numel() == 0:
        raise ValueError("subsampling is empty: select one sample at least, or pass None for all.")
    if tensor.dtype == torch.bool:
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"subsampling must hold integers or booleans; its entries are {tensor.dtype}.")
    return tensor.to(torch.int64)
