"""Sums over samples and seeds of tensors that need not be in memory all at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from backpack.uses.base import accumulate, sum_of


class SampleSum:
    """The sum of many tensors over their samples, the first axis, and their seeds, the last axis but one.

    Each core first adds up the samples that it has probably computed itself: it takes several times as long to fetch
    others from its neighbour's cache as to add them.
    """

    LARGE = 2**13
    """Entries from which on samples are added one by one, which needs no memory for intermediate sums."""

    def __init__(self) -> None:
        self._terms: dict[int, list[Tensor]] = {}

    def add(self, tensor: Tensor, squared: bool = False) -> None:
        """Add ``tensor[n, ..., v, o]``, or its squares."""
        cores = torch.get_num_threads()
        cores = 1 if len(tensor) % cores else cores
        terms, tensor = self._terms.setdefault(cores, []), tensor.unflatten(0, (cores, -1))
        count = tensor.shape[1] * tensor.shape[-2]
        if torch.is_grad_enabled() or tensor.numel() <= count * self.LARGE:
            accumulate(terms, (tensor.square() if squared else tensor).sum((1, -2)))
            return
        parts = [part for row in tensor.unbind(1) for part in row.unbind(-2)]
        if not terms:
            terms.append(torch.zeros_like(parts[0], memory_format=torch.contiguous_format))
        for part in parts:
            if squared:
                terms[0].addcmul_(part, part)
            else:
                terms[0].add_(part)

    def result(self) -> Tensor:
        """The sum, ``[..., o]``."""
        return sum_of(total.sum(0) for (total,) in self._terms.values())
