"""Checks of Kronecker factors: second moments of the inputs and cotangents of the linear maps in a graph."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from backpack.extensions import EKFAC, HBP, KFAC, KFLR, KFRA
from backpack.graph import kind
from backpack.inspection.verification.averaged_curvature import stage_of
from backpack.inspection.verification.checks import Pairs, Truth, check
from backpack.inspection.verification.linear_maps import LinearMap, linear_maps
from backpack.inspection.verification.plain_autograd import NotCompared
from backpack.uses import kronecker

LARGEST = 2**9
"""The most columns of single samples that are pulled back; the most rows that are looked up."""


@check(KFAC, KFLR, KFRA, HBP)
def _factors(result: list[Tensor], truth: Truth) -> Pairs:
    _refuse_complex(truth)
    if truth.extension.backprop != "sqrt":
        stage, name = stage_of(truth)
        truth = stage.truth(name)
    for side, factor in enumerate(result):
        chosen = truth.plain.chosen(len(factor))
        found = factor[chosen] if factor.dim() == 1 else factor[chosen][:, chosen]
        vectors = torch.eye(len(factor), dtype=factor.dtype)[chosen]
        true = truth.curvature().sum(0) if len(result) == 1 else moments(truth, side, vectors, result)
        yield found, true.diagonal() if factor.dim() == 1 else true


@check(EKFAC)
def _eigen(result: Any, truth: Truth) -> Pairs:
    """Bases are orthonormal, factors are diagonal in them, and the curvature along them is the eigenvalue."""
    _refuse_complex(truth)
    chosen = [truth.plain.chosen(len(basis)) for basis in result.bases]
    vectors = [
        torch.eye(len(basis), dtype=basis.dtype)[own] if basis.dim() == 1 else basis.T[own]
        for basis, own in zip(result.bases, chosen, strict=True)
    ]
    parameter = truth.plain.parameters[truth.name]
    if len(vectors) == 1:
        directions, found = vectors[0], result.eigenvalues[chosen[0]]
    else:
        number = min(map(len, vectors))
        directions = torch.einsum("kr,kc->krc", vectors[0][:number], vectors[1][:number])
        found = result.eigenvalues[chosen[0][:number], chosen[1][:number]]
    maps = _maps(truth)
    tensors = [maps[0].tensor(d) if maps else d.reshape(parameter.shape) for d in directions]
    blocks = truth.curvature_along(truth.plain.push_forward(parameter, tensors)).sum(0)
    yield found, blocks.diagonal()
    for side, (basis, own) in enumerate(zip(result.bases, vectors, strict=True)):
        if basis.dim() == 2:
            yield basis.T @ basis, torch.eye(len(basis), dtype=basis.dtype)
        true = blocks if len(vectors) == 1 else moments(truth, side, own, result.bases)
        yield torch.diag(true.diagonal()), true


def _refuse_complex(truth: Truth) -> None:
    if truth.plain.parameters[truth.name].is_complex():
        raise NotCompared("factors of complex parameters are not looked into")


def moments(truth: Truth, side: int, vectors: Tensor, result: list[Tensor]) -> Tensor:
    """The factor of the rows (``side`` 0) or columns (1) of a matrix, along ``vectors``: ``[k, k]``."""
    maps = _maps(truth)
    # A table whose rows are the same for all samples is a tensor like any other. The factors of several matrices in one
    # parameter (experts) are those of all rows.
    shared = all(one.is_shared_table for one in maps) and all(factor.dim() > 1 for factor in result)
    if shared or maps[0].matrix(maps[0].parameter).shape[side] != vectors.shape[1]:
        return _moments_of_gradients(truth, side, vectors)
    forms: dict[Any, list[LinearMap]] = {}
    for one in maps:
        forms.setdefault(one.form, []).append(one)
    total = vectors.new_zeros(len(vectors), len(vectors))
    for group in forms.values():
        if group[0].inputs_first == (side == 0):
            used = {row for one in maps if one.inputs_first == group[0].inputs_first for row in one.rows.tolist()}
            total += _of_inputs(truth, group, vectors) / len(used)
        else:
            total += _of_cotangents(truth, group, vectors)
    return total


def _maps(truth: Truth) -> list[LinearMap]:
    return truth.plain.once(("maps", truth.name), lambda: linear_maps(truth.plain, truth.name))


def _of_inputs(truth: Truth, group: list[LinearMap], vectors: Tensor) -> Tensor:
    """The second moment of inputs, summed over outputs; for rows that are looked up it is diagonal by definition."""
    if truth.extension.approx == "reduce" and kind(group[0].node) == "Embedding":
        if vectors.shape[1] > LARGEST:
            raise NotCompared(f"the mean of positions looks up more than {LARGEST} rows")
        x = torch.cat([one.inputs(torch.eye(vectors.shape[1], dtype=vectors.dtype)) for one in group], 2)
        x = x[:, truth.samples]
        return (vectors * (x.mean(2).square().sum((1, 2)) / len(truth.samples))) @ vectors.T
    x = torch.cat([one.inputs(vectors) for one in group], 2)[:, truth.samples]
    if truth.extension.approx == "reduce":
        x = x.mean(2, keepdim=True)
    found = torch.einsum("knso,lnso->kl", x, x) / len(truth.samples)
    return found / x.shape[2] if truth.extension.approx == "expand" else found


def _of_cotangents(truth: Truth, group: list[LinearMap], vectors: Tensor) -> Tensor:
    """The second moment of cotangents along combinations of channels, summed over positions before it or after it."""
    total = vectors.new_zeros(len(vectors), len(vectors))
    outputs = [list(zip(*(one.outputs(v) for v in vectors), strict=True)) for one in group]  # maps, groups, vectors
    for parts in zip(*outputs, strict=True):
        if truth.extension.approx == "expand":
            for one, part in zip(group, parts, strict=True):
                for own in one.positions(torch.stack(part)):
                    total += truth.curvature_along(truth.plain.push_forward(one.edge, list(own))).sum(0)
        elif any(bool(own.any()) for part in parts for own in part):
            columns = [truth.plain.push_forward(one.edge, part) for one, part in zip(group, parts, strict=True)]
            total += truth.curvature_along(sum(columns[1:], start=columns[0])).sum(0)
    return total / (group[0].groups if group[0].swapped else 1)


def _moments_of_gradients(truth: Truth, side: int, vectors: Tensor) -> Tensor:
    """The second moment of the rows, or the columns, of individual gradients."""
    columns, parameter, size = truth.computed.columns, truth.plain.parameters[truth.name], vectors.shape[1]
    if parameter.dim() < 2 or parameter.numel() <= kronecker.LARGEST:
        raise NotCompared("the graph does not show of which linear map it is the matrix")
    if len(columns) * len(truth.samples) > LARGEST:
        raise NotCompared("there are too many columns")
    total, trace = vectors.new_zeros(len(vectors), len(vectors)), vectors.new_zeros(())
    for column, place in product(columns, range(len(truth.samples))):
        gradient = truth.pulled(column, place)
        matrix = gradient.reshape(-1, size) if side else gradient.reshape(size, -1).T
        along = matrix @ vectors.T
        total += along.T @ along
        trace += gradient.square().sum()
    return total / trace if side else total
