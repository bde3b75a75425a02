"""Losses whose Hessian is diagonal: it is PyTorch's own second derivative of the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from backpack.curvature.losses.base import Diagonal, LossRoot, by_sample, root_of, term_weight
from backpack.curvature.losses.functional import hessian_product
from backpack.samples import AnyLayout


@root_of(nn.HuberLoss, nn.KLDivLoss, nn.L1Loss, nn.NLLLoss, nn.SmoothL1Loss, nn.SoftMarginLoss, nn.BCELoss)
def elementwise(
    loss: Module, input: Tensor, layout: AnyLayout, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Tensor
) -> LossRoot:
    """Sampled: the root's columns, summed with random signs."""
    terms = (args[0] if args else kwargs["target"]).numel() if isinstance(loss, nn.NLLLoss) else None
    hessian, weight = _hessian_and_weight(loss, input, layout, args, kwargs, outer, terms)
    root = Diagonal(hessian, weight)
    if not hessian.any():
        root.notice = (
            f"{type(loss).__name__} is linear in its input here: its Hessian and the Gauss-Newton matrix are zero. "
            f"For a classifier, use CrossEntropyLoss on the logits instead of NLLLoss on their log-softmax."
        )
    return root


@root_of(nn.MSELoss, nn.GaussianNLLLoss)
def normal(
    loss: Module, input: Tensor, layout: AnyLayout, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Tensor
) -> LossRoot:
    """Sampled: the gradient at targets drawn from a normal distribution around ``f`` (squared error: ``N(f, 1/2)``)."""
    hessian, weight = _hessian_and_weight(loss, input, layout, args, kwargs, outer)
    return Diagonal(hessian, weight, lambda: hessian.sqrt() * torch.randn_like(hessian))


@root_of(nn.PoissonNLLLoss)
def poisson(
    loss: Module, input: Tensor, layout: AnyLayout, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Tensor
) -> LossRoot:
    """Sampled: the gradient at counts drawn from the model's Poisson distributions.

    Signs are drawn where the rate itself is given: then the Hessian depends on the target.
    """
    hessian, weight = _hessian_and_weight(loss, input, layout, args, kwargs, outer)
    if not getattr(loss, "log_input", False):
        return Diagonal(hessian, weight)
    rate = by_sample(layout, input).exp()
    return Diagonal(hessian, weight, lambda: (hessian / rate).sqrt() * (rate - torch.poisson(rate)))


@root_of(nn.BCEWithLogitsLoss)
def binary_cross_entropy(
    loss: Module, input: Tensor, layout: AnyLayout, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Tensor
) -> LossRoot:
    """Sampled: the gradient at labels drawn from the model's Bernoulli distributions."""
    hessian, weight = _hessian_and_weight(loss, input, layout, args, kwargs, outer)
    probability = by_sample(layout, input).sigmoid()

    def draw() -> Tensor:
        # The weight of each entry is its second derivative over p (1 - p), which cancels in what follows.
        odds = ((1 - probability) / probability).sqrt()
        drawn = torch.bernoulli(probability)
        return hessian.sqrt() * torch.where(drawn > 0, -odds, 1 / odds)

    return Diagonal(hessian, weight, draw)


def _hessian_and_weight(
    loss: Module,
    input: Tensor,
    layout: AnyLayout,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outer: Tensor,
    terms: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The Hessian's diagonal ``[n, d]``, and the weight of each of the ``terms`` of a loss (default: one an entry)."""
    diagonal = hessian_product(loss, input, args, kwargs, outer)(torch.ones_like(input))
    return by_sample(layout, diagonal), term_weight(loss, input, layout, outer, terms)
