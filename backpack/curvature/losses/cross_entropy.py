"""Cross entropy: ``H = a (diag(p) - p p^T)`` for each position, ``p`` the softmax and ``a`` its weight in the loss."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import CrossEntropyLoss, Module

from backpack.curvature.losses.base import LossRoot, divided, root_of
from backpack.nodes.linear_cross_entropy import weights_of_targets
from backpack.samples import AnyLayout, found_layout


class SoftmaxRoot(LossRoot):
    """The root for ``positions`` softmaxes a sample. ``probability`` is ``[n, s, c]``, ``weight`` ``[n, s]``.

    With ``q = sqrt(p)``, a unit vector, ``diag(p) - p p^T = diag(q) (I - q q^T) diag(q)``, and the columns but the
    last of the Householder matrix that maps ``q`` to the last axis are a root of ``I - q q^T``: ``c - 1`` columns.
    """

    def __init__(self, probability: Tensor, weight: Tensor, shape: torch.Size, axis: int, signed: bool) -> None:
        self.positions, self.classes = probability.shape[1:]
        self.columns = self.positions * (self.classes - 1)
        self.probability, self.weight = probability, self._without_signs(weight) if signed else weight
        if self.signs is not None:
            self.signs = self.signs.repeat_interleave(self.classes - 1, 0)
        self.shape, self.axis = shape, axis

    @property
    def documented_columns(self) -> int:
        return self.positions * self.classes

    @cached_property
    def root(self) -> Tensor:
        """``q``, ``[n, s, c]``."""
        return self.probability.sqrt()

    @cached_property
    def reflected(self) -> Tensor:
        """What all columns of a position have in common but for a factor, ``q (q + e)``, ``[n, s, c]``."""
        axis = self.root.clone()
        axis[..., -1] += 1
        return axis * self.root

    def exact(self, start: int, stop: int) -> Tensor:
        place, entry = self._numbers(start, min(stop, self.columns), self.classes - 1)
        own = self.root[:, place, entry]
        return self._columns(self.reflected, -own / (1 + self.root[:, place, -1]), own, place, entry)

    def documented(self, start: int, stop: int) -> Tensor:
        place, entry = self._numbers(start, min(stop, self.documented_columns), self.classes)
        own = self.root[:, place, entry]
        return self._columns(self.probability, -own, own, place, entry)

    def _numbers(self, start: int, stop: int, each: int) -> tuple[Tensor, Tensor]:
        """The positions of some columns, and their classes."""
        number = torch.arange(start, stop, device=self.probability.device)
        return number // each, number % each

    def _columns(self, common: Tensor, factor: Tensor, own: Tensor, place: Tensor, entry: Tensor) -> Tensor:
        """``factor[n, v]`` times ``common[n, s, c]`` at a column's position, and ``own[n, v]`` for its class.

        Both by the root of the weight, ``[v, n, d]``.
        """
        scale = self.weight[:, place].sqrt()
        rows = common[:, 0] if self.positions == 1 else common.transpose(0, 1)[place]
        columns = rows * (factor * scale).T.unsqueeze(2)
        columns.scatter_add_(2, entry[:, None, None].expand(-1, len(own), 1), (own * scale).T.unsqueeze(2))
        return self._place(columns, place)

    def _place(self, columns: Tensor, place: Tensor) -> Tensor:
        """Columns of single positions ``[v, n, c]`` among zeros for the other positions, ``[v, n, d]``."""
        if self.positions == 1:
            return columns
        seeds = columns.new_zeros(len(columns), *self.probability.shape)
        seeds[torch.arange(len(columns), device=place.device), :, place] = columns
        return self._restore(seeds)

    def _restore(self, seeds: Tensor) -> Tensor:
        """``[..., n, s, c]`` to ``[..., n, d]``, in the order of the input."""
        if self.positions == 1:
            return seeds.flatten(-2)
        leading = seeds.dim() - 2
        rest = [size for axis, size in enumerate(self.shape[1:]) if axis != self.axis]
        return seeds.reshape(*seeds.shape[:-2], *rest, self.classes).movedim(-1, leading + self.axis).flatten(leading)

    def weighed(self, grad: Tensor) -> Tensor:
        weight = self._restore(self.weight.unsqueeze(2).expand_as(self.probability))
        return divided(grad, weight)

    def sampled(self) -> Tensor:
        drawn = drawn_from(self.probability.detach(), torch.rand_like(self.probability[..., :1]))
        column = self.probability.scatter_add(2, drawn, self.probability.new_full(drawn.shape, -1))
        return self._restore(column * self.weight.sqrt().unsqueeze(2))


def drawn_from(probability: Tensor, points: Tensor) -> Tensor:
    """Classes ``[..., v]`` of these probabilities ``[..., c]``, as uniformly distributed points ``[..., v]`` say."""
    reached = probability.cumsum(-1).contiguous()
    points = points.to(reached.dtype) * reached[..., -1:]
    index = torch.searchsorted(reached, points, right=True)
    return index.clamp_(max=probability.shape[-1] - 1)  # where they are not a number: the last


def weights_of_terms(loss: Any, target: Tensor, classes: int, outer: Tensor, dtype: torch.dtype) -> Tensor:
    """What the curvature of each position is multiplied by in the loss: zero where it is ignored."""
    weight, smoothing = None if loss.weight is None else loss.weight.to(dtype), loss.label_smoothing
    if target.is_floating_point():
        share = (1 - smoothing) * target + smoothing / classes
        mass = (share if weight is None else share * weight.reshape(-1, *[1] * (target.dim() - 2))).sum(1)
        count: Tensor | int = mass.numel()
    else:
        mass = own = weights_of_targets(target, loss.ignore_index, weight, dtype)
        if weight is not None:
            counted = target != loss.ignore_index
            mass = (1 - smoothing) * own + smoothing / classes * weight.sum() * counted
        count = own.sum()
    if loss.reduction == "mean":
        return mass / count
    return mass * outer if outer.dim() else mass  # weights of entries that are not reduced


def may_be_negative(loss: Any, target: Tensor, outer: Tensor) -> bool:
    """Whether ``weights_of_terms`` may be."""
    return loss.weight is not None or target.is_floating_point() or outer.dim() > 0


@root_of(CrossEntropyLoss)
def cross_entropy(
    loss: Module, input: Tensor, layout: AnyLayout, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Tensor
) -> LossRoot:
    assert isinstance(loss, CrossEntropyLoss)
    target = args[0] if args else kwargs["target"]
    if input.dim() == 1:  # of one sample, without a batch axis
        sample = layout.owners(input.shape, torch.device("cpu")).max()
        input, target, layout = input[None], target[None], found_layout(layout.n, sample.reshape(1, 1))
    classes = input.shape[min(1, input.dim() - 1)]
    mass = weights_of_terms(loss, target, classes, outer, input.dtype)
    split = layout.split(input)
    axis = layout.split_sizes([2 if axis == 1 else 0 for axis in range(input.dim())]).index(2)
    of_targets = layout.moved([axis for axis in range(input.dim()) if axis != 1])
    assert of_targets is not None
    probability = split.movedim(axis + 1, -1).softmax(-1)
    return SoftmaxRoot(
        probability.reshape(len(split), -1, classes),
        of_targets.split(mass).reshape(len(split), -1),
        split.shape,
        axis,
        signed=may_be_negative(loss, target, outer),
    )
