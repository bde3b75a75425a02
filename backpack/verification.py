"""Check extensions on a user's own model, against plain autograd on a few entries and samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, RNNBase
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from backpack.context import backpack, extend, unextend
from backpack.extensions import (
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)
from backpack.extensions.backprop_extension import BackpropExtension

SEED = 0
"""Of what models draw: both forward passes draw the same."""

ZERO = 1e-10
"""True values below are taken for zero, and the error is relative to this."""


@dataclass(frozen=True)
class Row:
    """One parameter and quantity: the largest relative error, and what to make of it."""

    parameter: str
    quantity: str
    error: float | None
    verdict: str


@dataclass(frozen=True)
class Verification:
    """The outcome of ``verify``; prints as a table."""

    rows: list[Row]

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong or refused."""
        return all(row.verdict == "right" or row.verdict.startswith("not compared") for row in self.rows)

    def __str__(self) -> str:
        errors = ["" if row.error is None else f"{row.error:.1e}" for row in self.rows]
        table = [("parameter", "quantity", "error", "verdict")]
        table += [(r.parameter, r.quantity, e, r.verdict) for r, e in zip(self.rows, errors, strict=True)]
        widths = [max(len(line[k]) for line in table) for k in range(3)]
        return "\n".join(
            "  ".join([c.ljust(w) for c, w in zip(line, widths, strict=False)] + [line[3]]) for line in table
        )


@dataclass(eq=False)
class Truth:
    """Plain autograd at some entries of a parameter.

    ``columns``: of the Jacobian of the model's output, at these entries, ``[k, n, d]``; ``cotangent``: the gradient of
    the loss with respect to the output, ``[n, d]``; ``hessian``: multiplies such columns by the loss's Hessian;
    ``rows``: the selected samples; ``sample``: all of one sample's gradient; ``bend``: the second derivative of the
    outputs, at the entries, times the cotangent, summed over samples with these weights.
    """

    columns: Tensor
    cotangent: Tensor
    hessian: Callable[[Tensor], Tensor]
    rows: Tensor
    sample: Callable[[int], Tensor]
    entries: Tensor
    bend: Callable[[Tensor], Tensor]

    def gradients(self) -> Tensor:
        """Individual gradients of the selected samples at the entries, ``[n, k]``."""
        return torch.einsum("knd,nd->nk", self.columns, self.cotangent)[self.rows]

    def curvatures(self) -> Tensor:
        """The selected samples' GGN diagonals at the entries, ``[n, k]``."""
        products = torch.stack([self.hessian(column) for column in self.columns])
        return (self.columns * products).sum(2).T[self.rows]


Check = Callable[[Tensor, Truth], Iterator[tuple[Tensor, Tensor]]]

CHECKS: dict[type[BackpropExtension], Check] = {}
"""Extension to pairs of what it found and what is true, from its result and the truth."""


def check(*extensions: type[BackpropExtension]) -> Callable[[Check], Check]:
    """Register the check that follows."""

    def register(function: Check) -> Check:
        CHECKS.update(dict.fromkeys(extensions, function))
        return function

    return register


@check(BatchGrad)
def _batch_grad(result: Tensor, truth: Truth) -> Iterator[tuple[Tensor, Tensor]]:
    yield result.flatten(1)[:, truth.entries], truth.gradients()


@check(BatchL2Grad)
def _batch_l2(result: Tensor, truth: Truth) -> Iterator[tuple[Tensor, Tensor]]:
    for place in {0, len(truth.rows) - 1}:
        yield result[place], truth.sample(int(truth.rows[place])).square().sum()


@check(BatchDotGrad)
def _batch_dot(result: Tensor, truth: Truth) -> Iterator[tuple[Tensor, Tensor]]:
    first, last = (truth.sample(int(truth.rows[place])) for place in (0, -1))
    yield result[0, -1], (first * last).sum()


@check(SumGradSquared)
def _sum_grad_squared(result: Tensor, truth: Truth) -> Iterator[tuple[Tensor, Tensor]]:
    yield result.flatten()[truth.entries], truth.gradients().square().sum(0)


@check(Variance)
def _variance(result: Tensor, truth: Truth) -> Iterator[tuple[Tensor, Tensor]]:
    gradients = truth.gradients()
    # The mean of squares on both sides: the variance alone may be a small difference of large numbers.
    yield result.flatten()[truth.entries] + gradients.mean(0).square(), gradients.square().mean(0)


@check(DiagGGNExact)
def _diag_ggn(result: Tensor, truth: Truth) -> Iterator[tuple[Tensor, Tensor]]:
    yield result.flatten()[truth.entries], truth.curvatures().sum(0)


@check(BatchDiagGGNExact)
def _batch_diag_ggn(result: Tensor, truth: Truth) -> Iterator[tuple[Tensor, Tensor]]:
    yield result.flatten(1)[:, truth.entries], truth.curvatures()


