"""The derivatives of a model and its loss for one batch, by plain autograd: what results are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Module, RNNBase
from torch.nn.utils.rnn import pad_sequence

from backpack.curvature.replacements import RightTwice
from backpack.dataset.batch_contents import samples_of
from backpack.samples import SampleIds
from backpack.torch_internals import dtype_at, shape_at

LARGEST_LOOP = 2**10
"""The most entries of an output for which one backward pass per entry is run."""

LARGEST_KEPT = 2**24
"""The most entries of individual gradients that are kept for further parameters."""

T = TypeVar("T")
Forward = Callable[[Module, Any], tuple[Tensor, Any]]
Place = Tensor | GradientEdge
"""A tensor of a graph: a parameter, or what an edge stands for."""


class NotCompared(Exception):
    """The reason why a result is not compared."""


@dataclass(eq=False)
class PlainAutograd:
    """The graph of one forward pass, and derivatives along it.

    Tensors of the shape of the output are written ``[n, d]``: sample by sample, flattened. ``batch`` holds inputs and
    targets, and ``forward`` makes the loss's two arguments of them. ``entries`` of each tensor are compared.
    """

    model: Module
    lossfunc: Module
    batch: tuple[Any, Any]
    forward: Forward
    entries: int
    ids: SampleIds | None = None
    _kept: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with RightTwice():
            self.out, self.targets = self.forward(self.model, self.batch)
        if not isinstance(self.out, Tensor):
            raise TypeError(f"verify() needs a tensor that the loss is called with, got {type(self.out).__name__}.")
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._find_samples()
        self._point = self.out.detach().requires_grad_()
        loss = self.lossfunc(self._point, self.targets)
        (self._gradient,) = torch.autograd.grad(loss, self._point, create_graph=True)
        self.loss_gradient = self.split(self._gradient.detach())

    def _find_samples(self) -> None:
        self.axis, self.rows = 0, list[Tensor]()
        shape = list(self.out.shape)
        if self.ids is not None:
            self.n = self.ids.count
            if not self.ids.fits(shape):
                raise ValueError(
                    f"sample_ids, of shape {list(self.ids.shape)}, does not fit what the loss is called with, of shape "
                    f"{shape}: give one number for each entry along its first axis, or along its first axes."
                )
            numbers = self.ids.numbers.flatten()
            self._entries = len(numbers)
            self.rows = [(numbers == number).nonzero().flatten() for number in range(self.n)]
            return
        self.axis = axis = int(isinstance(self.model, RNNBase) and not self.model.batch_first)
        self.n = samples_of(self.batch[0], axis)
        if len(shape) <= axis or shape[axis] % self.n or (axis and shape[axis] != self.n):
            raise ValueError(
                f"The {self.n} samples cannot be told apart in the model's output of shape {shape}: let them be "
                f"counted by its first axis."
            )

    def once(self, key: Any, compute: Callable[[], T]) -> T:
        """What ``compute`` returned when it was first called for this key."""
        if key not in self._kept:
            self._kept[key] = compute()
        value: T = self._kept[key]
        return value

    @property
    def given_ids(self) -> Any:
        """The samples' numbers, as ``backpack`` takes them."""
        return None if self.ids is None else (self.ids.numbers, self.ids.count)

    def split(self, tensor: Tensor) -> Tensor:
        """Sort the entries of a tensor of the output's shape by samples: ``[n, d]``, padded with zeros."""
        if self.rows:
            entries = tensor.reshape(self._entries, -1)
            return pad_sequence([entries[own] for own in self.rows], batch_first=True).flatten(1)
        return tensor.movedim(self.axis, 0).reshape(self.n, -1)

    def join(self, tensor: Tensor) -> Tensor:
        """Undo ``split``; entries that belong to no sample are zero."""
        if self.rows:
            found = tensor.new_zeros(self._entries, self.out.numel() // self._entries)
            for own, row in zip(self.rows, tensor, strict=True):
                found = found.index_copy(0, own, row.reshape(-1, found.shape[1])[: len(own)])
            return found.reshape(self.out.shape)
        return tensor.reshape(self.out.movedim(self.axis, 0).shape).movedim(0, self.axis)

    def pull_back(self, cotangent: Tensor, at: Place) -> Tensor | None:
        """The cotangent at a place of the graph, of one ``[n, d]`` at the output; ``None`` if none arrives."""
        (grad,) = torch.autograd.grad(
            self.out, at, self.join(cotangent), retain_graph=True, allow_unused=True, create_graph=True
        )
        return None if grad is None else grad.to_dense()

    def gradient(self, name: str, cotangent: Tensor) -> Tensor:
        """The gradient of a parameter for a cotangent ``[n, d]`` of the output."""
        found = self.pull_back(cotangent, self.parameters[name])
        return torch.zeros_like(self.parameters[name]) if found is None else found.detach()

    def only_sample(self, number: int, cotangent: Tensor) -> Tensor:
        """A cotangent ``[n, d]`` with zeros for all samples but one."""
        own = torch.zeros_like(cotangent)
        own[number] = cotangent[number]
        return own

    def push_forward(self, at: Place, directions: Sequence[Tensor]) -> Tensor:
        """The derivatives of the output as a tensor of the graph moves along ``k`` directions, ``[k, n, d]``.

        Pulling back is linear in the cotangent; its derivative by the cotangent pushes forward. Where a function on the
        way has no second derivative, a loop over the output's entries does it.
        """
        cotangent = torch.zeros(self.loss_gradient.shape, dtype=self.out.dtype, requires_grad=True)
        pulled = self.pull_back(cotangent, at)
        if pulled is None:
            return cotangent.detach().expand(len(directions), -1, -1)
        if not pulled.requires_grad:
            return self._push_entry_by_entry(at, directions)
        try:
            moved = [gradients(pulled, [cotangent], d)[0] if d.any() else zeros_at(cotangent) for d in directions]
        except RuntimeError:
            return self._push_entry_by_entry(at, directions)
        return torch.stack(moved)

    def _push_entry_by_entry(self, at: Place, directions: Sequence[Tensor]) -> Tensor:
        size = self.out.numel()
        if size > LARGEST_LOOP:
            raise NotCompared(
                f"a function has no second derivative, and the output has more than {LARGEST_LOOP} entries"
            )
        entries = []
        for unit in torch.eye(size, dtype=self.out.dtype):
            (grad,) = gradients(self.out, [at], unit.reshape(self.out.shape))
            entries.append(torch.stack([torch.real(grad.conj() * direction).sum() for direction in directions]))
        return torch.stack([self.split(row) for row in torch.stack(entries, 1).reshape(-1, *self.out.shape)])

    def chosen(self, size: int) -> Tensor:
        """The places of the entries that are compared, among ``size`` of them."""
        count = min(self.entries, size)
        return torch.arange(count) * (size - 1) // max(1, count - 1)

    def individual_gradient(self, name: str, number: int) -> Tensor:
        """The gradient of one sample; those of all parameters come from one backward pass, if they can be kept."""
        own = self.only_sample(number, self.loss_gradient)
        if self._size > LARGEST_KEPT:
            return self.gradient(name, own)

        def of_all() -> dict[str, Tensor]:
            found = gradients(self.out, list(self.parameters.values()), self.join(own))
            return dict(zip(self.parameters, found, strict=True))

        return self.once(("gradient", number), of_all)[name]

    @cached_property
    def _size(self) -> int:
        """How many entries the gradients of all samples have."""
        return self.n * sum(parameter.numel() for parameter in self.parameters.values())

    @cached_property
    def _jacobian(self) -> dict[str, Tensor]:
        """The output's derivatives by the chosen entries of each parameter, from one backward pass for each entry."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.parameters}
        for unit in torch.eye(self.out.numel(), dtype=self.out.dtype):
            grads = gradients(self.out, list(self.parameters.values()), unit.reshape(self.out.shape))
            for (name, parameter), grad in zip(self.parameters.items(), grads, strict=True):
                found[name].append(at_entries(grad.flatten(), self.chosen(parameter.numel())))
        rows = {name: torch.stack(own, 1).reshape(-1, *self.out.shape) for name, own in found.items()}
        return {name: torch.stack([self.split(row) for row in own]) for name, own in rows.items()}

    def jacobian_columns(self, name: str) -> Tensor:
        """The output's derivatives by the chosen entries of a parameter, ``[k, n, d]``.

        Backward passes for all entries of the output are shared by the parameters, so that deep models take the fewer.
        """
        parameter = self.parameters[name]
        if not self.out.is_complex() and self.out.numel() <= min(LARGEST_LOOP, len(self.parameters)):
            return self._jacobian[name]
        return self.once(
            ("jacobian", name), lambda: self.push_forward(parameter, units(parameter, self.chosen(parameter.numel())))
        )

    def hessian_product(self, column: Tensor) -> Tensor:
        """The Hessian of the loss, with respect to the output, times ``[n, d]``."""
        return self.split(gradients(self._gradient, [self._point], self.join(column))[0])

    def residual(self, name: str, weights: Tensor) -> Tensor:
        """The Hessian at a parameter's chosen entries, less its GGN part, ``[k, k]``.

        This is the model's second derivative, weighed by the gradient in the output and by ``weights`` of samples.
        """
        parameter = self.parameters[name]
        chosen, pulled = (
            self.chosen(parameter.numel()),
            self.pull_back(self.loss_gradient * weights[:, None], parameter),
        )
        if pulled is None:
            pulled = torch.zeros_like(parameter)
        try:
            rows = [gradients(pulled, [parameter], unit)[0].flatten() for unit in units(parameter, chosen)]
        except RuntimeError as error:
            raise NotCompared(f"PyTorch has no second derivative ({error})") from error
        return at_entries(torch.stack(rows), chosen)

    @cached_property
    def users(self) -> dict[Node, list[tuple[Node, int, int]]]:
        """The nodes that take an output of each node, with the place at which they take it, and the output's number."""
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
    def gradient_squares(self) -> dict[str, Tensor]:
        """The squared norm of each sample's gradient with respect to each parameter, ``[n]``."""
        rows = []
        for number in range(self.n):
            own = self.join(self.only_sample(number, self.loss_gradient))
            grads = gradients(self.out, list(self.parameters.values()), own)
            rows.append(torch.stack([grad.abs().square().sum() for grad in grads]))
        return dict(zip(self.parameters, torch.stack(rows).T, strict=True))

    @cached_property
    def empirical_column(self) -> Tensor:
        """The gradients of the loss's terms, ``[n, d]``, times the square roots of their weights, which are equal."""
        reduction, weight = getattr(self.lossfunc, "reduction", None), getattr(self.lossfunc, "weight", None)
        if reduction not in ("mean", "sum") or weight is not None:
            raise NotCompared("the weights of the loss's terms are not known")
        point = self.out.detach().requires_grad_()
        self.lossfunc.reduction = "sum"  # type: ignore[assignment]
        (total,) = torch.autograd.grad(self.lossfunc(point, self.targets), point)
        self.lossfunc.reduction = reduction
        number = total.norm() / self._gradient.detach().norm()
        return self.loss_gradient * number.sqrt()


def gradients(of: Any, by: Sequence[Any], cotangent: Any = None, create_graph: bool = False) -> list[Tensor]:
    """As ``torch.autograd.grad``, which keeps the graph; zeros for all that ``of`` does not depend on."""
    found: Sequence[Tensor | None] = [None] * len(by)
    if not isinstance(of, Tensor) or of.requires_grad:
        found = torch.autograd.grad(of, by, cotangent, retain_graph=True, create_graph=create_graph, allow_unused=True)
    return [zeros_at(place) if grad is None else grad.to_dense() for place, grad in zip(by, found, strict=True)]


def zeros_at(place: Place) -> Tensor:
    """Zeros in the shape of a tensor of a graph."""
    if isinstance(place, Tensor):
        return torch.zeros_like(place)
    return torch.zeros(shape_at(place), dtype=dtype_at(place))


def units(like: Tensor, entries: Tensor) -> list[Tensor]:
    """Tensors of a shape that are one at an entry and zero elsewhere; for complex ones, also ``1j`` at each entry."""
    found = like.new_zeros(len(entries), like.numel())
    found[torch.arange(len(entries)), entries] = 1
    found = torch.cat([found, 1j * found]) if like.is_complex() else found
    return list(found.reshape(-1, *like.shape))


def at_entries(flat: Tensor, entries: Tensor) -> Tensor:
    """The entries along the last axis, in the order of ``units``: real parts, then imaginary ones if there are any."""
    found = flat[..., entries]
    return torch.cat([found.real, found.imag], -1) if found.is_complex() else found
