"""What is true of each quantity, by plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from backpack.extensions import (
    GGNMP,
    HMP,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    DiagHessianMC,
    GGNGram,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.inspection.verification.plain import NoTruth, Plain, at, units
from backpack.uses import Explicit
from backpack.uses.complex_numbers import as_real

SIGMAS = 6.0
"""Standard errors that the mean of estimates may be off."""

STORED = 2**24
"""Entries of individual gradients that are stored for an extension that nothing else is known of."""

DRAWS = (32, 256)
"""How often an estimate is computed; more where it is off, as few draws may miss what is rare, and how rare it is."""


class Ran(Protocol):
    """An extension's run on the model."""

    extension: Any

    @property
    def drawn(self) -> Tensor:
        """The columns ``[m, n, d]`` that were pulled back."""

    def redrawn(self, count: int) -> list[dict[str, Any]]:
        """The results of so many draws, by the parameters' names."""


@dataclass(eq=False)
class Truth:
    """What is known of one parameter; ``rows``: the selected samples."""

    plain: Plain
    name: str
    run: Ran
    rows: Tensor

    @property
    def extension(self) -> Any:
        """Whose result it is the truth of."""
        return self.run.extension

    @property
    def entries(self) -> Tensor:
        """Those that are compared."""
        return self.plain.chosen(self.plain.parameters[self.name].numel())

    def at_entries(self, result: Tensor) -> Tensor:
        """Of a result ``[..., *p]``, these: ``[..., k]``; if it is complex, real parts and then imaginary ones."""
        shape = self.plain.parameters[self.name].shape
        return at(result.reshape(*result.shape[: result.dim() - len(shape)], shape.numel()), self.entries)

    def folded(self, squares: Tensor) -> Tensor:
        """Of a complex parameter, squares of real parts and of imaginary ones are added up."""
        return squares.unflatten(-1, (-1, len(self.entries))).sum(-2)

    @property
    def weights(self) -> Tensor:
        """How often each sample was selected, ``[n]``."""
        return torch.bincount(self.rows, minlength=self.plain.n).to(self.plain.slope.dtype)

    def gradients(self) -> Tensor:
        """Individual gradients of the selected samples at the entries, ``[n, k]``."""
        return torch.einsum("knd,nd->nk", self.plain.columns(self.name), self.plain.slope)[self.rows]

    def sample(self, place: int) -> Tensor:
        """All of the gradient of a selected sample."""
        return self.plain.gradient(self.name, self.plain.of_sample(self.plain.slope, int(self.rows[place])))

    def gram(self, columns: Tensor) -> Tensor:
        """``J^T H J`` along ``columns``, ``[k, n, d]``: of each selected sample, ``[n, k, k]``."""
        if self.extension.seeds in ("sampled", "gradient"):
            products = torch.einsum("mnd,knd->nmk", self.run.drawn, columns)
            return torch.einsum("nmk,nml->nkl", products, products)[self.rows]
        products = torch.stack([self.plain.product(column) for column in columns])
        return torch.einsum("knd,lnd->nkl", columns, products)[self.rows]

    def blocks(self) -> Tensor:
        """The curvature that is pulled back, at the entries, of each selected sample: ``[n, k, k]``."""
        return self.gram(self.plain.columns(self.name))

    def curvatures(self) -> Tensor:
        """Its diagonals, ``[n, k]``."""
        return self.blocks().diagonal(dim1=1, dim2=2)

    def hessian(self, weights: Tensor) -> Tensor:
        """The Hessian at the entries, samples weighed, ``[k, k]``."""
        products = torch.stack([self.plain.product(c * weights[:, None]) for c in self.plain.columns(self.name)])
        return torch.einsum("knd,lnd->kl", self.plain.columns(self.name), products) + self.plain.bend(
            self.name, weights
        )


Pairs = Iterator[tuple[Tensor, Tensor]]
Check = Callable[[Any, Truth], Pairs]

CHECKS: dict[type[BackpropExtension], Check] = {}
"""Extension to what makes pairs of values found and true of its result."""


def check(*extensions: type[BackpropExtension]) -> Callable[[Check], Check]:
    """Register the check that follows."""

    def register(function: Check) -> Check:
        CHECKS.update(dict.fromkeys(extensions, function))
        return function

    return register


def by_definition(result: Any, truth: Truth) -> Pairs:
    """Of an extension without a check: what its own ``compute`` makes of individual gradients by plain autograd."""
    extension = truth.extension
    if extension.seeds is not None or extension.needs_all_parameters or extension.has_rules_only:
        raise NoTruth("no check is known")
    if len(truth.rows) * truth.plain.parameters[truth.name].numel() > STORED:
        raise NoTruth(f"no check is known that takes less than {STORED} entries of individual gradients")
    gradients = torch.stack([truth.sample(place) for place in range(len(truth.rows))])
    found, true = (tree_leaves(one) for one in (result, extension.compute(Explicit(gradients[None]))))
    if not all(isinstance(leaf, Tensor) for leaf in [*found, *true]):
        raise NoTruth("its results are no tensors")
    yield from zip(found, true, strict=True)


