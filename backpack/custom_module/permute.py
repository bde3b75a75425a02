"""Permutation of axes as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Module


class Permute(Module):
    """``input.permute(dims)``; with ``init_transpose``, ``input.transpose(*dims)``.

    Raises:
        ValueError: The axis of the samples, axis 0, would move.
    """

    def __init__(self, *dims: Any, init_transpose: bool = False) -> None:
        super().__init__()
        self.dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
        self.init_transpose = init_transpose
        if init_transpose and len(self.dims) != 2:
            raise ValueError(f"Permute: a transposition takes two axes, got {self.dims}.")
        moved = 0 in self.dims if init_transpose else self.dims[:1] not in ((0,), (-len(self.dims),))
        if moved:
            raise ValueError(f"Permute: axis 0 counts the samples and must stay where it is, got {self.dims}.")

    def forward(self, input: Tensor) -> Tensor:
        """Permute the axes of a tensor.

        Raises:
            ValueError: The axis of the samples would move.
        """
        if not self.init_transpose:
            return input.permute(self.dims)
        if -input.dim() in self.dims:
            raise ValueError(f"Permute: axis 0 counts the samples and must stay where it is, got {self.dims}.")
        return input.transpose(*self.dims)
