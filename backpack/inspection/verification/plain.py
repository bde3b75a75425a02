"""A model's graph for one batch, by plain autograd: what verifications take for true."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Module, RNNBase
from torch.nn.utils.rnn import pad_sequence

from backpack.dataset.contents import samples_of
from backpack.samples import SampleIds

LARGEST_LOOP = 2**10
"""Up to how many backward passes a loop over the entries of the output may take."""

Forward = Callable[[Module, Any], tuple[Tensor, Any]]


class NoTruth(Exception):
    """Why something is not compared."""


@dataclass(eq=False)
class Plain:
    """The graph of a forward pass; ``batch`` holds inputs and targets, ``forward`` makes of it the loss's arguments."""

    model: Module
    lossfunc: Module
    batch: tuple[Any, Any]
    forward: Forward
    entries: int
    ids: SampleIds | None = None
    maps: dict[str, Any] = field(default_factory=dict)
    stages: dict[Any, Any] = field(default_factory=dict)
    bends: list[Any] | None = None
    _columns: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out, self.targets = self.forward(self.model, self.batch)
        if not isinstance(self.out, Tensor):
            raise TypeError(f"verify() needs a tensor that the loss is called with, got {type(self.out).__name__}.")
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._find_samples()
        point = self.out.detach().requires_grad_()
        (self._slope,) = torch.autograd.grad(self.lossfunc(point, self.targets), point, create_graph=True)
        self._point = point
        self.slope = self.split(self._slope.detach())

    def _find_samples(self) -> None:
        self.axis, self.rows = 0, list[Tensor]()
        if self.ids is not None:
            self.n, shape = self.ids.count, list(self.out.shape)
            if not self.ids.fits(shape):
                raise ValueError(
                    f"sample_ids, of shape {list(self.ids.shape)}, does not fit what the loss is called with, of shape "
                    f"{shape}: give one number for each entry along its first axis, or along its first axes."
                )
            numbers = self.ids.numbers.flatten()
            self._entries = len(numbers)
            self.rows = [(numbers == number).nonzero().flatten() for number in range(self.n)]
            return
        axis = int(isinstance(self.model, RNNBase) and not self.model.batch_first)
        self.n = samples_of(self.batch[0], axis)
        if self.out.dim() <= axis or self.out.shape[axis] % self.n or (axis and self.out.shape[axis] != self.n):
            raise ValueError(
                f"The {self.n} samples cannot be told apart in the model's output of shape {list(self.out.shape)}: let "
                f"them be counted by its first axis."
            )
        self.axis = axis

    @property
    def given_ids(self) -> Any:
        """The samples' numbers, as ``backpack`` takes them."""
        return None if self.ids is None else (self.ids.numbers, self.ids.count)

    def split(self, tensor: Tensor) -> Tensor:
        """``[n, d]``."""
        if self.rows:
            entries = tensor.reshape(self._entries, -1)
            return pad_sequence([entries[own] for own in self.rows], batch_first=True).flatten(1)
        return tensor.movedim(self.axis, 0).reshape(self.n, -1)

    def join(self, tensor: Tensor) -> Tensor:
        """Undo ``split``; what belongs to no sample is zero."""
        if self.rows:
            found = tensor.new_zeros(self._entries, self.out.numel() // self._entries)
            for own, row in zip(self.rows, tensor, strict=True):
                found = found.index_copy(0, own, row.reshape(-1, found.shape[1])[: len(own)])
            return found.reshape(self.out.shape)
        return tensor.reshape(self.out.movedim(self.axis, 0).shape).movedim(0, self.axis)

    def pulled(self, cotangent: Tensor, at: Tensor | GradientEdge) -> Tensor | None:
        """The cotangent ``[n, d]`` of the output, pulled back to a parameter, or to another tensor of the graph."""
        (grad,) = torch.autograd.grad(
            self.out, at, self.join(cotangent), retain_graph=True, allow_unused=True, create_graph=True
        )
        return None if grad is None else grad.to_dense()

    def gradient(self, name: str, cotangent: Tensor) -> Tensor:
        """Of a parameter, for a cotangent ``[n, d]``."""
        found = self.pulled(cotangent, self.parameters[name])
        return torch.zeros_like(self.parameters[name]) if found is None else found.detach()

    def of_sample(self, cotangent: Tensor, number: int) -> Tensor:
        """A cotangent ``[n, d]`` of one sample, zero for the others."""
        own = torch.zeros_like(cotangent)
        own[number] = cotangent[number]
        return own

    def along(self, at: Tensor | GradientEdge, directions: Sequence[Tensor]) -> Tensor:
        """The derivatives of the output as a parameter, or another tensor, moves along these, ``[k, n, d]``.

        That of a pull-back by its cotangent; where a function has no second derivative, by a loop over the output.
        """
        dummy = torch.zeros(self.slope.shape, dtype=self.out.dtype, requires_grad=True)
        pulled = self.pulled(dummy, at)
        if pulled is None:
            return dummy.detach().expand(len(directions), -1, -1)
        if not pulled.requires_grad:
            return self._looped(at, directions)
        try:
            pulls = [
                torch.autograd.grad(pulled, dummy, d, retain_graph=True, allow_unused=True) if d.any() else (None,)
                for d in directions
            ]
        except RuntimeError:
            return self._looped(at, directions)
        return torch.stack([torch.zeros_like(dummy) if grad is None else grad for (grad,) in pulls])

    def _looped(self, at: Tensor | GradientEdge, directions: Sequence[Tensor]) -> Tensor:
        size = self.out.numel()
        if size > LARGEST_LOOP:
            raise NoTruth(f"a function has no second derivative, and the output has more than {LARGEST_LOOP} entries")
        rows = []
        for unit in torch.eye(size, dtype=self.out.dtype):
            (grad,) = torch.autograd.grad(
                self.out, at, unit.reshape(self.out.shape), retain_graph=True, allow_unused=True
            )
            rows.append(
                torch.stack(
                    [torch.real(grad.to_dense().conj() * d if grad is not None else d * 0).sum() for d in directions]
                )
            )
        return torch.stack([self.split(row) for row in torch.stack(rows, 1).reshape(-1, *self.out.shape)])

    def chosen(self, size: int) -> Tensor:
        """The entries that are compared, of so many."""
        count = min(self.entries, size)
        return torch.arange(count) * (size - 1) // max(1, count - 1)

    def columns(self, name: str) -> Tensor:
        """Of the Jacobian of the output, at the chosen entries of a parameter, ``[k, n, d]``."""
        if name not in self._columns:
            parameter = self.parameters[name]
            self._columns[name] = self.along(parameter, units(parameter, self.chosen(parameter.numel())))
        return self._columns[name]

    def product(self, column: Tensor) -> Tensor:
        """The Hessian of the loss times ``[n, d]``."""
        if not self._slope.requires_grad:
            return torch.zeros_like(column)
        (found,) = torch.autograd.grad(
            self._slope, self._point, self.join(column), retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(column) if found is None else self.split(found)

    def bend(self, name: str, weights: Tensor) -> Tensor:
        """The gradient's derivative, all but that of the loss: at the chosen entries, samples weighed, ``[k, k]``."""
        parameter = self.parameters[name]
        slope = self.pulled(self.slope * weights[:, None], parameter)
        chosen, rows = self.chosen(parameter.numel()), []
        for unit in units(parameter, chosen):
            found = None
            if slope is not None and slope.requires_grad:
                try:
                    (found,) = torch.autograd.grad(slope, parameter, unit, retain_graph=True, allow_unused=True)
                except RuntimeError as error:
                    raise NoTruth(f"PyTorch has no second derivative ({error})") from error
            rows.append((torch.zeros_like(parameter) if found is None else found.to_dense()).flatten())
        return at(torch.stack(rows), chosen)

    @cached_property
    def users(self) -> dict[Node, list[tuple[Node, int, int]]]:
        """For each function of the graph those that take an output of it: at which place, and which output."""
        found: dict[Node, list[tuple[Node, int, int]]] = {}
        pending, seen = [get_gradient_edge(self.out).node], set()
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                for place, (given, number) in enumerate(node.next_functions):
                    if given is not None:
                        found.setdefault(given, []).append((node, place, number))
                        pending.append(given)
        return found

    @cached_property
    def norms(self) -> Tensor:
        """Of each sample's gradient with respect to all parameters, ``[n]``."""
        squares = []
        for number in range(self.n):
            own = self.join(self.of_sample(self.slope, number))
            grads = torch.autograd.grad(
                self.out, list(self.parameters.values()), own, retain_graph=True, allow_unused=True
            )
            squares.append(sum(grad.to_dense().abs().square().sum() for grad in grads if grad is not None))
        return torch.stack([torch.as_tensor(square) for square in squares]).sqrt()

    @cached_property
    def terms(self) -> Tensor:
        """The gradients of the loss's terms, ``[n, d]``, times the square roots of their weights, which are equal."""
        reduction, weight = getattr(self.lossfunc, "reduction", None), getattr(self.lossfunc, "weight", None)
        if reduction not in ("mean", "sum") or weight is not None:
            raise NoTruth("the weights of the loss's terms are not known")
        point = self.out.detach().requires_grad_()
        self.lossfunc.reduction = "sum"  # type: ignore[assignment]
        (total,) = torch.autograd.grad(self.lossfunc(point, self.targets), point)
        self.lossfunc.reduction = reduction
        number = total.norm() / self._slope.detach().norm()
        return self.slope * number.sqrt()


def units(like: Tensor, entries: Tensor) -> list[Tensor]:
    """Tensors of a shape that are one at an entry, and zero elsewhere; then, of complex ones, ``1j``."""
    found = like.new_zeros(len(entries), like.numel())
    found[torch.arange(len(entries)), entries] = 1
    found = torch.cat([found, 1j * found]) if like.is_complex() else found
    return list(found.reshape(-1, *like.shape))


def at(flat: Tensor, entries: Tensor) -> Tensor:
    """The entries along the last axis, in the order of ``units``: of complex ones the real parts, then the others."""
    found = flat[..., entries]
    return torch.cat([found.real, found.imag], -1) if found.is_complex() else found
