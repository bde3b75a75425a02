"""Parallel branches, and their sum."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor
from torch.nn import Module, Sequential


class SumModule(Module):
    """The sum of all inputs."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Add tensors.

        Raises:
            TypeError: An input is no tensor.
        """
        if not inputs or not all(isinstance(x, Tensor) for x in inputs):
            raise TypeError(f"SumModule takes tensors, got {[type(x).__name__ for x in inputs]}.")
        return sum(inputs[1:], start=inputs[0])


class Branch(Sequential):
    """Modules that all receive the same input."""

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """The output of each."""
        return tuple(module(input) for module in self)


class Parallel(Sequential):
    """Modules side by side on the same input, whose outputs ``merge_module`` brings together (default: their sum).

    Takes modules, or an ordered dictionary of them.
    """

    branch: Module
    merge: Module

    def __init__(self, *args: Module | OrderedDict[str, Module], merge_module: Module | None = None) -> None:
        super().__init__()
        self.branch = Branch(*args)  # type: ignore[arg-type]
        self.merge = SumModule() if merge_module is None else merge_module

    def forward(self, input: Tensor) -> Tensor:
        """Merge the outputs of all branches."""
        return self.merge(*self.branch(input))
