"""Gauss-Newton matrices and Hessians of single samples, from explicit Jacobians and Hessians of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .autograd import gradients, individual_gradients, loss_hessian


class WrittenOut(TorchFunctionMode):
    """PyTorch's second derivatives of weight normalization are wrong."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._weight_norm:
            return func(*args, **(kwargs or {}))
        v, g, dim = (*args, 0)[:3]
        axes = [axis for axis in range(v.dim()) if axis != dim % v.dim() or dim < 0]
        return v * g / v.square().sum(axes, keepdim=True).sqrt()


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """The other kernels of attention have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH), WrittenOut():
        yield


def flat(tensor: Tensor, lead: int = 0) -> Tensor:
    """``[*lead, real entries]``: a complex number is two real ones, side by side."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.flatten(lead) if tensor.dim() > lead else tensor.unsqueeze(-1)


def by_entries(tensor: Tensor, p: Tensor) -> Tensor:
    """``[..., real entries]`` as ``[..., *p]``, where both parts of a complex entry add up."""
    if p.is_complex():
        tensor = tensor.unflatten(-1, (-1, 2)).sum(-1)
    return tensor.unflatten(-1, p.shape or (1,)).reshape(*tensor.shape[:-1], *p.shape)


def owners_along(tensor: Tensor, axis: int = 0) -> Tensor:
    """The owner of each entry, where the samples lie along an axis."""
    shape = [1] * tensor.dim()
    shape[axis] = tensor.shape[axis]
    return torch.arange(tensor.shape[axis]).reshape(shape).expand(tensor.shape)


class Truth:
    """Gradients and curvature of each sample, by name of the parameter.

    The loss is the sum of ``values[k](inputs[k])``. Entries of an input belong to the samples ``owners[k]``, to none
    where that is -1; if nothing is said, rows are samples.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Tensor],
        values: Sequence[Callable[[Tensor], Tensor]],
        owners: Sequence[Tensor] | None = None,
        n: int | None = None,
    ) -> None:
        self.model = model
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.leaves = list(self.parameters.values())
        self.inputs, self.values = inputs, values
        self.owners = [owners_along(z) for z in inputs] if owners is None else owners
        self.n = max(int(owner.max()) + 1 for owner in self.owners) if n is None else n
        self.cotangents = []
        for z, value in zip(inputs, values, strict=True):
            point = z.detach().requires_grad_()
            self.cotangents.append(torch.autograd.grad(value(point), point)[0])

    def _by_name(self, rows: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack(own) for name, own in zip(self.parameters, zip(*rows, strict=True), strict=True)}

    @cached_property
    def grads(self) -> dict[str, Tensor]:
        """``[n, *p]``."""
        rows = [[torch.zeros_like(p) for p in self.leaves] for _ in range(self.n)]
        for z, g, owner in zip(self.inputs, self.cotangents, self.owners, strict=True):
            for k in range(self.n) if z.requires_grad else ():
                own = gradients(z, self.leaves, g * (owner == k))
                rows[k] = [a + b for a, b in zip(rows[k], own, strict=True)]
        return self._by_name(rows)

    @cached_property
    def loss_hessians(self) -> list[Tensor]:
        """Of each input, in which no two samples have an entry in common."""
        found = []
        for z, value, owner in zip(self.inputs, self.values, map(torch.flatten, self.owners), strict=True):
            found.append(loss_hessian(value, z))
            assert not found[-1][owner[:, None] != owner].any(), "the loss couples samples"
        return found

    @cached_property
    def ggn(self) -> dict[str, Tensor]:
        """Of each sample and parameter a block, ``[n, P, P]``."""
        sizes = {name: flat(p).numel() for name, p in self.parameters.items()}
        real = self.loss_hessians[0]
        found = {name: real.new_zeros(self.n, size, size) for name, size in sizes.items()}
        for z, owner, H in zip(self.inputs, map(torch.flatten, self.owners), self.loss_hessians, strict=True):
            if not z.requires_grad:
                continue
            for name, J in zip(found, individual_gradients(z.flatten(), self.leaves), strict=True):
                J = flat(J, 1)
                for n, own in enumerate([owner == n for n in range(self.n)]):
                    found[name][n] += J[own].T @ H[own][:, own] @ J[own]
        return found

    @cached_property
    def diag_ggn(self) -> dict[str, Tensor]:
        """``[n, *p]``."""
        return {name: by_entries(b.diagonal(dim1=1, dim2=2), self.parameters[name]) for name, b in self.ggn.items()}

    @cached_property
    def terms(self) -> list[list[Tensor]]:
        """Gradients of each sample's term of the loss, with their graphs: no other sample's inputs of losses vary."""
        found = []
        for k in range(self.n):
            own = [torch.where(o == k, z, z.detach()) for z, o in zip(self.inputs, self.owners, strict=True)]
            values = [value(z) for z, value in zip(own, self.values, strict=True) if z.requires_grad]
            found.append(gradients(torch.stack(values).sum(), self.leaves, create_graph=True))
        return found

    @cached_property
    def hessian(self) -> dict[str, Tensor]:
        """Of each sample and real parameter a block, ``[n, P, P]``."""
        blocks = [[block(g, p) for g, p in zip(term, self.leaves, strict=True)] for term in self.terms]
        return self._by_name(blocks)

    @cached_property
    def diag_hessian(self) -> dict[str, Tensor]:
        """``[n, *p]``."""
        return {name: by_entries(b.diagonal(dim1=1, dim2=2), self.parameters[name]) for name, b in self.hessian.items()}

    def entries_of_the_hessian(self, name: str, places: Tensor) -> Tensor:
        """Some of the diagonal of each sample, ``[n, entries]``."""
        number, p = list(self.parameters).index(name), self.parameters[name]
        return torch.stack([entries(term[number], p, places) for term in self.terms])

    def hessian_times(self, name: str, vector: Tensor) -> Tensor:
        """Of each sample, ``[n, *p]``."""
        number, p = list(self.parameters).index(name), self.parameters[name]
        return torch.stack([second(term[number], p, vector) for term in self.terms])


def second(gradient: Tensor, parameter: Tensor, vector: Tensor | None = None) -> Tensor:
    """The derivative of a gradient, or of one of its entries, times a vector."""
    if not gradient.requires_grad:
        return torch.zeros_like(parameter)
    return gradients(gradient, [parameter], vector)[0]


def block(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Of the Hessian, ``[P, P]``, from a gradient with its graph."""
    return torch.stack([second(entry, parameter).flatten() for entry in gradient.flatten()])


