"""A constant factor as a module."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module


class ScaleModule(Module):
    """``weight * input``, with a constant ``weight``.

    Raises:
        ValueError: ``weight`` is no float.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if not isinstance(weight, float):
            raise ValueError(f"ScaleModule: weight must be a float, got {weight!r}.")
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        """Scale a tensor."""
        return input * self.weight
