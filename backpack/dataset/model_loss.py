"""The loss that a model computes by itself, as models of ``transformers`` do where they are given ``labels``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module

from backpack.curvature.losses.denominators import counts
from backpack.dataset.batch_contents import entry
from backpack.graph import kind, saved

MEAN = 1
"""PyTorch's number for ``reduction="mean"``."""


class ModelLoss(Module):
    """Stands for the loss in a model's output."""

    reduction = "mean"

    def forward(self, output: Tensor, target: None) -> Tensor:
        """The loss itself; zero if no target counts, where the mean of none is not a number."""
        return output if self.reduction == "mean" else output.nan_to_num(0.0)


def own_loss(model: Module, batch: Any) -> tuple[Tensor, None]:
    """The loss that a model returns for a batch, a mapping of its arguments with ``labels`` among them.

    Raises:
        TypeError: The batch is no mapping, or the model returns no loss.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"With lossfunc=None, a batch is a mapping of the model's arguments with 'labels'; got "
            f"{type(batch).__name__}. Pass a loss, or forward=function."
        )
    found = entry(model(**batch), "loss")
    if not isinstance(found, Tensor) or found.dim():
        raise TypeError(
            f"{type(model).__name__} returns no loss for a batch with {', '.join(map(str, batch))}: pass a loss as "
            f"lossfunc."
        )
    return found, None


@counts(ModelLoss)
def terms_of_the_mean(loss: ModelLoss, output: Tensor | None, target: Any) -> float:
    """What the mean divides by, read off the function that computed it.

    Raises:
        ValueError: It is not the mean of one of PyTorch's losses.
    """
    node = None if output is None else output.grad_fn
    while node is not None and kind(node) in ("ToCopy", "View", "Squeeze"):
        node = node.next_functions[0][0]
    if node is not None and hasattr(node, "_saved_reduction") and saved(node, "reduction") == MEAN:
        if hasattr(node, "_saved_total_weight"):
            return float(saved(node, "total_weight"))
        return float(saved(node, "self").numel())
    raise ValueError(
        "What the model's own loss divides by cannot be read off its graph: pass denominator=function, which returns "
        "it for a batch, such as the number of targets that count."
    )
