"""Square roots of the Hessian of a loss with respect to its input, by samples.

Entries of the input that belong to one sample are counted by ``d``. The Hessian is block-diagonal over samples, so
that one seed holds a column of every sample's root.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from backpack.samples import Layout


class LossRoot(ABC):
    """For each sample ``n`` a matrix ``S_n`` with ``S_n S_n^T`` the Hessian of the loss, reduction included."""

    columns: int
    """Number of columns of the exact root."""

    @abstractmethod
    def exact(self, start: int, stop: int) -> Tensor:
        """Columns of the root, ``[v, n, d]``."""

    @abstractmethod
    def sampled(self) -> Tensor:
        """A random column, ``[n, d]``, whose outer product has the Hessian as its expectation."""

    def documented(self, start: int, stop: int) -> Tensor:
        """As ``exact``, of a root with one column per output, for results that keep the axis of the columns."""
        return self.exact(start, stop)

    @property
    def documented_columns(self) -> int:
        """Number of columns that ``documented`` has."""
        return self.columns


Rule = Callable[[Module, Tensor, Layout, tuple[Any, ...], dict[str, Any], Tensor], LossRoot]

ROOTS: dict[type[Module], Rule] = {}
"""Loss module to the rule that makes its root from the module, its input, where the samples lie in it, the further
arguments, and the weights of its entries (where it is not reduced)."""


def root_of(*losses: type[Module]) -> Callable[[Rule], Rule]:
    """Register the rule that follows for these losses."""

    def register(rule: Rule) -> Rule:
        ROOTS.update(dict.fromkeys(losses, rule))
        return rule

    return register


class Diagonal(LossRoot):
    """The root of a loss whose entries do not interact: ``hessian`` is the diagonal ``[n, d]``."""

    def __init__(self, hessian: Tensor, draw: Callable[[], Tensor] | None = None) -> None:
        smallest = hessian.min().item() if hessian.numel() else 0.0
        if smallest < 0:
            raise ValueError(
                f"The Hessian of the loss with respect to its input has the eigenvalue {smallest:.3g} at this point: "
                f"it is not positive semidefinite, so that it has no root and the model no Gauss-Newton matrix."
            )
        self.scale = hessian.sqrt()
        self.columns = hessian.shape[1]
        self._draw = draw

    def exact(self, start: int, stop: int) -> Tensor:
        stop = min(stop, self.columns)
        seeds = self.scale.new_zeros(stop - start, *self.scale.shape)
        place = torch.arange(stop - start, device=seeds.device)
        seeds[place, :, place + start] = self.scale[:, start:stop].T
        return seeds

    def sampled(self) -> Tensor:
        if self._draw is not None:
            return self._draw()
        signs = torch.randint(0, 2, self.scale.shape, device=self.scale.device).to(self.scale.dtype)
        return (2 * signs - 1) * self.scale
