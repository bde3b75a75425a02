"""Gradients, individual gradients and Jacobians by plain autograd. The graph stays in all of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def gradients(
    output: Tensor, parameters: Sequence[Tensor], cotangent: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """Of each parameter: dense, and zeros where nothing arrives."""
    found = torch.autograd.grad(output, parameters, cotangent, retain_graph=True, allow_unused=True, **options)
    return [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(found, parameters, strict=True)]


def individual_gradients(terms: Iterable[Tensor], parameters: Iterable[Tensor], **options: Any) -> list[Tensor]:
    """``[N, *p]`` of each parameter, from the terms of a loss, one for each sample.

    The individual gradients of the entries of an output are its Jacobian.
    """
    parameters = list(parameters)
    rows = [gradients(term, parameters, **options) for term in terms]
    return [torch.stack(own) for own in zip(*rows, strict=True)]


def through_rows(output: Tensor, loss: Tensor, parameters: list[Tensor], axis: int = 0) -> list[Tensor]:
    """``J_n^T g_n`` of each parameter: the part of its gradient that flows through row ``n`` of a model's output."""
    (cotangent,) = torch.autograd.grad(loss, output, retain_graph=True)
    rows = []
    for n in range(output.shape[axis]):
        own = torch.zeros_like(cotangent)
        own.select(axis, n).copy_(cotangent.select(axis, n))
        rows.append(gradients(output, parameters, own))
    return [torch.stack(own) for own in zip(*rows, strict=True)]


def loss_hessian(loss: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Of a function of a model's output, ``[entries, entries]``."""
    return torch.autograd.functional.hessian(loss, point.detach()).reshape(point.numel(), point.numel())
