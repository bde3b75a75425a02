"""What is true of Kronecker factors of averaged curvatures: a recursion over explicit Jacobians of the modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Sequential

from backpack.extensions import KFLR
from backpack.inspection.verification.plain import NoTruth, Plain
from backpack.inspection.verification.truths import Truth

LARGEST = 2**9
"""Entries of a sample up to which the curvature in an output is formed."""

MODIFICATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "average hessian": lambda eigenvalues: eigenvalues,
    "average pch-abs": torch.abs,
    "average pch-clip": torch.relu,
}
"""What becomes of the eigenvalues of modules' second derivatives, by the strategy; else these are left out."""


class Quadratic(Module):
    """Half the mean over samples of ``f^T H f``, so that ``H`` over their number is the Hessian of each."""

    def __init__(self, curvature: Tensor) -> None:
        super().__init__()
        self.curvature = curvature

    def forward(self, out: Tensor, _: Any) -> Tensor:
        """Of outputs ``[n, ...]``."""
        rows = out.flatten(1)
        return ((rows @ self.curvature) * rows).sum() / 2 / len(rows)


@dataclass(eq=False)
class Stage:
    """A module of the chain, its input, and the mean curvature ``[d, d]`` in its output.

    It stands for the run of ``KFLR`` on this module: ``extension``, ``drawn``.
    """

    module: Module
    x: Tensor
    curvature: Tensor
    entries: int
    extension: Any

    def __post_init__(self) -> None:
        if self.x.is_floating_point():
            self.x = self.x.detach().requires_grad_()

        def forward(module: Module, batch: Any) -> tuple[Tensor, None]:
            return module(batch[0].clone()), None  # it may work in place

        self.plain = Plain(self.module, Quadratic(self.curvature), (self.x, None), forward, self.entries)

    def truth(self, name: str) -> Truth:
        """Of a parameter of the module."""
        return Truth(self.plain, name, self, torch.arange(len(self.x)))

    @cached_property
    def drawn(self) -> Tensor:
        """Columns ``[v, n, d]`` of a root."""
        values, vectors = torch.linalg.eigh(self.curvature)
        if bool((values < -1e-10 * values.abs().max()).any()):
            raise NoTruth("a curvature with negative eigenvalues has no root")
        root = (vectors * values.clamp(min=0).sqrt()).T / len(self.x) ** 0.5
        return root.unsqueeze(1).expand(-1, len(self.x), -1)

    def redrawn(self, count: int) -> list[dict[str, Any]]:
        """Nothing is drawn here."""
        return []

    def before(self, grad: Tensor, modify: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
        """The curvature in the input, and the gradient there, of the gradient ``[n, d]`` in the output."""
        size = self.x[0].numel()
        if size > LARGEST or not self.x.is_floating_point():
            raise NoTruth(f"a module's input has more than {LARGEST} entries, or is not real")
        units = torch.eye(size, dtype=self.x.dtype).reshape(size, 1, *self.x.shape[1:]).expand(-1, *self.x.shape)
        columns = self.plain.along(self.x, list(units))
        curvature = self.truth("").gram(columns).sum(0)
        pulled = self.plain.pulled(grad, self.x)
        if pulled is None:
            return curvature, torch.zeros_like(self.x).flatten(1)
        if modify is not None and pulled.requires_grad:
            rows = [
                torch.autograd.grad(entry, self.x, retain_graph=True, allow_unused=True)[0]
                for entry in pulled.flatten(1).sum(0)
            ]
            second = torch.stack([torch.zeros_like(self.x) if row is None else row for row in rows]).flatten(2).sum(1)
            values, vectors = torch.linalg.eigh(second)
            curvature = curvature + (vectors * modify(values)) @ vectors.T
        return curvature, pulled.detach().flatten(1)


def stage_of(truth: Truth) -> tuple[Stage, str]:
    """The module of the chain that has the parameter, and the parameter's name there."""
    if truth.run not in truth.plain.stages:
        truth.plain.stages[truth.run] = dict(_stages(truth))
    stages: dict[str, Stage] = truth.plain.stages[truth.run]
    for name, stage in stages.items():
        if not name or truth.name.startswith(name + "."):
            return stage, truth.name[len(name) + 1 if name else 0 :]
    raise NoTruth("it is before a module whose input is too large")


def _stages(truth: Truth) -> Iterator[tuple[str, Stage]]:
    """From the last module on, with their names."""
    plain, rows = truth.plain, truth.rows
    inputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach().clone()}))
        for name, module in _chain(plain.model, "")
    ]
    try:
        plain.forward(plain.model, plain.batch)
    finally:
        for handle in handles:
            handle.remove()
    size = plain.slope.shape[1]
    if size > LARGEST:
        raise NoTruth(f"the output has more than {LARGEST} entries")
    units = torch.eye(size, dtype=plain.slope.dtype).unsqueeze(1).expand(-1, plain.n, -1)
    curvature, grad = truth.gram(units).sum(0), plain.slope[rows]
    modify = MODIFICATIONS.get(truth.extension.backprop)
    for name, module in reversed(list(_chain(plain.model, ""))):
        extension = KFLR(approx=truth.extension.approx)
        stage = Stage(module, inputs[name][rows], curvature, plain.entries, extension)
        yield name, stage
        try:
            curvature, grad = stage.before(grad, modify)
        except NoTruth:
            return


def _chain(module: Module, name: str) -> Iterator[tuple[str, Module]]:
    """What a sequential module runs one after the other."""
    if not isinstance(module, Sequential):
        yield name, module
        return
    for own, child in module.named_children():
        yield from _chain(child, f"{name}.{own}" if name else own)
