"""Kronecker factors from sampled labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backpack.extensions.kronecker import FACTORS, KroneckerExtension


class KFAC(KroneckerExtension[list[Tensor]]):
    """Kronecker factors from labels drawn from the model's predictive distribution, ``kfac``: a list of tensors.

    For what they are and for ``approx``, see ``KroneckerExtension``. With ``fisher="exact"`` those of ``KFLR``, with
    ``"empirical"`` those of the empirical Fisher matrix. (Martens & Grosse, 2015, section 3; convolutions: Grosse &
    Martens, 2016; other sharing of weights: Eschenhagen et al., 2023.)
    """

    savefield = "kfac"
    batches = FACTORS

    def __init__(
        self,
        mc_samples: int = 1,
        subsampling: Any = None,
        fisher: str = "mc",
        approx: str | None = None,
        chunk_size: int | None = None,
        savefield: str | None = None,
    ) -> None:
        super().__init__(savefield, subsampling, chunk_size, mc_samples, approx, fisher)
