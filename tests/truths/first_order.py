"""Quantities of first order, against individual gradients by a loop over samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from models.problem import Problem
from torch import Tensor

from backpack import backpack, extend, extensions
from backpack.extensions import ClippedGrad

from . import close


def real_rows(g: Tensor) -> Tensor:
    """``[n, real entries]``: a complex number is two real ones."""
    rows = g.flatten(1) if g.dim() > 1 else g[:, None]
    return torch.view_as_real(rows.resolve_conj()).flatten(1) if g.is_complex() else rows


OF_GRADIENTS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "BatchGrad": (1, lambda g: g),
    "BatchL2Grad": (2, lambda g: real_rows(g).square().sum(1)),
    "BatchDotGrad": (2, lambda g: real_rows(g) @ real_rows(g).T),
    "SumGradSquared": (2, lambda g: g.abs().square().sum(0)),
    "Variance": (2, lambda g: (g - g.mean(0)).abs().square().mean(0)),
}
"""Extension of first order -> its degree, and its truth from the individual gradients of a parameter, ``[n, *p]``.

The result for ``c`` times the loss is ``c**degree`` times as large. Each row is tested on all models, with all forms of
subsets, and on data sets: in one process, in several, and with results in files.
"""


def subsets(n: int) -> dict[str, tuple[object, list[int]]]:
    """How users write subsets, and the rows they mean."""
    everything = list(range(n))
    return {
        "all": (None, everything),
        "last": ([-1], [n - 1]),
        "reversed": (slice(None, None, -1), everything[::-1]),
        "duplicates": ([0, n - 1, 0], [0, n - 1, 0]),
        "mask": (torch.tensor([i % 2 == 0 for i in everything]), everything[::2]),
        "array": (np.array(everything[::-1]), everything[::-1]),
        "range": (range(0, n, 2), everything[::2]),
    }


def quantities(g: Tensor) -> dict[str, Tensor]:
    """All of the table for one parameter, by the fields of the extensions."""
    return {getattr(extensions, name).savefield: true(g) for name, (_, true) in OF_GRADIENTS.items()}


def norms_of(grads: Mapping[str, Tensor]) -> Tensor:
    """Of each sample's gradient, ``[n]``."""
    return torch.stack([real_rows(g).square().sum(1) for g in grads.values()]).sum(0).sqrt()


def clipped(grads: Mapping[str, Tensor], bound: float) -> dict[str, Tensor]:
    """The sums of gradients of at most this norm."""
    factor = (bound / norms_of(grads).clamp(min=1e-30)).clamp(max=1)
    return {name: torch.einsum("n,n...->...", factor.to(g.dtype), g) for name, g in grads.items()}


def check_first_order(problem: Problem, choose: Callable[[int], str], scale: float, alone: bool = False) -> None:
    """Each quantity, each with its own subset, in one backward pass; ``alone``: that leaves out the gradient."""
    truth = problem.individual_gradients(scale)
    plain = problem.gradients(scale)
    bound = 0.7 * float(norms_of(truth).mean())
    names = [choose(k) for k in range(len(OF_GRADIENTS) + 1)]
    *chosen, (for_clipping, own) = [subsets(problem.n)[name] for name in names]
    computed = [getattr(extensions, ext)(subsampling=w) for ext, (w, _) in zip(OF_GRADIENTS, chosen, strict=True)]
    extend(problem.model)
    out = problem.output()
    loss = problem.value(out, scale)
    with backpack(*computed, ClippedGrad(bound, subsampling=for_clipping)):
        if alone:
            torch.autograd.grad(loss, out)
        else:
            loss.backward()
    of_clipped = clipped({name: t[own] for name, t in truth.items()}, bound)
    floor = 1e-5 * max(t.abs().max() for t in truth.values())
    for name, parameter in problem.parameters().items():
        if name not in truth:
            assert parameter.grad is None and not hasattr(parameter, "grad_batch"), name
            continue
        if alone:
            assert parameter.grad is None, name
        else:
            assert torch.equal(parameter.grad.to_dense(), plain[name].to_dense()), name
        largest = max(truth[name].abs().max(), floor)  # some gradients are zero but for rounding
        for ext, (_, rows), (degree, true) in zip(computed, chosen, OF_GRADIENTS.values(), strict=True):
            found = getattr(parameter, ext.savefield)
            assert close(found, true(truth[name][rows]), largest**degree), (name, ext.savefield, names)
        assert close(parameter.grad_clipped, of_clipped[name], largest), (name, names)
