"""One extension, computed on the model to verify."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel

from backpack.context import backpack, extend, unextend
from backpack.extensions import SqrtGGNExact, SqrtGGNMC
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.inspection.verification.checks import SIGMAS
from backpack.inspection.verification.plain_autograd import PlainAutograd

SEED = 0
"""Seed of what the model draws in its forward passes, so that all draw the same."""

LARGEST_DRAW = 2**22
"""Entries of columns that are drawn to estimate their second moment."""

Shifted = Callable[[Tensor], Tensor]
"""A function that adds a parameter to the model's output."""


class Shift(Module):
    """Adds a parameter of zeros to what samples have in common, so that it receives the cotangents that pass here."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.shift = Parameter(torch.zeros_like(like.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """The input, since the parameter is zero."""
        return x + self.shift


@dataclass(eq=False)
class Results:
    """The results of one extension by name of the parameters, or the error with which it refused to compute them."""

    plain: PlainAutograd
    extension: BackpropExtension
    _redrawn: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.error: Exception | None = None
        try:
            self.found = self._computed()
        except Exception as error:
            self.error = error

    def _computed(self, seed: int | None = None) -> dict[str, Any]:
        self._backward(self.extension, lambda out: out, seed)
        savefield, named = self.extension.savefield, self.plain.model.named_parameters()
        return {name: vars(p).pop(savefield) for name, p in named if savefield in vars(p)}

    def _backward(self, extension: BackpropExtension, shifted: Shifted, seed: int | None = None) -> None:
        """Run the model and a backward pass, with another ``seed`` for the backward pass if one is given."""
        plain, all_kernels = self.plain, sdpa_kernel(list(SDPBackend.__members__.values()))
        extend(plain.model), extend(plain.lossfunc)
        try:
            with torch.random.fork_rng(), all_kernels, backpack(extension, sample_ids=plain.given_ids):
                torch.manual_seed(SEED)
                out, targets = plain.forward(plain.model, plain.batch)
                loss = plain.lossfunc(shifted(out), targets)
                if seed is not None:
                    torch.manual_seed(seed)
                loss.backward()
        finally:
            unextend(plain.model), unextend(plain.lossfunc)

    @cached_property
    def columns(self) -> Tensor:
        """The columns ``[m, n, d]`` that were pulled back: another pass draws the same ones again."""
        extension: Any = self.extension
        if extension.seeds == "gradient":
            return self.plain.empirical_column[None]
        root = SqrtGGNMC(extension.mc_samples) if extension.seeds == "sampled" else SqrtGGNExact()
        return self._pulled_to_output(root.savefield, lambda shifted: self._backward(root, shifted))

    def _pulled_to_output(self, savefield: str, run: Callable[[Shifted], None]) -> Tensor:
        """The columns ``[m, n, d]`` that arrive at the output, in a pass that is run with a shift of the output."""
        plain = self.plain
        shift = extend(Shift(plain.loss_gradient[0] if plain.ids is None else plain.out))
        run(shift if plain.ids is not None else lambda out: plain.join(shift(plain.split(out))))
        found: Tensor = vars(shift.shift)[savefield]
        if plain.ids is None:
            return found
        return torch.stack([torch.stack([plain.split(row)[n] for n, row in enumerate(rows)]) for rows in found])

    def redrawn(self, count: int) -> list[dict[str, Any]]:
        """The results of ``count`` more computations with other random numbers."""
        self._redrawn += [self._computed(seed) for seed in range(len(self._redrawn), count)]
        return self._redrawn[:count]

    def draws_another_second_moment(self) -> bool:
        """Whether sampled columns have another second moment than the loss's Hessian, along random directions."""
        plain, lossfunc = self.plain, extend(self.plain.lossfunc)
        count = max(2, min(2**10, LARGEST_DRAW // plain.loss_gradient.numel()))
        root = SqrtGGNMC(count)

        def run(shifted: Shifted) -> None:
            with backpack(root, sample_ids=plain.given_ids):
                lossfunc(shifted(plain.out.detach()), plain.targets).backward()

        drawn = self._pulled_to_output(root.savefield, run) * count**0.5
        unextend(lossfunc)
        direction = torch.randn_like(plain.loss_gradient)
        true = (plain.hessian_product(direction) * direction).sum(1)
        squares = torch.einsum("mnd,nd->mn", drawn, direction).square()
        allowed = SIGMAS * squares.std(0) / count**0.5 + 1e-6 * true.abs().max()
        return bool(((squares.mean(0) - true).abs() > allowed).any())