# First order


@check(BatchGrad)
def _batch_grad(result: Tensor, truth: Truth) -> Pairs:
    yield truth.at_entries(result), truth.gradients()


@check(BatchL2Grad)
def _batch_l2(result: Tensor, truth: Truth) -> Pairs:
    for place in {0, len(truth.rows) - 1}:
        yield result[place], truth.sample(place).abs().square().sum()


@check(BatchDotGrad)
def _batch_dot(result: Tensor, truth: Truth) -> Pairs:
    yield result[0, -1], torch.real(truth.sample(0) * truth.sample(-1).conj()).sum()
    yield result[0, 0], truth.sample(0).abs().square().sum()


@check(SumGradSquared)
def _sum_grad_squared(result: Tensor, truth: Truth) -> Pairs:
    yield truth.at_entries(result), truth.folded(truth.gradients().square().sum(0))


@check(Variance)
def _variance(result: Tensor, truth: Truth) -> Pairs:
    gradients = truth.gradients()
    # The mean of squares on both sides: the variance alone may be a small difference of large numbers.
    squared = truth.folded(gradients.mean(0).square())
    yield truth.at_entries(result) + squared, truth.folded(gradients.square().mean(0))


@check(ClippedGrad)
def _clipped(result: Tensor, truth: Truth) -> Pairs:
    factors = truth.extension.max_norm / truth.plain.norms[truth.rows].clamp(min=truth.extension.max_norm)
    yield truth.at_entries(result), factors @ truth.gradients()


# The generalized Gauss-Newton matrix


@check(DiagGGNExact, DiagGGNMC)
def _diag_ggn(result: Tensor, truth: Truth) -> Pairs:
    yield truth.at_entries(result), truth.folded(truth.curvatures().sum(0))


@check(BatchDiagGGNExact, BatchDiagGGNMC)
def _batch_diag_ggn(result: Tensor, truth: Truth) -> Pairs:
    yield truth.at_entries(result), truth.folded(truth.curvatures())


@check(SqrtGGNExact)
def _sqrt_ggn(result: Tensor, truth: Truth) -> Pairs:
    root = truth.at_entries(result)
    yield torch.einsum("cnj,cnk->njk", root, root), truth.blocks()  # a root is unique up to rotations


@check(SqrtGGNMC)
def _sqrt_ggn_mc(result: Tensor, truth: Truth) -> Pairs:
    true = torch.einsum("mnd,knd->mnk", truth.run.drawn, truth.plain.columns(truth.name))[:, truth.rows]
    yield truth.at_entries(result), true


@check(GGNGram)
def _ggn_gram(result: Tensor, truth: Truth) -> Pairs:
    drawn, samples = truth.run.drawn, len(truth.rows)
    places = torch.tensor([0, len(result) // 2, len(result) - 1]).unique()
    pulled = [
        truth.plain.gradient(truth.name, truth.plain.of_sample(drawn[int(k) // samples], int(truth.rows[k % samples])))
        for k in places
    ]
    columns = as_real(torch.stack([pull.flatten() for pull in pulled]))
    yield result[places][:, places], columns @ columns.T


@check(GGNMP)
def _ggnmp(result: Any, truth: Truth) -> Pairs:
    true = truth.blocks().sum(0)
    yield multiplied(result, truth), true


# The Hessian


@check(HMP)
def _hmp(result: Any, truth: Truth) -> Pairs:
    true = truth.hessian(truth.weights)
    yield multiplied(result, truth), true


@check(DiagHessian)
def _diag_hessian(result: Tensor, truth: Truth) -> Pairs:
    yield truth.at_entries(result), truth.hessian(truth.weights).diagonal()


@check(BatchDiagHessian)
def _batch_diag_hessian(result: Tensor, truth: Truth) -> Pairs:
    for place in {0, len(truth.rows) - 1}:
        weights = torch.zeros_like(truth.weights)
        weights[truth.rows[place]] = 1
        yield truth.at_entries(result)[place], truth.hessian(weights).diagonal()


@check(DiagHessianMC)
def _diag_hessian_mc(result: Tensor, truth: Truth) -> Pairs:
    """Within some standard errors of many draws."""
    true = truth.hessian(truth.weights).diagonal()
    for count in DRAWS:
        draws = torch.stack([truth.at_entries(found[truth.name]) for found in truth.run.redrawn(count)])
        mean, error = draws.mean(0), draws.std(0) / count**0.5
        right = (mean - true).abs() <= SIGMAS * error
        if bool(right.all()):
            break
    yield torch.where(right, true, mean), true


def multiplied(product: Any, truth: Truth) -> Tensor:
    """A matrix at the entries, ``[k, k]``, from its products with unit vectors."""
    parameter = truth.plain.parameters[truth.name]
    return truth.at_entries(product(torch.stack(units(parameter, truth.entries))).detach())
