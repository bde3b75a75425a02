"""The check of each extension: pairs of a value that it computed and the true one, by plain autograd."""

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
    GaussNewtonStep,
    GGNGram,
    ProjectedGrad,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
    WeightedGrad,
)
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.inspection.verification.plain_autograd import NotCompared, PlainAutograd, at_entries, units
from backpack.uses import Explicit
from backpack.uses.complex_numbers import as_real

SIGMAS = 6.0
"""Standard errors that the mean of estimates may differ from its expectation by."""

DRAWS = (32, 256)
"""How often an estimate is computed; the larger number where the smaller one, which may miss rare draws, is wrong."""


LARGEST_STORED = 2**24
"""The most entries of individual gradients that are stored for an extension without a check."""


class Computation(Protocol):
    """How a result was computed; ``found`` has the results of all parameters."""

    extension: Any
    found: dict[str, Any]

    @property
    def columns(self) -> Tensor:
        """The columns ``[m, n, d]`` that were pulled back."""

    def redrawn(self, count: int) -> list[dict[str, Any]]:
        """The results of ``count`` more computations with other random numbers, by name of the parameters."""


@dataclass(eq=False)
class Truth:
    """The true values for one parameter; ``samples``: those that the extension selects."""

    plain: PlainAutograd
    name: str
    computed: Computation
    samples: Tensor

    def __post_init__(self) -> None:
        self.extension = self.computed.extension

    @property
    def entries(self) -> Tensor:
        """The places of the entries that are compared."""
        return self.plain.chosen(self.plain.parameters[self.name].numel())

    def at_entries(self, result: Tensor) -> Tensor:
        """The compared entries of a result ``[..., *p]``: ``[..., k]``; for complex ones, real parts come first."""
        shape = self.plain.parameters[self.name].shape
        return at_entries(result.reshape(*result.shape[: result.dim() - len(shape)], shape.numel()), self.entries)

    def folded(self, squares: Tensor) -> Tensor:
        """Add squares of real and of imaginary parts; those of a real parameter stay as they are."""
        return squares.unflatten(-1, (-1, len(self.entries))).sum(-2)

    @property
    def weights(self) -> Tensor:
        """How often each sample was selected, ``[n]``."""
        return torch.bincount(self.samples, minlength=self.plain.n).to(self.plain.loss_gradient.dtype)

    def gradients(self) -> Tensor:
        """Individual gradients of the selected samples at the entries, ``[n, k]``."""
        columns = self.plain.jacobian_columns(self.name)
        return torch.einsum("knd,nd->nk", columns, self.plain.loss_gradient)[self.samples]

    def pulled(self, column: Tensor, place: int) -> Tensor:
        """What a column ``[n, d]`` of one selected sample is pulled back to, at all entries of the parameter."""
        return self.plain.gradient(self.name, self.plain.only_sample(int(self.samples[place]), column))

    def gradient(self, place: int) -> Tensor:
        """The gradient of one selected sample, at all entries of the parameter."""
        return self.of_sample(self.name, int(self.samples[place]))

    def of_sample(self, name: str, sample: int) -> Tensor:
        """The gradient of a sample of the batch, at all entries of a parameter."""
        return self.plain.individual_gradient(name, sample)

    def curvature_along(self, columns: Tensor) -> Tensor:
        """``J^T H J`` of each selected sample, ``[n, k, k]``; ``columns`` ``[k, n, d]`` are those of ``J``."""
        if self.extension.seeds in ("sampled", "gradient"):
            products = torch.einsum("mnd,knd->nmk", self.computed.columns, columns)
            return torch.einsum("nmk,nml->nkl", products, products)[self.samples]
        products = torch.stack([self.plain.hessian_product(column) for column in columns])
        return torch.einsum("knd,lnd->nkl", columns, products)[self.samples]

    def curvature(self) -> Tensor:
        """The curvature of each selected sample at the entries, ``[n, k, k]``."""
        return self.curvature_along(self.plain.jacobian_columns(self.name))

    def curvature_diagonal(self) -> Tensor:
        """For each selected sample, the diagonal of its curvature at the compared entries, ``[n, k]``."""
        return self.folded(self.curvature().diagonal(dim1=1, dim2=2))

    def hessian(self, weights: Tensor) -> Tensor:
        """The Hessian of the loss at the entries, with these weights of the samples, ``[k, k]``."""
        columns = self.plain.jacobian_columns(self.name)
        products = torch.stack([self.plain.hessian_product(column * weights[:, None]) for column in columns])
        return torch.einsum("knd,lnd->kl", columns, products) + self.plain.residual(self.name, weights)

    def multiplied(self, product: Any) -> Tensor:
        """A matrix at the entries, ``[k, k]``, from its products with unit vectors."""
        vectors = units(self.plain.parameters[self.name], self.entries)
        return self.at_entries(product(torch.stack(vectors)).detach())