@check(SqrtGGNExact)
def _sqrt_ggn(result: Tensor, truth: Truth) -> Iterator[tuple[Tensor, Tensor]]:
    root = result.flatten(2)[..., truth.entries]
    products = torch.stack([truth.hessian(column) for column in truth.columns])
    blocks = torch.einsum("jnd,knd->njk", truth.columns, products)[truth.rows]
    yield torch.einsum("cnj,cnk->njk", root, root), blocks  # a root is unique up to rotations


@check(DiagHessian)
def _diag_hessian(result: Tensor, truth: Truth) -> Iterator[tuple[Tensor, Tensor]]:
    weights = torch.bincount(truth.rows, minlength=len(truth.cotangent)).to(truth.cotangent.dtype)
    yield result.flatten()[truth.entries], truth.curvatures().sum(0) + truth.bend(weights)


@check(BatchDiagHessian)
def _batch_diag_hessian(result: Tensor, truth: Truth) -> Iterator[tuple[Tensor, Tensor]]:
    for place in {0, len(truth.rows) - 1}:
        weights = torch.zeros_like(truth.cotangent[:, 0])
        weights[truth.rows[place]] = 1
        yield result.flatten(1)[place, truth.entries], truth.curvatures()[place] + truth.bend(weights)


def verify(
    model: Module,
    lossfunc: Module,
    inputs: Any,
    targets: Any,
    *extensions: BackpropExtension,
    entries: int = 3,
    tolerance: float | None = None,
) -> Verification:
    """Compare extensions with plain autograd, on this very model and batch, before a long run; prints a table.

    Everything runs on copies, in float64 where the model allows it. Of each parameter a few entries are compared, and
    for norms and dot products a few samples. Sampled quantities, and those that no check is known for, are computed
    but not compared.

    Args:
        model: Any model; it need not be extended, and is left as it is.
        lossfunc: A loss, called with the model's output and the targets.
        inputs: A tensor, or all that the model is called with as a tuple or dictionary.
        targets: The second argument of the loss.
        extensions: What to verify.
        entries: How many entries of each parameter are compared.
        tolerance: Relative error that is taken for rounding; default ``1e-6`` in float64, ``1e-2`` otherwise.

    Returns:
        A row for each parameter and quantity: relative error (of the largest true value among the compared entries),
        and a verdict: ``right``, ``wrong``, ``refused`` with the reason, or ``not compared``. ``passed`` sums up.

    Raises:
        TypeError: The model's output is no tensor.
        ValueError: No extension is given, or the samples cannot be told apart in the output.
    """
    if not extensions:
        raise ValueError("verify() needs the extensions to verify, for example BatchGrad().")
    model, inputs, targets, exact = _double(model, _arguments(inputs), targets)
    rule = tolerance if tolerance is not None else (1e-6 if exact else 1e-2)
    lossfunc = copy.deepcopy(lossfunc).double() if exact else copy.deepcopy(lossfunc)
    extend(model), extend(lossfunc)
    found = {id(ext): _run(model, lossfunc, inputs, targets, ext) for ext in extensions}
    unextend(model), unextend(lossfunc)
    # The other kernels of attention have no second derivative.
    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(SEED)
        plain = Plain(model, inputs, lossfunc, targets)
        rows = [row for ext in extensions for row in _rows(plain, ext, found[id(ext)], entries, rule)]
    outcome = Verification(rows)
    print(outcome)
    return outcome


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs, {}) if isinstance(inputs, tuple) else ((inputs,), {})


def _double(model: Module, inputs: Any, targets: Any) -> tuple[Module, Any, Any, bool]:
    """Copies in float64, if the model runs in it."""

    def double(value: Any) -> Any:
        return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value

    try:
        wide = copy.deepcopy(model).double()
        args, kwargs = tree_map(double, inputs)
        with torch.random.fork_rng(), torch.no_grad():
            copy.deepcopy(wide)(*args, **kwargs)
    except (RuntimeError, TypeError, NotImplementedError):
        return copy.deepcopy(model), inputs, targets, False
    return wide, (args, kwargs), double(targets), True


def _run(model: Module, lossfunc: Module, inputs: Any, targets: Any, ext: BackpropExtension) -> Any:
    """The results by parameter name, or why there are none."""
    args, kwargs = inputs
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        try:
            with backpack(ext):
                lossfunc(model(*args, **kwargs), targets).backward()
        except Exception as error:
            return error
    return {name: vars(p)[ext.savefield] for name, p in model.named_parameters() if ext.savefield in vars(p)}


