"""The mean curvature over the batch, and closed forms that pull it back through modules.

Where all samples have the same Jacobian ``J``, the curvature ``J^T H J`` is the pull-back of the rows of ``H``,
transposed and pulled back once more. An elementwise function multiplies ``H`` with the second moment of its slopes, and
so does max pooling, where each entry has the curvature of its window.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from backpack.curvature.rerun import is_observed, run_again
from backpack.memory import at_a_time, empty
from backpack.modules.thread_state import muted
from backpack.uses.base import accumulate
from backpack.uses.second_moments import scaled_product, second_moment, symmetric_product
from backpack.uses.windows import each

SHIFT = 1e-13
"""What is added to the diagonal of a curvature, times its largest entry, so that it has a Cholesky decomposition."""

ELEMENTWISE = (
    *(nn.AlphaDropout, nn.CELU, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ELU, nn.GELU, nn.Hardshrink),
    *(nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.SELU, nn.SiLU),
    *(nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold),
)
"""Modules whose Jacobians are diagonal; what is dropped at random does not agree with the forward pass."""

SAME = (nn.Flatten, nn.Identity, nn.Unflatten)
"""Modules whose Jacobians are the identity."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

MAPS = (nn.Linear, *CONVOLUTIONS, nn.Embedding)
"""Modules whose parameters are those of one linear map."""

AFFINE = (
    *(nn.Linear, *CONVOLUTIONS, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
)
"""Modules whose Jacobians are the same for all samples."""

POOLS = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
"""Modules that select one entry of each window, and how many axes a window has."""


@dataclass(eq=False)
class Mean:
    """A mean curvature in ``d`` entries: ``given`` as a matrix ``[d, d]``, or as ``given^T given``."""

    given: Tensor
    is_root: bool = False

    @cached_property
    def matrix(self) -> Tensor:
        """``[d, d]``."""
        return second_moment(self.given) if self.is_root else self.given

    def roots(self) -> list[tuple[int, Tensor]]:
        """``(1, S)``, and ``(-1, T)`` if it is not positive semidefinite, with ``S^T S - T^T T`` the curvature."""
        if self.is_root and len(self.given) <= self.given.shape[1]:
            return [(1, self.given)]
        wide = self.matrix.double()  # in float32, eigenvalues do not always converge
        factor, problem = torch.linalg.cholesky_ex(wide + torch.diag(SHIFT * wide.diagonal().amax().expand(len(wide))))
        if problem.item() == 0:
            return [(1, factor.T.to(self.given.dtype))]
        values, vectors = torch.linalg.eigh(wide)
        found = []
        for sign in (1, -1):
            rows = (vectors * (sign * values).clamp(min=0).sqrt()).T.to(self.given.dtype)
            large = sign * values > torch.finfo(self.given.dtype).eps * values.abs().max()
            if sign > 0 or bool(large.any()):
                found.append((sign, rows[large] if bool(large.any()) else rows[:1]))
        return found


def is_one_of(module: Module, kinds: tuple[type[Module], ...]) -> bool:
    """Whether a module runs the forward pass of one of these classes, unchanged by any user."""
    if not isinstance(module, kinds) or "forward" in vars(module) or is_observed(module):
        return False
    return any(type(module).forward is cls.forward for cls in kinds if isinstance(module, cls))


def in_closed_form(module: Module, x: Tensor | None, mean: Mean) -> Mean | None:
    """The curvature in the input of a module that is not elementwise; ``x``: that input, not needed for ``Linear``.

    ``None``: there is no closed form.
    """
    if is_one_of(module, SAME):
        return mean
    weight = module._parameters.get("weight")
    if is_one_of(module, (nn.Linear,)) and weight is not None:
        return _through_linear(weight.detach(), mean)
    if x is not None and is_one_of(module, tuple(POOLS)):
        return Mean(_selected(module, x, mean.matrix))
    if x is not None and is_one_of(module, AFFINE):
        pull = _adjoint(module, x)
        return Mean(pull(mean.given), True) if mean.is_root else Mean(pull(pull(mean.given).T))
    return None


def _through_linear(weight: Tensor, mean: Mean) -> Mean:
    """``W^T H W``, ``W`` being applied at each position."""

    def pull(rows: Tensor) -> Tensor:
        return (rows.reshape(-1, len(weight)) @ weight).reshape(len(rows), -1)

    if mean.is_root:
        return Mean(pull(mean.given), True)
    half = pull(mean.given)
    return Mean(symmetric_product(weight.T, half) if len(half) == len(weight) else pull(half.T))


def _adjoint(module: Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Pulls cotangents ``[v, d]`` of an affine module's output back to its input, as if each were a sample."""

    def pull(rows: Tensor) -> Tensor:
        result = empty((len(rows), x[0].numel()), rows)
        step = max(1, at_a_time("columns", rows.device) // max(rows.shape[1], x[0].numel()))
        for part, found in zip(rows.split(step), result.split(step), strict=True):
            point = x.new_zeros(len(part), *x.shape[1:]).requires_grad_()
            with torch.enable_grad(), muted(), run_again(module):
                out = module(point)
                (grad,) = torch.autograd.grad(out, point, part.reshape(out.shape))
            found.copy_(grad.flatten(1))
        return result

    return pull


def _selected(module: Any, x: Tensor, curvature: Tensor) -> Tensor:
    """Through max pooling: two entries have the curvature of two windows, averaged over samples that select both."""
    dims = next(dims for cls, dims in POOLS.items() if isinstance(module, cls))
    pool = copy.copy(module)
    pool.return_indices = True
    with run_again(module), muted():
        selected = pool(x.clone())[1]
    out, size = selected.shape[-dims:], x.shape[-dims:]
    selected = selected.reshape(len(x), -1, prod(out))
    channels = torch.arange(selected.shape[1], device=x.device)[:, None] * prod(out)
    parts = []
    for window, inside in zip(*_windows(module, size, out, x.device), strict=True):
        chosen = (selected[:, :, window] == torch.arange(prod(size), device=x.device)) & inside
        parts.append(((channels + window).flatten(), chosen.flatten(1).to(curvature.dtype)))
    terms: list[Tensor] = []
    for (a, rows), (b, columns) in product(parts, parts):
        both = second_moment(rows, 1 / len(x)) if a is b else scaled_product(rows.T, columns, 1 / len(x))
        pairs = torch.index_select(curvature.index_select(1, b), 0, a, out=empty(both.shape, both))
        accumulate(terms, both.mul_(pairs))
    return terms[0]


def _windows(module: Any, size: Sequence[int], out: Sequence[int], device: Any) -> tuple[Tensor, Tensor]:
    """The windows that each entry of a plane may lie in, ``[r, entries]``, and whether these exist."""
    window = torch.zeros(1, 1, dtype=torch.int64, device=device)
    inside = torch.ones_like(window, dtype=torch.bool)
    shape = (each(s, len(size)) for s in (module.kernel_size, module.stride, module.padding, module.dilation))
    for entries, windows, kernel, stride, padding, dilation in zip(size, out, *shape, strict=True):
        before = torch.arange((kernel - 1) * dilation // stride + 1, device=device)
        own = (torch.arange(entries, device=device) + padding) // stride - before[:, None]
        exists = (own >= 0) & (own < windows)
        own = own.clamp(0, windows - 1)
        window = (window[:, None, :, None] * windows + own[:, None]).flatten(2).flatten(0, 1)
        inside = (inside[:, None, :, None] & exists[:, None]).flatten(2).flatten(0, 1)
    return window, inside
