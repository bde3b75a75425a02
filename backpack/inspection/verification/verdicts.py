"""The verdict on each parameter and quantity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from backpack.inspection.tables import aligned
from backpack.inspection.verification.checks import CHECKS, Truth, by_definition
from backpack.inspection.verification.computation import Results
from backpack.inspection.verification.plain_autograd import NotCompared

ZERO = 1e-10
"""Errors of true values that are smaller than this are relative to this."""


@dataclass(frozen=True)
class Row:
    """The largest relative error of one parameter and quantity, and the verdict on it."""

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
        table = [("parameter", "quantity", "error", "verdict")]
        for row in self.rows:
            error = "" if row.error is None else f"{row.error:.1e}"
            table.append((row.parameter, row.quantity, error, row.verdict))
        return "\n".join(aligned(table))


def verdicts(results: Results, tolerance: float) -> Iterator[Row]:
    """The verdicts on one extension; ``tolerance`` is the largest relative error that is right."""
    quantity, plain = results.extension.savefield, results.plain
    if results.error is not None:
        yield Row("", quantity, None, f"refused: {results.error}")
        return
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name in results.found:
        if plain.parameters[name].numel():
            try:
                pairs[name] = list(_pairs(results, name))
            except NotCompared as reason:
                yield Row(name, quantity, None, f"not compared: {reason}")
    if results.extension.seeds == "sampled" and pairs and results.draws_another_second_moment():
        yield Row("", quantity, None, "wrong: what is drawn has another second moment than the loss's Hessian")
    for name, error in _errors(pairs):
        yield Row(name, quantity, error, "right" if error <= tolerance else "wrong")
    for name in plain.parameters:
        if name not in results.found and plain.gradient(name, plain.loss_gradient).abs().sum() > 0:
            yield Row(name, quantity, None, "wrong: it receives a gradient, but there is no result")


def _pairs(results: Results, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Computed and true values for one parameter."""
    extension, n = results.extension, results.plain.n
    check = next((CHECKS[cls] for cls in type(extension).__mro__ if cls in CHECKS), by_definition)
    chosen = extension.subset.rows(n, torch.device("cpu"))
    samples = torch.arange(n) if chosen is None else chosen
    return check(results.found[name], Truth(results.plain, name, results, samples))


def _errors(pairs: dict[str, list[tuple[Tensor, Tensor]]]) -> Iterator[tuple[str, float]]:
    """The largest error of each parameter, relative to the largest true value.

    Results that are zero but for rounding are compared with a millionth of the largest value of all parameters.
    """
    sizes = {name: [float(true.abs().max()) for _, true in own] for name, own in pairs.items()}
    largest = [max(values) for values in zip_longest(*sizes.values(), fillvalue=0.0)]
    for name, own in pairs.items():
        scales = [max(size, 1e-6 * most, ZERO) for size, most in zip(sizes[name], largest, strict=False)]
        yield name, max(float((v - t).abs().max()) / scale for (v, t), scale in zip(own, scales, strict=True))
