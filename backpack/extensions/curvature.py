"""What the second-order extensions have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.strategies import BackpropStrategy, Curvature, ExpectationApproximation, LossHessianStrategy
from backpack.uses import Individual
from backpack.uses.base import accumulate

__all__ = [
    "BackpropStrategy",
    "Concatenated",
    "Curvature",
    "CurvatureExtension",
    "ExpectationApproximation",
    "LossHessianStrategy",
]


class CurvatureExtension(BackpropExtension):
    """A quantity read from pulled-back columns of a root of the loss Hessian.

    Args:
        subsampling: As for every extension.
        chunk_size: How many columns are pulled back at a time; ``None``: as many as bounded memory allows.
        mc_samples: How many columns are drawn (where they are).

    Raises:
        ValueError: ``chunk_size`` or ``mc_samples`` is not positive.
    """

    seeds = "exact"
    additive = True
    whole = False
    """Whether all columns are needed at a time."""
    backprop = "sqrt"
    """How they are pulled back: by themselves, or their mean over the batch, module by module (``"average"``)."""
    semidefinite = True
    """Whether the loss must have a positive semidefinite Hessian."""

    def __init__(
        self,
        savefield: str | None = None,
        subsampling: Any = None,
        chunk_size: int | None = None,
        mc_samples: int = 1,
    ) -> None:
        super().__init__(savefield, subsampling=subsampling)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be positive, got {chunk_size}.")
        if mc_samples < 1:
            raise ValueError(f"mc_samples must be positive, got {mc_samples}.")
        self.chunk_size = chunk_size
        self.mc_samples = mc_samples

    def merge(self, results: list[Any]) -> Any:
        """The result of all columns, from those of some each; the first one may be overwritten."""
        terms = results[:1]
        for result in results[1:]:
            accumulate(terms, result)
        return terms[0]

    def complete(self, result: Any, grads: Individual) -> Any:
        """Add to the result of all columns what does not depend on them; ``grads``: of the last ones."""
        return result


class Concatenated(CurvatureExtension):
    """A quantity that keeps the columns apart, along its first axis."""

    additive = False

    def merge(self, results: list[Tensor]) -> Tensor:
        return torch.cat(results)