Pairs = Iterator[tuple[Tensor, Tensor]]
Check = Callable[[Any, Truth], Pairs]

CHECKS: dict[type[BackpropExtension], Check] = {}
"""Class of extensions to the function that yields pairs of computed and true values for its result."""


def check(*extensions: type[BackpropExtension]) -> Callable[[Check], Check]:
    """Register the check of these extensions."""

    def register(function: Check) -> Check:
        CHECKS.update(dict.fromkeys(extensions, function))
        return function

    return register


def by_definition(result: Any, truth: Truth) -> Pairs:
    """Check an extension without a check of its own: its ``compute`` for individual gradients by plain autograd."""
    extension, count = truth.extension, len(truth.samples)
    if extension.seeds is not None or extension.needs_all_parameters or extension.has_rules_only:
        raise NotCompared("no check is known")
    if count * truth.plain.parameters[truth.name].numel() > LARGEST_STORED:
        raise NotCompared(f"no check is known that takes less than {LARGEST_STORED} entries of individual gradients")
    grads = Explicit(torch.stack([truth.gradient(place) for place in range(count)])[None])
    grads.parameter = truth.plain.parameters[truth.name]
    found, true = (tree_leaves(one) for one in (result, extension.compute(grads)))
    if not all(isinstance(leaf, Tensor) for leaf in [*found, *true]):
        raise NotCompared("its results are no tensors")
    yield from zip(found, true, strict=True)


# First order


@check(BatchGrad)
def _batch_grad(result: Tensor, truth: Truth) -> Pairs:
    yield truth.at_entries(result), truth.gradients()


@check(BatchL2Grad)
def _batch_l2(result: Tensor, truth: Truth) -> Pairs:
    for place in {0, len(truth.samples) - 1}:
        yield result[place], truth.gradient(place).abs().square().sum()


@check(BatchDotGrad)
def _batch_dot(result: Tensor, truth: Truth) -> Pairs:
    extension, own = truth.extension, as_real(truth.gradient(0).flatten())
    others = truth.samples if extension.against is None else extension.against.rows(truth.plain.n, own.device)
    for place in (-1, 0):
        if extension.directions is not None:
            other = extension.direction(truth.plain.parameters[truth.name], truth.name)[place].to(truth.gradient(0))
        else:
            sample = place if others is None else int(others[place])
            other = truth.of_sample(truth.name, sample)
        yield result[0, place], own @ as_real(other.flatten())


@check(ProjectedGrad)
def _projected(result: Tensor, truth: Truth) -> Pairs:
    extension, places = truth.extension, sorted({0, len(truth.samples) - 1})
    rows = []
    for name in truth.plain.parameters if extension.across == "model" else [truth.name]:
        gradients = [truth.of_sample(name, int(truth.samples[place])) for place in places]
        rows.append(extension.projected(Explicit(torch.stack(gradients)[None]), truth.plain.parameters[name], name))
    yield result[places], torch.stack(rows).sum(0)


