"""Rules for functions that move rows or entries by indices: their samples move along with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backpack.samples.layout_rules.registry import Output, Unknown, rule
from backpack.samples.layouts import AnyLayout


@rule("Gather", several_axes=True)
def gathered(out: Output) -> AnyLayout | None:
    (dim,) = out.axes("dim")
    given = out.input_shape(0)
    _refuse_other_sizes(out, given, dim)
    if not out.layout.occupies([dim]):
        return out.layout
    index, owner = _aligned(out, dim)
    sizes = [given[axis] if axis == dim else size for axis, size in enumerate(index.shape)]
    found = torch.full(sizes, -1).scatter_(dim, index, owner)
    return out.layout_of(found) if torch.equal(found.gather(dim, index), owner) else None


@rule("ScatterAdd", several_axes=True)
def scattered_sum(out: Output) -> list[AnyLayout | None]:
    """Entries of a source are added to those of a tensor along an axis."""
    (dim,) = out.axes("dim")
    layout = out.layout
    if out.edges[1][0] is None:
        return [layout]
    source = out.input_shape(1)
    _refuse_other_sizes(out, source, dim)
    if not layout.occupies([dim]):
        return [layout, layout]
    if out.indices("index")[0].shape != source:
        raise Unknown
    index, owner = _aligned(out, dim)
    return [layout, out.layout_of(owner.gather(dim, index))]


def _refuse_other_sizes(out: Output, given: tuple[int, ...], dim: int) -> None:
    """Raise ``Unknown`` where an input has other sizes than the output, but for one axis."""
    if len(given) != len(out.shape):
        raise Unknown
    if any(size != own for axis, (size, own) in enumerate(zip(out.shape, given, strict=True)) if axis != dim):
        raise Unknown


def _aligned(out: Output, dim: int) -> tuple[Tensor, Tensor]:
    """Saved indices along an axis, and the owners of the output's entries, with the same sizes along all other axes.

    That is size 1 where both are the same along an axis.
    """
    (index,) = out.indices("index")
    owner = out.owner
    sizes = list(owner.shape)
    for axis, size in enumerate(index.shape):
        if axis != dim and owner.shape[axis] == 1 and size and index.stride(axis) == 0:
            index = index.narrow(axis, 0, 1)
        elif axis != dim:
            sizes[axis] = size
    return index, owner.expand(sizes)


@rule("Index", several_axes=True)
def indexed(out: Output) -> AnyLayout | None:
    """Rows that are picked by indices of the first axes."""
    given = out.indices("indices")
    indices = tuple(index for index in given if index is not None)
    if any(index is None for index in given[: len(indices)]):
        raise Unknown
    return _picked(out, indices, 0)


@rule("IndexSelect", several_axes=True)
def selected_rows(out: Output) -> AnyLayout | None:
    """Rows that are picked along an axis."""
    (dim,) = out.axes("dim")
    if not out.shape or not out.layout.occupies([dim]):
        return out.layout
    return _picked(out, tuple(out.indices("index")), dim)


def _picked(out: Output, indices: tuple[Tensor, ...], dim: int) -> AnyLayout | None:
    """Where the samples lie in a tensor of which rows were picked, by indices along ``dim`` and the axes behind."""
    given = out.input_shape(0)
    taken = sum(index.dim() if index.dtype == torch.bool else 1 for index in indices)
    lead = len(out.shape) - len(given) + taken
    owner = out.owner
    before, after = owner.shape[:dim], owner.shape[dim + lead :]
    owner = owner.expand(*before, *out.shape[dim : dim + lead], *after)
    place: Any = (*[slice(None)] * dim, *indices)
    found = torch.full([*before, *given[dim : dim + taken], *after], -1)
    found[place] = owner
    return out.layout_of(found) if torch.equal(found[place], owner) else None


@rule("IndexAdd", several_axes=True)
def rows_added(out: Output) -> list[AnyLayout | None]:
    """Rows of a source are added to those of a tensor along an axis."""
    (dim,) = out.axes("dim")
    if out.edges[1][0] is None or not out.layout.occupies([dim]):
        return [out.layout, out.layout]
    return [out.layout, out.layout_of(out.owner.index_select(dim, *out.indices("index")))]
