"""Kronecker factors from a curvature that is averaged over the batch after each module."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backpack.extensions.kronecker import FACTORS, KroneckerExtension


class KFRA(KroneckerExtension[list[Tensor]]):
    """Kronecker factors from the recursion of averaged curvatures, ``kfra``: a list of tensors.

    For what they are and for ``approx``, see ``KroneckerExtension``. Instead of each sample's columns, the mean over
    the batch of the curvature in a module's output is pulled back to its input, ``H' = 1/N sum_n J_n^T H J_n``, from
    the sum over samples of the loss's Hessians on (Botev, Ritter & Barber, 2017, section 4). Within a module that holds
    others, nothing is averaged.

    The model must be a ``torch.nn.Sequential`` of any modules, or a chain of modules that were extended one by one.
    Unless it is a ``Sequential`` of linear layers with elementwise functions between them, it is run once more, module
    by module. A matrix with as many rows as a sample has entries is
    formed for each module's output: seconds for ten thousand. Where all samples have the same Jacobian, as in linear
    maps, and through elementwise functions and max pooling, it is pulled back as it is; through other modules, a root
    of it is, for each sample. Over a data set, each batch has its own averages, and their factors are averaged.

    Raises:
        RuntimeError: The model is no such chain, losses have different inputs, or running the model once more gives
            another output.
        ValueError: An output is too large.
    """

    savefield = "kfra"
    batches = FACTORS
    backprop = "average"

    def __init__(self, subsampling: Any = None, approx: str | None = None, savefield: str | None = None) -> None:
        super().__init__(savefield, subsampling, approx=approx)
