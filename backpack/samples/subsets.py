"""Subsets of the samples of a batch, as users write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backpack.memory import sent_to


class Subset:
    """A choice of samples, as users write it, checked as far as that is possible without a batch.

    Args:
        entries: ``None`` (all samples), integers in a sequence, tensor or array, a boolean mask, a slice
            or a range. Negative numbers count from the end; duplicates are allowed.
        among: How many samples there are to choose from, if a pass has one more for all entries of no sample.

    Raises:
        TypeError: An entry is no integer.
        ValueError: No sample is selected, or the entries are not one-dimensional.
    """

    def __init__(self, entries: Any = None, among: int | None = None) -> None:
        self.given, self._among = entries, among
        self._entries = entries if entries is None or isinstance(entries, slice) else _tensor(entries)
        self._ready: dict[tuple[int, torch.device], Tensor | None] = {}

    def __repr__(self) -> str:
        return repr(self.given)

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
        n, has_none = self._among or n, self._among not in (None, n)
        if self._entries is None:
            return torch.arange(n, device=device) if has_none else None
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
        return sent_to(device, index)


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
