"""Tensors that a forward pass leaves notes of, in general by weak references."""

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
        """The tensor, if it is still there as it was."""
        tensor = self.held
        if isinstance(tensor, ref):
            tensor = tensor()
            if tensor is not None:
                tensor._fix_weakref()  # the reference was perhaps to one that had been dropped
        return None if tensor is None or version_of(tensor) != self.version else tensor

    def hold(self) -> None:
        """Refer to it by itself from now on, if it is still there."""
        self.held = self.value()
