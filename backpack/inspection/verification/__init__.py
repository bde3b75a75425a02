"""Check extensions on a user's own model, against plain autograd on a few entries and samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from backpack.context import backpack, extend, unextend
from backpack.dataset.contents import apply
from backpack.extensions import SqrtGGNExact, SqrtGGNMC
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.inspection.verification import factors as factors  # they register checks
from backpack.inspection.verification import positive as positive
from backpack.inspection.verification.plain import Forward, NoTruth, Plain
from backpack.inspection.verification.truths import CHECKS, SIGMAS, Check, Truth, by_definition
from backpack.samples import SampleIds

SEED = 0
"""Of what models draw: both forward passes draw the same."""

ZERO = 1e-10
"""True values below are taken for zero, and the error is relative to this."""

ENTRIES = 2**22
"""Of columns that are drawn, to see whether they have the loss's Hessian as their second moment."""


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


def verify(
    model: Module,
    lossfunc: Module,
    inputs: Any,
    targets: Any,
    *extensions: BackpropExtension,
    forward: Forward | None = None,
    sample_ids: Any = None,
    entries: int = 3,
    tolerance: float | None = None,
) -> Verification:
    """Compare extensions with plain autograd, on this very model and batch, before a long run; prints a table.

    Everything runs on copies, in float64 where the model allows it. Of each parameter a few entries are compared, and
    for norms and dot products a few samples; of Kronecker factors and eigenbases a few rows and columns. Sampled
    quantities are compared given what was drawn, and that has the loss's Hessian as its second moment, within some
    standard errors. An extension of your own, of first order, is compared with what its ``compute`` gives for
    individual gradients by plain autograd. What no check is known for is computed but not compared, with the reason.

    Args:
        model: Any model; it need not be extended, and is left as it is. Of an output that is no tensor, ``logits`` are
            taken, or else its first tensor.
        lossfunc: A loss, called with the model's output and the targets.
        inputs: A tensor, or all that the model is called with as a tuple or dictionary.
        targets: The second argument of the loss.
        extensions: What to verify.
        forward: Returns the loss's two arguments for the model and ``(inputs, targets)``, for other forms of both.
        sample_ids: Which sample each leading entry of the output belongs to, as ``backpack`` takes it.
        entries: How many entries of each parameter are compared.
        tolerance: Relative error that is taken for rounding; default ``1e-6`` in float64, ``1e-2`` otherwise.

    Returns:
        A row for each parameter and quantity: relative error (of the largest true value among the compared entries),
        and a verdict: ``right``, ``wrong``, ``refused`` with the reason, or ``not compared``. ``passed`` sums up.

    Raises:
        TypeError: What the loss is to be called with is no tensor, or the inputs hold none.
        ValueError: No extension is given, or the samples cannot be told apart in the output.
    """
    if not extensions:
        raise ValueError("verify() needs the extensions to verify, for example BatchGrad().")
    forward = forward or apply
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    model, batch, exact = _double(model, lossfunc, (inputs, targets), forward)
    rule = tolerance if tolerance is not None else (1e-6 if exact else 1e-2)
    lossfunc = copy.deepcopy(lossfunc).double() if exact else copy.deepcopy(lossfunc)
    # The other kernels of attention have no second derivative.
    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(SEED)
        plain = Plain(model, lossfunc, batch, forward, entries, None if sample_ids is None else SampleIds(sample_ids))
        runs = [Run(plain, ext) for ext in extensions]
        for run in runs:
            run.compute()
        outcome = Verification([row for run in runs for row in run.rows(rule)])
    print(outcome)
    return outcome


