"""One entry of a tuple as a module."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module


class ReduceTuple(Module):
    """``input[index]``, for example the outputs of a recurrent layer without its states."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.index = index

    def forward(self, input: tuple[Tensor, ...]) -> Tensor:
        """Select an entry."""
        return input[self.index]