def entries(gradient: Tensor, parameter: Tensor, places: Tensor) -> Tensor:
    """Some of the diagonal of the Hessian, ``[entries]``, from a gradient with its graph."""
    return torch.stack([second(gradient.flatten()[k], parameter).flatten()[k] for k in places])


def hessian_blocks(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    """Of each parameter, for a function that computes the loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with twice_differentiable():
        value = loss()
    return [block(g, p) for g, p in zip(gradients(value, parameters, create_graph=True), parameters, strict=True)]


def hessian_diagonals(model: nn.Module, X: Tensor, lossfunc: nn.Module, y: Tensor) -> list[Tensor]:
    """Of each parameter the samples', ``[n, *p]``, each from a batch of its own; the loss averages over samples."""
    parameters, rows = [p for p in model.parameters() if p.requires_grad], []
    for n in range(len(X)):
        found = hessian_blocks(model, lambda n=n: lossfunc(model(X[n : n + 1]), y[n : n + 1]) / len(X))
        rows.append([h.diagonal().reshape(p.shape) for h, p in zip(found, parameters, strict=True)])
    return [torch.stack(own) for own in zip(*rows, strict=True)]


def hessian_entries(
    losses: Sequence[Callable[[], Tensor]], parameters: Sequence[Tensor], most: int = 4
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each parameter a few entries of the diagonal of the Hessian of each loss, and where: ``[n, k]``, ``[k]``.

    ``losses``: a function for each sample that computes its term of the loss.
    """
    places, rows = [torch.randperm(p.numel())[:most] for p in parameters], []
    for loss in losses:
        with twice_differentiable():
            value = loss()
        grads = gradients(value, parameters, create_graph=True)
        rows.append([entries(g, p, where) for g, p, where in zip(grads, parameters, places, strict=True)])
    return [torch.stack(own) for own in zip(*rows, strict=True)], places


def jacobians(
    out: Tensor, lossfunc: Callable[..., Tensor], y: Any, n: int, parameters: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Per parameter the samples' GGN diagonals ``[n, *p]``, the Jacobian of all, and the loss Hessian.

    For parameters of which blocks are too large. The samples' entries of the output follow one another.
    """
    hessian = loss_hessian(lambda o: lossfunc(o, y), out)
    blocks = [flat(rows, 1) for rows in individual_gradients(out.flatten(), parameters)]
    owner = torch.arange(out.numel()) // (out.numel() // n)
    diagonals = []
    for jacobian, parameter in zip(blocks, parameters, strict=True):
        own = [jacobian * (owner == s)[:, None] for s in range(n)]
        diagonals.append(torch.stack([(j * (hessian @ j)).sum(0).reshape(parameter.shape) for j in own]))
    return diagonals, torch.cat(blocks, 1), hessian


def explicit(
    model: Callable[[Any], Tensor], X: Any, lossfunc: Callable[..., Tensor], y: Any, n: int
) -> tuple[list[Tensor], Tensor]:
    """Per parameter the samples' GGN diagonals ``[n, *p]``, and the whole GGN."""
    diagonals, jacobian, hessian = jacobians(model(X), lossfunc, y, n, list(model.parameters()))
    return diagonals, jacobian.T @ hessian @ jacobian


def ggn_blocks(model: nn.Module, X: Any, lossfunc: Callable[..., Tensor], y: Any) -> dict[Tensor, Tensor]:
    """Of each parameter that of all samples, ``[P, P]``."""
    out, parameters = model(X), list(model.parameters())
    hessian = loss_hessian(lambda o: lossfunc(o, y), out)
    rows = [flat(J, 1) for J in individual_gradients(out.flatten(), parameters)]
    return {p: J.T @ hessian @ J for p, J in zip(parameters, rows, strict=True)}
