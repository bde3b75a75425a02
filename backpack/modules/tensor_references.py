"""References to tensors of the forward pass that notice whether a tensor was freed or overwritten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import Tensor


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written to; of inference tensors, that is not counted."""
    return 0 if tensor.is_inference() else tensor._version


@dataclass(eq=False, slots=True)
class Noted:
    """A tensor of the forward pass, perhaps by a weak reference, and how often it had been written to."""

    held: Any
    version: int

    def value(self) -> Tensor | None:
        """The tensor, if it still exists and was not overwritten."""
        tensor = self.held
        if isinstance(tensor, ref):
            tensor = tensor()
            if tensor is not None:
                tensor._fix_weakref()  # the reference was perhaps to one that had been dropped
        return None if tensor is None or version_of(tensor) != self.version else tensor

    def hold(self) -> None:
        """Keep the tensor from now on, if it still exists."""
        self.held = self.value()
