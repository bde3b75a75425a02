"""Kronecker factors from the exact loss Hessian."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backpack.extensions.kronecker import FACTORS, KroneckerExtension


class KFLR(KroneckerExtension[list[Tensor]]):
    """Kronecker factors from all columns of a root of the loss Hessian, ``kflr``: a list of tensors.

    For what they are and for ``approx``, see ``KroneckerExtension``. (Botev, Ritter & Barber, 2017, section 4.)
    """

    savefield = "kflr"
    batches = FACTORS

    def __init__(
        self,
        subsampling: Any = None,
        approx: str | None = None,
        chunk_size: int | None = None,
        savefield: str | None = None,
    ) -> None:
        super().__init__(savefield, subsampling, chunk_size, approx=approx)