@check(WeightedGrad)
def _weighted(result: Tensor, truth: Truth) -> Pairs:
    gradients = truth.gradients()
    yield truth.at_entries(result), truth.extension.weights.to(gradients) @ gradients


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
    extension, plain = truth.extension, truth.plain
    group = extension.group_of(plain.parameters[truth.name], truth.name)
    members = [name for name, own in plain.parameters.items() if extension.group_of(own, name) == group]
    norms = torch.stack([plain.gradient_squares[name] for name in members]).sum(0).sqrt()
    is_mean = getattr(plain.lossfunc, "reduction", None) == "mean"
    norms = norms[truth.samples] * (plain.n if extension.per_sample and is_mean else 1)
    yield truth.at_entries(result), extension.factors(group, norms) @ truth.gradients()


# The generalized Gauss-Newton matrix


@check(DiagGGNExact, DiagGGNMC)
def _diag_ggn(result: Tensor, truth: Truth) -> Pairs:
    yield truth.at_entries(result), truth.curvature_diagonal().sum(0)


@check(BatchDiagGGNExact, BatchDiagGGNMC)
def _batch_diag_ggn(result: Tensor, truth: Truth) -> Pairs:
    yield truth.at_entries(result), truth.curvature_diagonal()


@check(SqrtGGNExact)
def _sqrt_ggn(result: Tensor, truth: Truth) -> Pairs:
    root = truth.at_entries(result)
    yield torch.einsum("cnj,cnk->njk", root, root), truth.curvature()  # a root is unique up to rotations


@check(SqrtGGNMC)
def _sqrt_ggn_mc(result: Tensor, truth: Truth) -> Pairs:
    true = torch.einsum("mnd,knd->mnk", truth.computed.columns, truth.plain.jacobian_columns(truth.name))
    yield truth.at_entries(result), true[:, truth.samples]


@check(GGNGram)
def _ggn_gram(result: Tensor, truth: Truth) -> Pairs:
    count = len(truth.samples)
    places = torch.tensor([0, len(result) // 2, len(result) - 1]).unique()
    pulled = [truth.pulled(truth.computed.columns[k // count], k % count).flatten() for k in places.tolist()]
    columns = as_real(torch.stack(pulled))
    yield result[places][:, places], columns @ columns.T


@check(GGNMP)
def _ggnmp(result: Any, truth: Truth) -> Pairs:
    true = truth.curvature().sum(0)  # first, as it says what PyTorch cannot differentiate
    yield truth.multiplied(result), true


@check(GaussNewtonStep)
def _gauss_newton_step(result: Tensor, truth: Truth) -> Pairs:
    """Whether the steps of all parameters solve the system, at the entries of this one."""
    plain = truth.plain
    moved = [plain.push_forward(plain.parameters[name], [step])[0] for name, step in truth.computed.found.items()]
    product = plain.hessian_product(sum(moved[1:], start=moved[0])) * truth.weights[:, None]
    curved = torch.einsum("knd,nd->k", plain.jacobian_columns(truth.name), product)
    yield curved + truth.extension.damping * truth.at_entries(result), -truth.gradients().sum(0)


# The Hessian


@check(HMP)
def _hmp(result: Any, truth: Truth) -> Pairs:
    true = truth.hessian(truth.weights)  # first, as it says what PyTorch cannot differentiate
    yield truth.multiplied(result), true


@check(DiagHessian)
def _diag_hessian(result: Tensor, truth: Truth) -> Pairs:
    yield truth.at_entries(result), truth.hessian(truth.weights).diagonal()


@check(BatchDiagHessian)
def _batch_diag_hessian(result: Tensor, truth: Truth) -> Pairs:
    for place in {0, len(truth.samples) - 1}:
        weights = torch.zeros_like(truth.weights)
        weights[truth.samples[place]] = 1
        yield truth.at_entries(result)[place], truth.hessian(weights).diagonal()


@check(DiagHessianMC)
def _diag_hessian_mc(result: Tensor, truth: Truth) -> Pairs:
    """Compare the mean of many draws, within some standard errors."""
    true = truth.hessian(truth.weights).diagonal()
    for count in DRAWS:
        draws = torch.stack([truth.at_entries(found[truth.name]) for found in truth.computed.redrawn(count)])
        mean, error = draws.mean(0), draws.std(0) / count**0.5
        right = (mean - true).abs() <= SIGMAS * error
        if bool(right.all()):
            break
    yield torch.where(right, true, mean), true
