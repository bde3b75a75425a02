"""Slicing as a module."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module


class Slicing(Module):
    """``input[slice_info]``, for example ``Slicing((slice(None), slice(0, 2)))``.

    Samples are selected by an extension's ``subsampling``, not here: where axis 0 is cut, individual quantities are
    refused.
    """

    def __init__(self, slice_info: tuple[slice | int, ...]) -> None:
        super().__init__()
        self.slice_info = slice_info

    def forward(self, input: Tensor) -> Tensor:
        """Slice a tensor."""
        return input[self.slice_info]
