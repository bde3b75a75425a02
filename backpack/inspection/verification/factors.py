"""What is true of Kronecker factors: second moments of inputs and cotangents of the linear maps in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backpack.extensions import EKFAC, HBP, KFAC, KFLR, KFRA
from backpack.inspection.verification.linear_maps import Map, kind, maps
from backpack.inspection.verification.plain import NoTruth
from backpack.inspection.verification.recursion import stage_of
from backpack.inspection.verification.truths import Pairs, Truth, check
from backpack.uses import kronecker

LARGEST = 2**9
"""Pull-backs of single samples' columns that are made of parameters that are no matrices; rows that are looked up."""


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
        true = truth.blocks().sum(0) if len(result) == 1 else moments(truth, side, vectors, result)
        yield found, true.diagonal() if factor.dim() == 1 else true


@check(EKFAC)
def _eigen(result: Any, truth: Truth) -> Pairs:
    """The bases are orthonormal, factors are diagonal in them, and the curvature along them is the eigenvalue."""
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
    found_maps = _maps(truth)
    tensors = [found_maps[0].tensor(d) if found_maps else d.reshape(parameter.shape) for d in directions]
    blocks = truth.gram(truth.plain.along(parameter, tensors)).sum(0)
    yield found, blocks.diagonal()
    for side, (basis, own) in enumerate(zip(result.bases, vectors, strict=True)):
        if basis.dim() == 2:
            yield basis.T @ basis, torch.eye(len(basis), dtype=basis.dtype)
        true = blocks if len(vectors) == 1 else moments(truth, side, own, result.bases)
        yield torch.diag(true.diagonal()), true


def _refuse_complex(truth: Truth) -> None:
    if truth.plain.parameters[truth.name].is_complex():
        raise NoTruth("factors of complex parameters are not looked into")


def moments(truth: Truth, side: int, vectors: Tensor, result: list[Tensor]) -> Tensor:
    """The first or second of two factors, along ``vectors``: ``[k, k]``."""
    found = _maps(truth)
    # What all samples look up is a table as others are, or a tensor that others are computed from. Of several matrices
    # in one parameter (experts), the factors are those of all rows.
    shared = all(a.is_shared_table for a in found) and all(factor.dim() > 1 for factor in result)
    if shared or found[0].matrix(found[0].parameter).shape[side] != vectors.shape[1]:
        return _own_moments(truth, side, vectors)
    forms: dict[Any, list[Map]] = {}
    for a in found:
        forms.setdefault(a.form, []).append(a)
    total = vectors.new_zeros(len(vectors), len(vectors))
    for group in forms.values():
        if group[0].inputs_first == (side == 0):
            used = {row for a in found if a.inputs_first == group[0].inputs_first for row in a.rows.tolist()}
            total += _of_inputs(truth, group, vectors) / len(used)
        else:
            total += _of_cotangents(truth, group, vectors)
    return total


def _maps(truth: Truth) -> list[Map]:
    known = truth.plain.maps
    if truth.name not in known:
        known[truth.name] = maps(truth.plain, truth.name)
    return known[truth.name]


def _of_inputs(truth: Truth, group: list[Map], vectors: Tensor) -> Tensor:
    """Summed over outputs, which all have these inputs. Of what is looked up, the factor is diagonal by definition."""
    if truth.extension.approx == "reduce" and kind(group[0].node) == "Embedding":
        if vectors.shape[1] > LARGEST:
            raise NoTruth(f"the mean of positions looks up more than {LARGEST} rows")
        x = torch.cat([a.inputs(torch.eye(vectors.shape[1], dtype=vectors.dtype)) for a in group], 2)[:, truth.rows]
        return (vectors * (x.mean(2).square().sum((1, 2)) / len(truth.rows))) @ vectors.T
    x = torch.cat([a.inputs(vectors) for a in group], 2)[:, truth.rows]
    if truth.extension.approx == "reduce":
        x = x.mean(2, keepdim=True)
    found = torch.einsum("knso,lnso->kl", x, x) / len(truth.rows)
    return found / x.shape[2] if truth.extension.approx == "expand" else found


def _of_cotangents(truth: Truth, group: list[Map], vectors: Tensor) -> Tensor:
    """Those of one sample, summed over positions (or by themselves), along combinations of channels."""
    total = vectors.new_zeros(len(vectors), len(vectors))
    outputs = [list(zip(*(a.outputs(v) for v in vectors), strict=True)) for a in group]  # maps, groups, vectors
    for parts in zip(*outputs, strict=True):
        if truth.extension.approx == "expand":
            for a, part in zip(group, parts, strict=True):
                for own in a.positions(torch.stack(part)):
                    total += truth.gram(truth.plain.along(a.edge, list(own))).sum(0)
        elif any(bool(own.any()) for part in parts for own in part):
            columns = [truth.plain.along(a.edge, part) for a, part in zip(group, parts, strict=True)]
            total += truth.gram(sum(columns[1:], start=columns[0])).sum(0)
    return total / (group[0].groups if group[0].swapped else 1)


def _own_moments(truth: Truth, side: int, vectors: Tensor) -> Tensor:
    """Of the rows, or the columns, of individual gradients."""
    drawn, parameter = truth.run.drawn, truth.plain.parameters[truth.name]
    if parameter.dim() < 2 or parameter.numel() <= kronecker.LARGEST:
        raise NoTruth("the graph does not show of which linear map it is the matrix")
    if len(drawn) * len(truth.rows) > LARGEST:
        raise NoTruth("there are too many columns")
    total: Any = 0
    trace: Any = 0
    for column in drawn:
        for row in truth.rows:
            grad = truth.plain.gradient(truth.name, truth.plain.of_sample(column, int(row)))
            matrix = grad.reshape(-1, vectors.shape[1]) if side else grad.reshape(vectors.shape[1], -1).T
            total = total + (matrix @ vectors.T).T @ (matrix @ vectors.T)
            trace = trace + matrix.square().sum()
    return total / trace if side else total