def _double(model: Module, lossfunc: Module, batch: Any, forward: Forward) -> tuple[Module, Any, bool]:
    """Copies in float64, if the model runs in it and has a finite gradient."""

    def double(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        return value.double() if value.is_floating_point() else value.cdouble() if value.is_complex() else value

    try:
        wide = copy.deepcopy(model).double()._apply(lambda t: t.cdouble() if t.is_complex() else t)
        doubled = tree_map(double, batch)
        tried = copy.deepcopy(wide)
        with torch.random.fork_rng():
            copy.deepcopy(lossfunc).double()(*forward(tried, doubled)).backward()
        finite = all(p.grad.to_dense().isfinite().all() for p in tried.parameters() if p.grad is not None)
    except (RuntimeError, TypeError, NotImplementedError):
        finite = False
    return (wide, doubled, True) if finite else (copy.deepcopy(model), batch, False)


class Shift(Module):
    """Adds a parameter to what samples have in common: its individual gradients are the cotangents that pass here."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.shift = Parameter(torch.zeros_like(like.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """The same, until the parameter changes."""
        return x + self.shift


@dataclass(eq=False)
class Run:
    """One extension on the model."""

    plain: Plain
    extension: BackpropExtension
    found: Any = None
    _redrawn: list[dict[str, Any]] = field(default_factory=list)

    def compute(self) -> None:
        """The results by parameter name, or why there are none."""
        try:
            self.found = self._results()
        except Exception as error:
            self.found = error

    def _results(self, draw: int | None = None) -> dict[str, Any]:
        plain, savefield = self.plain, self.extension.savefield
        self._backward(self.extension, lambda out: out, draw)
        named = plain.model.named_parameters()
        return {name: vars(p).pop(savefield) for name, p in named if savefield in vars(p)}

    def _backward(self, ext: BackpropExtension, between: Callable[[Tensor], Tensor], draw: int | None = None) -> None:
        """``between``: the model and the loss; ``draw``: other random numbers in the backward pass."""
        plain, default = self.plain, sdpa_kernel(list(SDPBackend.__members__.values()))
        extend(plain.model), extend(plain.lossfunc)
        try:
            with torch.random.fork_rng(), default, backpack(ext, sample_ids=plain.given_ids):
                torch.manual_seed(SEED)
                out, targets = plain.forward(plain.model, plain.batch)
                loss = plain.lossfunc(between(out), targets)
                if draw is not None:
                    torch.manual_seed(draw)
                loss.backward()
        finally:
            unextend(plain.model), unextend(plain.lossfunc)

    @cached_property
    def drawn(self) -> Tensor:
        """The columns ``[m, n, d]`` that were pulled back: random numbers are the same again."""
        ext: Any = self.extension
        if ext.seeds == "gradient":
            return self.plain.terms[None]
        own = SqrtGGNMC(ext.mc_samples) if ext.seeds == "sampled" else SqrtGGNExact()
        return self._columns(own, lambda shifted: self._backward(own, shifted))

    def _columns(self, own: BackpropExtension, run: Callable[[Callable[[Tensor], Tensor]], None]) -> Tensor:
        """The columns ``[m, n, d]`` that ``own`` pulls back, in a pass that is run with what shifts the output."""
        plain = self.plain
        shift = extend(Shift(plain.slope[0] if plain.ids is None else plain.out))
        run(shift if plain.ids is not None else lambda out: plain.join(shift(plain.split(out))))
        found: Tensor = vars(shift.shift)[own.savefield]
        if plain.ids is None:
            return found
        return torch.stack([torch.stack([plain.split(row)[n] for n, row in enumerate(rows)]) for rows in found])

    def redrawn(self, count: int) -> list[dict[str, Any]]:
        """The results of so many draws."""
        self._redrawn += [self._results(draw) for draw in range(len(self._redrawn), count)]
        return self._redrawn[:count]

    def _off(self) -> bool:
        """Whether what is drawn has another second moment than the loss's Hessian, along random directions."""
        plain, lossfunc = self.plain, extend(self.plain.lossfunc)
        count = max(2, min(2**10, ENTRIES // plain.slope.numel()))

        def run(shifted: Callable[[Tensor], Tensor]) -> None:
            with backpack(own, sample_ids=plain.given_ids):
                lossfunc(shifted(plain.out.detach()), plain.targets).backward()

        own = SqrtGGNMC(count)
        drawn = self._columns(own, run) * count**0.5
        unextend(lossfunc)
        direction = torch.randn_like(plain.slope)
        true = (plain.product(direction) * direction).sum(1)
        squares = torch.einsum("mnd,nd->mn", drawn, direction).square()
        error = squares.std(0) / count**0.5
        return bool(((squares.mean(0) - true).abs() > SIGMAS * error + 1e-6 * true.abs().max()).any())

    def rows(self, tolerance: float) -> Iterator[Row]:
        """The verdicts."""
        field, plain = self.extension.savefield, self.plain
        if isinstance(self.found, Exception):
            yield Row("", field, None, f"refused: {self.found}")
            return
        known = next((CHECKS[cls] for cls in type(self.extension).__mro__ if cls in CHECKS), by_definition)
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name in self.found:
            if plain.parameters[name].numel() == 0:
                continue  # there is nothing to compare
            try:
                pairs[name] = list(self._pairs(known, name))
            except NoTruth as reason:
                yield Row(name, field, None, f"not compared: {reason}")
        if self.extension.seeds == "sampled" and pairs and self._off():
            yield Row("", field, None, "wrong: what is drawn has another second moment than the loss's Hessian")
        sizes = {name: [float(true.abs().max()) for _, true in own] for name, own in pairs.items()}
        largest: list[float] = []
        for values in sizes.values():
            largest = [max(a, b) for a, b in zip_longest(largest, values, fillvalue=0.0)]
        for name, own in pairs.items():
            # Some results are zero but for rounding.
            scales = [max(size, 1e-6 * most, ZERO) for size, most in zip(sizes[name], largest, strict=False)]
            errors = [float((v - t).abs().max()) / scale for (v, t), scale in zip(own, scales, strict=True)]
            error = max(errors)
            yield Row(name, field, error, "right" if error <= tolerance else "wrong")
        for name, parameter in plain.parameters.items():
            if name not in self.found and plain.gradient(name, plain.slope).abs().sum() > 0 and parameter.numel():
                yield Row(name, field, None, "wrong: it receives a gradient, but there is no result")

    def _pairs(self, known: Check, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = self.extension.subset.rows(self.plain.n, torch.device("cpu"))
        rows = torch.arange(self.plain.n) if chosen is None else chosen
        return known(self.found[name], Truth(self.plain, name, self, rows))
