"""Products with a matrix: of rows, of columns, of batches of matrices; bilinear maps."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from backpack.graph import kind
from backpack.nodes.registry import Place, form
from backpack.samples import Layout
from backpack.samples.layout_rules import is_bilinear
from backpack.uses import DenseUse, ElementwiseUse, StackedUse, Use


def rows_of(x: Tensor) -> Tensor:
    """``[n, ..., i]`` to ``[n, 1, s, i]``."""
    return x.reshape(x.shape[0], 1, -1, x.shape[-1])


def grad_rows_of(grad: Tensor) -> Tensor:
    """``[v, n, ..., o]`` to ``[v, n, 1, s, o]``."""
    return grad.reshape(*grad.shape[:2], 1, -1, grad.shape[-1])


def columns_of(x: Tensor) -> Tensor:
    """``[n, i, ...]`` to ``[n, 1, s, i]``."""
    return x.reshape(x.shape[0], 1, x.shape[1], -1).transpose(2, 3)


def grad_columns_of(grad: Tensor) -> Tensor:
    """``[v, n, o, ...]`` to ``[v, n, 1, s, o]``."""
    return grad.reshape(*grad.shape[:2], 1, grad.shape[2], -1).transpose(3, 4)


def groups_of_rows(x: Tensor) -> Tensor:
    """``[n, g, ..., i]`` to ``[n, g, s, i]``."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def grad_groups_of_rows(grad: Tensor) -> Tensor:
    """``[v, n, g, ..., o]`` to ``[v, n, g, s, o]``."""
    return grad.reshape(*grad.shape[:3], -1, grad.shape[-1])


def groups_of_columns(x: Tensor) -> Tensor:
    """``[n, g, i, ...]`` to ``[n, g, s, i]``."""
    return x.reshape(*x.shape[:3], -1).transpose(2, 3)


def grad_groups_of_columns(grad: Tensor) -> Tensor:
    """``[v, n, g, o, ...]`` to ``[v, n, g, s, o]``."""
    return grad.reshape(*grad.shape[:4], -1).transpose(3, 4)


def _factor(place: Place, is_right: bool, names: tuple[str, str]) -> Use | None:
    """The left or the right factor of a product of matrices that were saved under these names.

    It is used where the samples are rows or columns of the other factor. The matrices of a batch are groups; of each,
    a sample may have several rows or columns.
    """
    axes, batched = place.layout.axes, len(place.out) == 3
    is_regular = isinstance(place.layout, Layout) or (is_right and not batched)
    if not is_regular or axes != [batched + (not is_right)]:
        return None
    x = place.saved(names[not is_right])
    if is_right and not batched:
        return DenseUse((x,), rows_of, grad_rows_of, flipped=True, apply=partial(torch.mm, x))
    if is_right:
        return DenseUse((x,), groups_of_rows, grad_groups_of_rows, flipped=True)
    if batched:
        return DenseUse((x,), groups_of_columns, grad_groups_of_columns)
    return DenseUse((x,), columns_of, grad_columns_of)


@form("Mm", "Bmm")
def product(place: Place) -> Use | None:
    return _factor(place, place.k == 1, ("self", "mat2"))


@form("Addmm", "Baddbmm")
def sum_with_product(place: Place) -> Use | None:
    is_addmm = kind(place.node) == "Addmm"
    if place.k == 0:
        is_plain = is_addmm and len(place.shape) == 1 and place.layout.axes == [0]  # as a linear layer has it
        own = (1, *place.shape) if is_plain else place.aligned()
        return ElementwiseUse(own) if own is not None and place.saved("beta") == 1 else None
    names = ("mat1", "mat2") if is_addmm else ("batch1", "batch2")
    return _factor(place, place.k == 2, names) if place.saved("alpha") == 1 else None


@form("GroupedMm")
def grouped_product(place: Place) -> Use | None:
    """Rows, sorted by experts, times the matrix of each: ``[r, i]`` and ``[e, i, o]``."""
    offsets = place.saved("offs")
    if place.k != 1 or place.layout.axes != [0] or offsets is None or len(place.shape) != 3:
        return None
    return StackedUse(place.saved("self"), offsets.tolist(), rows_of, grad_rows_of, flipped=True)


@form("Trilinear")
def bilinear(place: Place) -> Use | None:
    """``F.bilinear``, whose matrix ``[o, i j]`` multiplies the outer products of two inputs."""
    if place.k != 1 or place.layout.axes != [0] or len(place.shape) != 3 or not is_bilinear(place.node):
        return None
    one, other = place.saved("i1"), place.saved("i3")
    if one.dim() != 2 or other.dim() != 2:
        return None

    def pairs(x: Tensor, y: Tensor) -> Tensor:
        return rows_of((x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2))

    return DenseUse((one, other), pairs, grad_rows_of)
