"""True Kronecker factors of averaged curvatures: a recursion over explicit Jacobians of the modules in a chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Sequential

from backpack.extensions import KFLR
from backpack.inspection.verification.checks import Truth
from backpack.inspection.verification.plain_autograd import NotCompared, PlainAutograd, gradients

LARGEST = 2**9
"""The most entries of a sample's input or output whose curvature is formed."""

MODIFICATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "average hessian": lambda eigenvalues: eigenvalues,
    "average pch-abs": torch.abs,
    "average pch-clip": torch.relu,
}
"""What replaces the eigenvalues of modules' second derivatives, by strategy; the others leave these derivatives out."""


class Quadratic(Module):
    """A loss whose Hessian is known: half the mean over samples of ``f^T H f``."""

    def __init__(self, curvature: Tensor) -> None:
        super().__init__()
        self.curvature = curvature

    def forward(self, out: Tensor, _: Any) -> Tensor:
        """The loss of outputs ``[n, ...]``."""
        rows = out.flatten(1)
        return ((rows @ self.curvature) * rows).sum() / 2 / len(rows)


@dataclass(eq=False)
class Stage:
    """A module of the chain, its input, and the mean curvature ``[d, d]`` in its output.

    Its factors are those that ``KFLR``, the ``extension``, computes for the module alone and a ``Quadratic`` loss.
    """

    module: Module
    x: Tensor
    curvature: Tensor
    entries: int
    extension: Any
    found: dict[str, Any] = field(default_factory=dict)
    """Results are looked up elsewhere."""

    def __post_init__(self) -> None:
        if self.x.is_floating_point():
            self.x = self.x.detach().requires_grad_()

        def forward(module: Module, batch: Any) -> tuple[Tensor, None]:
            return module(batch[0].clone()), None  # it may work in place

        self.plain = PlainAutograd(self.module, Quadratic(self.curvature), (self.x, None), forward, self.entries)

    def truth(self, name: str) -> Truth:
        """The true values for a parameter of the module."""
        return Truth(self.plain, name, self, torch.arange(len(self.x)))

    @cached_property
    def columns(self) -> Tensor:
        """The columns ``[v, n, d]`` of a root of the curvature."""
        values, vectors = torch.linalg.eigh(self.curvature)
        if bool((values < -1e-10 * values.abs().max()).any()):
            raise NotCompared("a curvature with negative eigenvalues has no root")
        root = (vectors * values.clamp(min=0).sqrt()).T / len(self.x) ** 0.5
        return root.unsqueeze(1).expand(-1, len(self.x), -1)

    def redrawn(self, count: int) -> list[dict[str, Any]]:
        """There are no other results: nothing is drawn."""
        return []

    def before(self, grad: Tensor, modify: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
        """The mean curvature ``[d, d]`` in the input, and the gradient ``[n, d]`` there, given that in the output."""
        size = self.x[0].numel()
        if size > LARGEST or not self.x.is_floating_point():
            raise NotCompared(f"a module's input has more than {LARGEST} entries, or is not real")
        units = torch.eye(size, dtype=self.x.dtype).reshape(size, 1, *self.x.shape[1:]).expand(-1, *self.x.shape)
        columns = self.plain.push_forward(self.x, list(units))
        curvature = self.truth("").curvature_along(columns).sum(0)
        pulled = self.plain.pull_back(grad, self.x)
        if pulled is None:
            return curvature, torch.zeros_like(self.x).flatten(1)
        if modify is not None and pulled.requires_grad:
            rows = [gradients(entry, [self.x])[0] for entry in pulled.flatten(1).sum(0)]
            values, vectors = torch.linalg.eigh(torch.stack(rows).flatten(2).sum(1))
            curvature = curvature + (vectors * modify(values)) @ vectors.T
        return curvature, pulled.detach().flatten(1)


def stage_of(truth: Truth) -> tuple[Stage, str]:
    """The module of the chain that has the parameter, and the parameter's name there."""
    stages: dict[str, Stage] = truth.plain.once(("stages", truth.computed), lambda: dict(_stages(truth)))
    for name, stage in stages.items():
        if not name or truth.name.startswith(f"{name}."):
            return stage, truth.name.removeprefix(f"{name}.")
    raise NotCompared("it is before a module whose input is too large")


def _stages(truth: Truth) -> Iterator[tuple[str, Stage]]:
    """The modules of the chain with their names, from the last one on."""
    plain, samples, chain = truth.plain, truth.samples, list(_chain(truth.plain.model, ""))
    inputs = _inputs_of(chain, plain)
    size = plain.loss_gradient.shape[1]
    if size > LARGEST:
        raise NotCompared(f"the output has more than {LARGEST} entries")
    units = torch.eye(size, dtype=plain.loss_gradient.dtype).unsqueeze(1).expand(-1, plain.n, -1)
    curvature, grad = truth.curvature_along(units).sum(0), plain.loss_gradient[samples]
    modify = MODIFICATIONS.get(truth.extension.backprop)
    for name, module in reversed(chain):
        extension = KFLR(approx=truth.extension.approx)
        stage = Stage(module, inputs[name][samples], curvature, plain.entries, extension)
        yield name, stage
        try:
            curvature, grad = stage.before(grad, modify)
        except NotCompared:
            return


def _inputs_of(chain: list[tuple[str, Module]], plain: PlainAutograd) -> dict[str, Tensor]:
    """The inputs of these modules, from one more run of the model."""
    inputs: dict[str, Tensor] = {}

    def note(name: str, _: Module, args: Any) -> None:
        inputs[name] = args[0].detach().clone()

    with ExitStack() as stack:
        for name, module in chain:
            stack.enter_context(module.register_forward_pre_hook(partial(note, name)))
        plain.forward(plain.model, plain.batch)
    return inputs


def _chain(module: Module, name: str) -> Iterator[tuple[str, Module]]:
    """The modules that a sequential module runs one after the other, with their names."""
    if not isinstance(module, Sequential):
        yield name, module
        return
    for own, child in module.named_children():
        yield from _chain(child, f"{name}.{own}" if name else own)
