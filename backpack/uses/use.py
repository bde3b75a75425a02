"""Uses of a parameter in a forward pass, and the cotangents that arrive at them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backpack.samples import Rows
from backpack.uses.base import Individual
from backpack.uses.composed import RealPart


class Cotangents(dict[int, Tensor]):
    """The cotangents of a call's outputs, by place; they live until all uses in the call have been computed."""

    def __init__(self, grads: dict[int, Tensor]) -> None:
        super().__init__(grads)
        self.shared: dict[torch.dtype, dict[Any, Tensor]] = {}
        """By data type: results that other uses in the call can read as well."""


class Use(ABC):
    """One place at which a parameter, or a tensor computed from parameters alone, enters a forward pass."""

    @abstractmethod
    def arrive(self, cotangents: Cotangents, rows: Rows, shape: torch.Size, dtype: torch.dtype) -> Individual:
        """The individual gradients of the samples ``rows``, from the cotangents ``[v, ...]`` of the call's outputs."""

    def forward(self) -> Callable[[Tensor, torch.Size], Tensor] | None:
        """Where the output is linear in the parameter: the map from a change of it to that of the output ``[*shape]``.

        It takes one vector at a time, but may run inside of ``torch.vmap``. ``None``: not known.
        """
        return None


class SamplewiseUse(Use):
    """A use of which each sample's individual gradient follows from its own rows of the cotangent of one output."""

    def arrive(self, cotangents: Cotangents, rows: Rows, shape: torch.Size, dtype: torch.dtype) -> Individual:
        grad = rows.take(cotangents[0], leading=1)
        needed = dtype.to_complex() if grad.is_complex() else dtype
        found = self.bind(grad.to(needed).resolve_conj(), rows, shape)
        filled = rows.filled
        found.filled = filled if filled is None else filled.to(grad.device, dtype.to_real())
        if grad.is_complex():
            return found if dtype.is_complex else RealPart(found)
        if rows.index is None:
            found.shared = cotangents.shared.setdefault(dtype, {})
        return found

    @abstractmethod
    def bind(self, grad: Tensor, rows: Rows, shape: torch.Size) -> Individual:
        """The individual gradients of the samples ``rows`` that a cotangent of the output defines.

        Args:
            grad: Cotangent of these samples, ``[v, n, ...]``.
            rows: Brings a recorded tensor to the form ``[n, ...]`` of the same samples.
            shape: Of the parameter.
        """
