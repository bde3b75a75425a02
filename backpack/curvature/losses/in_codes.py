"""Cross entropy of a linear layer, whose columns ``s (p - e_i)`` at the logits of a row have the codes ``(s, s i)``.

With the weight ``a`` of a row in the loss, a drawn column has ``s = sqrt(a)`` and a class ``i`` of probability ``p_i``;
a gradient has ``s = a`` and the target. Probabilities are computed for some rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import CrossEntropyLoss, Module

from backpack.curvature.losses.base import LossRoot, divided, root_of
from backpack.curvature.losses.cross_entropy import drawn_from, may_be_negative, weights_of_terms
from backpack.modules.loss_calls import LossCall
from backpack.nodes.linear_cross_entropy import head_of
from backpack.samples import AnyLayout


class LinearCrossEntropyLoss(CrossEntropyLoss):
    """What takes the place of PyTorch's loss in a call, with codes as its input. Its gradient there is a code."""

    def __init__(self, call: LossCall) -> None:
        plain = cross_entropy_of(call.loss)
        super().__init__(plain.weight, None, plain.ignore_index, None, plain.reduction, plain.label_smoothing)
        self.head, x = head_of(call.loss), torch.atleast_2d(call.input.detach())
        self.rows, self.classes = x.to(self.head.matrix.dtype), len(self.head.matrix)
        self.is_reduced = plain.reduction != "none" or call.input.dim() == 1

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        target = target.reshape(-1)
        weight = self.weights(target, input.new_ones(()))
        terms = (code(weight, target.clamp(0, self.classes - 1)) * input).sum(1)
        return terms.sum() if self.is_reduced else terms

    def weights(self, target: Tensor, outer: Tensor) -> Tensor:
        """What the curvature of each row is multiplied by, ``[r]``."""
        return weights_of_terms(self, target.reshape(-1), self.classes, outer, outer.dtype)


class CodesRoot(LossRoot):
    """Columns of the root in codes, ``[v, n, d]``. ``weight`` is that of each row, ``[r]``."""

    def __init__(self, loss: LinearCrossEntropyLoss, layout: AnyLayout, weight: Tensor, signed: bool) -> None:
        self.head, self.rows, self.layout = loss.head, loss.rows, layout
        self.weight = self._without_signs(weight.unsqueeze(0))[0] if signed else weight
        self.positions = layout.split(self.rows).reshape(layout.n, -1, self.rows.shape[1]).shape[1]
        self.columns = self.positions * loss.classes

    def exact(self, start: int, stop: int) -> Tensor:
        """The columns ``sqrt(a p_i) (p - e_i)`` for each class of each position."""
        classes = len(self.head.matrix)
        number = torch.arange(start, min(stop, self.columns), device=self.weight.device)
        place, index = number // classes, number % classes
        shown, which = place.unique(return_inverse=True)
        rows = self._by_position(self.rows)[:, shown]
        probability = self.head.probability(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        scale = (probability[:, which, index] * self._by_position(self.weight)[:, place]).sqrt().T
        seeds = scale.new_zeros(*scale.shape, self.positions, 2, dtype=self.weight.dtype)
        seeds[torch.arange(len(number), device=place.device), :, place] = code(scale, index.unsqueeze(1))
        return seeds.flatten(2)

    def _by_position(self, rows: Tensor) -> Tensor:
        return self.layout.split(rows).reshape(self.layout.n, self.positions, *rows.shape[1:])

    def sampled(self) -> Tensor:
        return self.drawn(1)[0]

    def drawn(self, count: int) -> Tensor:
        point = torch.rand(count, len(self.rows), dtype=self.weight.dtype, device=self.rows.device).T.contiguous()
        index = [drawn_from(probability, point[rows]) for rows, probability in self.head.probabilities(self.rows)]
        codes = code(self.weight.sqrt(), torch.cat(index).T)
        return self.layout.split(codes, 1).reshape(count, self.layout.n, -1)

    def weighed(self, grad: Tensor) -> Tensor:
        weight = self.layout.split(self.weight.unsqueeze(1).expand(-1, 2))
        return divided(grad, weight.reshape(len(weight), -1))


def code(scale: Tensor, index: Tensor) -> Tensor:
    """The codes ``[..., 2]`` of ``scale (p - e_index)``."""
    scale = scale.expand(torch.broadcast_shapes(scale.shape, index.shape))
    return torch.stack([scale, scale * index], -1)


def classes_in_codes(loss: Module) -> int:
    """The classes of a loss that takes codes; 0: it takes none."""
    return loss.classes if isinstance(loss, LinearCrossEntropyLoss) else 0


def cross_entropy_of(loss: Any) -> CrossEntropyLoss:
    """The loss of the logits, for one with a linear layer."""
    ignored = -100 if loss.ignore_index is None else loss.ignore_index
    return CrossEntropyLoss(loss.weight, None, ignored, None, loss.reduction, loss.label_smoothing)


@root_of(LinearCrossEntropyLoss)
def in_codes(
    loss: Module, input: Tensor, layout: AnyLayout, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Tensor
) -> LossRoot:
    assert isinstance(loss, LinearCrossEntropyLoss)
    target, outer = args[0] if args else kwargs["target"], outer.to(input.dtype)
    signed = may_be_negative(loss, target, outer)
    return CodesRoot(loss, layout, loss.weights(target, outer), signed)
