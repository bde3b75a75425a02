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
from torch.nn import Module, NLLLoss

from backpack.modules.loss_calls import WITH_ROOTS
from backpack.samples import AnyLayout


class LossRoot(ABC):
    """For each sample ``n`` a matrix ``S_n`` with ``S_n S_n^T`` the Hessian of the loss, reduction included.

    Where the Hessian is not positive semidefinite, ``S_n diag(signs_n) S_n^T`` is the Hessian.
    """

    columns: int
    """Number of columns of the exact root."""
    signs: Tensor | None = None
    """Signs of the columns, ``[v, n]``; ``None``: all are positive."""
    smallest: float = 0.0
    """The smallest eigenvalue, where it is negative by more than rounding."""
    notice: str | None = None
    """The warning to give if columns of the root are used."""

    def require_semidefinite(self) -> None:
        """Raise where there is no root without signs.

        Raises:
            ValueError: The Hessian has a negative eigenvalue.
        """
        if self.smallest < 0:
            raise ValueError(
                f"The Hessian of the loss with respect to its input has the eigenvalue {self.smallest:.3g} at this "
                f"point: it is not positive semidefinite, so that it has no root and the model no Gauss-Newton matrix. "
                f"Take DiagHessian, HMP or GGNMP, which need no root."
            )

    @abstractmethod
    def exact(self, start: int, stop: int) -> Tensor:
        """Columns of the root, ``[v, n, d]``."""

    @abstractmethod
    def sampled(self) -> Tensor:
        """A random column, ``[n, d]``, whose outer product has the Hessian as its expectation."""

    def drawn(self, count: int) -> Tensor:
        """Random columns, ``[v, n, d]``, one after the other as ``sampled`` gives them."""
        columns = [self.sampled() for _ in range(count)]
        return torch.stack(columns) if count > 1 else columns[0][None]

    @abstractmethod
    def weighed(self, grad: Tensor) -> Tensor:
        """The gradient of the loss, ``[n, d]``, divided by the square root of the weight that each term has in it.

        A term is what the loss sums or averages; entries that do not count are zero.
        """

    def _without_signs(self, values: Tensor, tolerance: float = 0.0) -> Tensor:
        """Eigenvalues ``[n, v]`` without their signs, which are noted if some are negative.

        ``tolerance``: negative ones down to this times the largest count as rounding.
        """
        smallest = values.min().item() if values.numel() else 0.0
        if smallest < 0 and smallest < -tolerance * values.abs().max().item():
            self.smallest, self.signs = smallest, values.sign().T
            return values.abs()
        return values

    def documented(self, start: int, stop: int) -> Tensor:
        """The columns of a root with one column per output, for results that keep the axis of the columns."""
        return self.exact(start, stop)

    @property
    def documented_columns(self) -> int:
        """Number of columns that ``documented`` has."""
        return self.columns


def divided(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient divided by the square root of a weight, which is zero only where the gradient is."""
    return torch.where(weight > 0, grad / weight.sqrt(), torch.zeros_like(grad))


def term_weight(loss: Module, input: Tensor, layout: AnyLayout, outer: Tensor, terms: int | None = None) -> Tensor:
    """What the reduction of a loss multiplies each of its ``terms`` by (default: one term for each entry).

    Broadcastable to ``[n, d]``; one if a loss does not say how it is reduced. A loss that is not reduced has a value
    for each entry, position or row of its input, which ``outer`` weighs.
    """
    reduction = getattr(loss, "reduction", "sum")
    if outer.dim():
        weight = outer.unsqueeze(1) if isinstance(loss, NLLLoss) else outer
        weight = weight.reshape(*weight.shape, *[1] * (input.dim() - weight.dim()))
        if all(size in (1, whole) for size, whole in zip(weight.shape, input.shape, strict=True)):
            return by_sample(layout, weight.expand_as(input))
    count = {"mean": terms or input.numel(), "batchmean": len(input)}.get(reduction, 1)
    return input.new_tensor(1 / count)


Rule = Callable[[Module, Tensor, AnyLayout, tuple[Any, ...], dict[str, Any], Tensor], LossRoot]

ROOTS: dict[type[Module], Rule] = {}
"""Loss module to the rule that makes its root from the module, its input, where the samples lie in it, the further
arguments, and the weights of its entries (where it is not reduced)."""


def root_of(*losses: type[Module]) -> Callable[[Rule], Rule]:
    """Register the rule that follows for these losses."""

    def register(rule: Rule) -> Rule:
        ROOTS.update(dict.fromkeys(losses, rule))
        WITH_ROOTS.update(losses)
        return rule

    return register


def by_sample(layout: AnyLayout, tensor: Tensor) -> Tensor:
    """A tensor in the form of the input as ``[n, d]``."""
    return layout.split(tensor).reshape(layout.n, -1)


class Diagonal(LossRoot):
    """The root of a loss whose entries do not interact: ``hessian`` is the diagonal ``[n, d]``.

    ``weight``, broadcastable to it: what the reduction multiplies the entries by.
    """

    def __init__(self, hessian: Tensor, weight: Tensor, draw: Callable[[], Tensor] | None = None) -> None:
        self.scale = self._without_signs(hessian).sqrt()
        self.columns = hessian.shape[1]
        self._weight, self._draw = weight, draw

    def exact(self, start: int, stop: int) -> Tensor:
        stop = min(stop, self.columns)
        seeds = self.scale.new_zeros(stop - start, *self.scale.shape)
        place = torch.arange(stop - start, device=seeds.device)
        seeds[place, :, place + start] = self.scale[:, start:stop].T
        return seeds

    def weighed(self, grad: Tensor) -> Tensor:
        return divided(grad, self._weight)

    def sampled(self) -> Tensor:
        if self._draw is not None:
            return self._draw()
        signs = torch.randint(0, 2, self.scale.shape, device=self.scale.device).to(self.scale.dtype)
        return (2 * signs - 1) * self.scale
