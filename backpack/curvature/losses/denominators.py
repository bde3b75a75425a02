"""What the mean of a loss divides by: the number of its entries, or the sum of their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from backpack.modules.loss_calls import WITH_HEADS

COUNTS: dict[type[Module], Callable[[Any, Tensor | None, Tensor], float]] = {}
"""Loss module to the function of the module, its input and its target that returns what its mean divides by."""


def counts(*losses: type[Module]) -> Callable[[Callable[[Any, Tensor | None, Tensor], float]], Any]:
    """Register the function that follows for these losses."""

    def register(function: Callable[[Any, Tensor | None, Tensor], float]) -> Any:
        COUNTS.update(dict.fromkeys(losses, function))
        return function

    return register


def denominator(loss: Module, output: Tensor | None, target: Any) -> float:
    """What a loss divides the sum over its entries by: 1 for a sum, and 0 if no entry counts.

    An ``output`` that is not known is taken to have the target's shape.

    Raises:
        ValueError: The loss is not reduced, or how its mean is formed is not known.
    """
    reduction = getattr(loss, "reduction", None)
    if reduction == "sum":
        return 1.0
    for cls in type(loss).__mro__:
        if cls in COUNTS and cls.forward is type(loss).forward and reduction in ("mean", "batchmean"):
            return COUNTS[cls](loss, output, target)
    raise ValueError(
        f"How {type(loss).__name__} (reduction={reduction!r}) divides the sum over its samples is not known. For a "
        f"mean, pass denominator=function to accumulate(): it returns for a batch what is divided by, such as the "
        f"number of samples. For a sum, give the loss an attribute reduction='sum'."
    )


@counts(nn.CrossEntropyLoss, nn.NLLLoss, *WITH_HEADS)
def weights_of_targets(loss: Any, output: Tensor | None, target: Tensor) -> float:
    """The sum of the targets' class weights; of targets that are probabilities, their number."""
    if target.is_floating_point():
        return target.numel() / target.shape[min(1, target.dim() - 1)]
    counted = target != (-100 if loss.ignore_index is None else loss.ignore_index)
    if loss.weight is None:
        return float(torch.count_nonzero(counted))
    weight = loss.weight.to(target.device, torch.float64)
    return float((weight[target.where(counted, target.new_zeros(()))] * counted).sum())


@counts(nn.BCELoss, nn.BCEWithLogitsLoss, nn.GaussianNLLLoss, nn.HuberLoss, nn.L1Loss, nn.MSELoss)
@counts(nn.PoissonNLLLoss, nn.SmoothL1Loss, nn.SoftMarginLoss)
def entries(loss: Any, output: Tensor | None, target: Tensor) -> float:
    """The number of entries."""
    return float(torch.broadcast_shapes(target.shape if output is None else output.shape, target.shape).numel())


@counts(nn.KLDivLoss)
def divergences(loss: Any, output: Tensor | None, target: Tensor) -> float:
    """The number of entries, or that of samples."""
    return float(len(target)) if loss.reduction == "batchmean" else entries(loss, output, target)
