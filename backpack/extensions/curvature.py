"""The base classes of second-order extensions."""

from __future__ import annotations

from typing import Any

from backpack.extensions import interface
from backpack.extensions.backprop_extension import BackpropExtension, Result
from backpack.extensions.strategies import BackpropStrategy as BackpropStrategy
from backpack.extensions.strategies import Curvature as Curvature
from backpack.extensions.strategies import ExpectationApproximation as ExpectationApproximation
from backpack.extensions.strategies import LossHessianStrategy as LossHessianStrategy


class CurvatureExtension(interface.Curvature, BackpropExtension[Result]):
    """A quantity read from pulled-back columns of a root of the loss Hessian.

    Args:
        subsampling: As for every extension.
        chunk_size: How many columns are pulled back at a time; ``None``: as many as bounded memory allows.
        mc_samples: How many columns are drawn (where they are).

    Raises:
        ValueError: ``chunk_size`` or ``mc_samples`` is not positive.
    """

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


class ExactExtension(CurvatureExtension[Result]):
    """A quantity of exact columns, without options of its own."""

    def __init__(self, subsampling: Any = None, chunk_size: int | None = None, savefield: str | None = None) -> None:
        super().__init__(savefield, subsampling, chunk_size)


class SampledExtension(CurvatureExtension[Result]):
    """A quantity of ``mc_samples`` random columns; it goes in front of the exact quantity in a list of bases."""

    seeds = "sampled"

    def __init__(
        self, mc_samples: int = 1, subsampling: Any = None, chunk_size: int | None = None, savefield: str | None = None
    ) -> None:
        CurvatureExtension.__init__(self, savefield, subsampling, chunk_size, mc_samples)