@dataclass(eq=False)
class Plain:
    """The model's graph, by plain autograd."""

    model: Module
    inputs: Any
    lossfunc: Module
    targets: Any
    columns: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        args, kwargs = self.inputs
        self.out = self.model(*args, **kwargs)
        if not isinstance(self.out, Tensor):
            raise TypeError(f"verify() needs a model that returns a tensor, got {type(self.out).__name__}.")
        axis = int(isinstance(self.model, RNNBase) and not self.model.batch_first)
        self.n = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() > axis).shape[axis]
        if self.out.dim() <= axis or self.out.shape[axis] % self.n or (axis and self.out.shape[axis] != self.n):
            raise ValueError(
                f"The {self.n} samples cannot be told apart in the model's output of shape {list(self.out.shape)}: let "
                f"them be counted by its first axis."
            )
        self.axis = axis
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        point = self.out.detach().requires_grad_()
        (self.slope,) = torch.autograd.grad(self.lossfunc(point, self.targets), point, create_graph=True)
        self.point = point

    def split(self, tensor: Tensor) -> Tensor:
        """``[n, d]``."""
        return tensor.movedim(self.axis, 0).reshape(self.n, -1)

    def join(self, columns: Tensor) -> Tensor:
        """Undo ``split``."""
        return columns.reshape(self.out.movedim(self.axis, 0).shape).movedim(0, self.axis)

    def pulled(self, cotangent: Tensor, name: str) -> Tensor:
        """The cotangent of the output, pulled back to a parameter."""
        (grad,) = torch.autograd.grad(
            self.out, self.parameters[name], cotangent, retain_graph=True, allow_unused=True, create_graph=True
        )
        parameter = self.parameters[name]
        return torch.zeros_like(parameter) if grad is None else grad

    def column(self, name: str, entry: int) -> Tensor:
        """A column of the output's Jacobian, ``[n, d]``: the derivative of a pull-back by its cotangent."""
        if (name, entry) not in self.columns:
            dummy = torch.zeros_like(self.out, requires_grad=True)
            pulled = self.pulled(dummy, name).to_dense()
            grad = None
            if pulled.requires_grad:
                (grad,) = torch.autograd.grad(pulled.flatten()[entry], dummy, retain_graph=True, allow_unused=True)
            self.columns[name, entry] = self.split(torch.zeros_like(dummy) if grad is None else grad)
        return self.columns[name, entry]

    def bend(self, name: str, entry: int, cotangent: Tensor) -> Tensor:
        """The second derivative by an entry of the outputs times a constant cotangent, ``[n, d]``."""
        slope = self.pulled(self.join(cotangent), name).to_dense().flatten()[entry]
        found = None
        if slope.requires_grad:
            (found,) = torch.autograd.grad(slope, self.parameters[name], retain_graph=True, allow_unused=True)
        return slope.new_zeros(()) if found is None else found.to_dense().flatten()[entry]

    def product(self, column: Tensor) -> Tensor:
        """The Hessian of the loss times ``[n, d]``."""
        if not self.slope.requires_grad:
            return torch.zeros_like(column)
        (found,) = torch.autograd.grad(self.slope, self.point, self.join(column), retain_graph=True, allow_unused=True)
        return torch.zeros_like(column) if found is None else self.split(found)

    def truth(self, name: str, ext: BackpropExtension, entries: int) -> Truth:
        """What is known of one parameter."""
        cotangent = self.split(self.slope.detach())
        size = self.parameters[name].numel()
        chosen = torch.arange(min(entries, size)) * (size - 1) // max(1, min(entries, size) - 1)
        rows = ext.subset.rows(self.n, torch.device("cpu"))

        def sample(number: int) -> Tensor:
            own = torch.zeros_like(cotangent)
            own[number] = cotangent[number]
            return self.pulled(self.join(own), name).detach().to_dense()

        return Truth(
            torch.stack([self.column(name, int(entry)) for entry in chosen]),
            cotangent,
            self.product,
            torch.arange(self.n) if rows is None else rows,
            sample,
            chosen,
            lambda weights: torch.stack([self.bend(name, int(e), cotangent * weights[:, None]) for e in chosen]),
        )


def _rows(plain: Plain, ext: BackpropExtension, found: Any, entries: int, tolerance: float) -> Iterator[Row]:
    if isinstance(found, Exception):
        yield Row("", ext.savefield, None, f"refused: {found}")
        return
    known = next((CHECKS[cls] for cls in type(ext).__mro__ if cls in CHECKS), None)
    sampled = getattr(ext, "seeds", None) == "sampled"
    if known is None or sampled:
        why = "it is sampled" if sampled else "no check is known"
        for name in found:
            yield Row(name, ext.savefield, None, f"not compared: {why}")
        return
    pairs = {name: list(known(found[name], plain.truth(name, ext, entries))) for name in found}
    sizes = {name: max(float(true.abs().max()) for _, true in own) for name, own in pairs.items()}
    floor = 1e-6 * max(sizes.values(), default=0.0)  # some results are zero but for rounding
    for name, own in pairs.items():
        difference = max(float((value - true).abs().max()) for value, true in own)
        error = difference / max(sizes[name], floor, ZERO)
        yield Row(name, ext.savefield, error, "right" if error <= tolerance else "wrong")
    for name, parameter in plain.parameters.items():
        if name not in found and plain.pulled(plain.slope.detach(), name).abs().sum() > 0 and parameter.numel():
            yield Row(name, ext.savefield, None, "wrong: it receives a gradient, but there is no result")
