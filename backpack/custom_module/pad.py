"""Padding as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module


class Pad(Module):
    """``torch.nn.functional.pad`` with these arguments."""

    def __init__(self, pad: Sequence[int], mode: str = "constant", value: float = 0.0) -> None:
        super().__init__()
        self.pad = pad
        self.mode = mode
        self.value = value

    def forward(self, input: Tensor) -> Tensor:
        """Pad a tensor."""
        return F.pad(input, tuple(self.pad), self.mode, self.value)
