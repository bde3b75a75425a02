"""Random models of many kinds: quantities of second order, and the gradient, against plain autograd."""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models.kinds import FURTHER, KINDS, Kind, Step
from torch import Tensor, nn
from truths.second_order import Truth, owners_along, twice_differentiable

from backpack import backpack, extend
from backpack.extensions import (
    KFAC,
    KFLR,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
)

# ---------------------------------------------------------------------------------------------------------------
# What is given to the loss


@dataclass
class Given:
    """The input of a loss, and whose its entries are."""

    input: Tensor
    owners: Tensor


def as_it_is(step: Step) -> Given:
    out, axis = rows_of(step)
    return Given(out, owners_along(out, axis))


def by_samples(step: Step) -> Given:
    out, axis = rows_of(step)
    out = out.movedim(axis, 0)
    out = out.flatten(1) if out.dim() > 1 else torch.stack([out, out.sin()], 1)
    return Given(out, owners_along(out))


def by_positions(step: Step) -> Given:
    out, axis = rows_of(step)
    out = out.movedim(axis, 0)
    return Given(out.flatten(0, -2), owners_along(out).flatten(0, -2))


def classes_second(step: Step) -> Given:
    out, axis = rows_of(step)
    out = out.movedim(axis, 0).movedim(-1, 1)
    return Given(out, owners_along(out))


def rows_of(step: Step) -> tuple[Tensor, int]:
    if step.terms is not None:
        return step.terms, 0
    assert step.output is not None
    return step.output, step.axis


def a_head(rng: random.Random, step: Step) -> tuple[Callable[[Step], Given], nn.Module, Tensor]:
    """How the output of a step is given to a loss, a loss, and a target."""
    out, axis = rows_of(step)
    heads = [as_it_is, by_samples]
    if out.dim() > 2:
        heads += [classes_second] + [by_positions] * (axis == 0)
    head = rng.choice(heads)
    reduction = rng.choice(["mean", "sum"])
    input = head(step).input.detach()
    if head is as_it_is or input.shape[1] == 1 or rng.random() < 0.3:
        return head, nn.MSELoss(reduction=reduction), torch.randn_like(input)
    classes = input.shape[1]
    return head, nn.CrossEntropyLoss(reduction=reduction), torch.randint(classes, (len(input), *input.shape[2:]))


# ---------------------------------------------------------------------------------------------------------------
# The truth


@dataclass
class Expected:
    """Of a parameter: individual gradients ``[n, *p]``, GGN blocks ``[n, P, P]``, Hessian diagonals ``[n, *p]``."""

    grads: Tensor
    ggn: Tensor
    hessian: Tensor

    def diag_ggn(self) -> Tensor:
        return self.ggn.diagonal(dim1=1, dim2=2).reshape(self.grads.shape)


def differences(of: Callable[[], list[Tensor]], parameters: list[Tensor], step: float = 1e-5) -> list[Tensor]:
    """The same by central differences of the terms' gradients, ``[n, *p]`` of each parameter."""
    found = []
    for place, p in enumerate(parameters):
        columns = []
        for k in range(p.numel()):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.flatten()[k] += sign * step
                sides.append(of()[place].reshape(-1, p.numel())[:, k])
                with torch.no_grad():
                    p.flatten()[k] -= sign * step
            columns.append((sides[0] - sides[1]) / (2 * step))
        found.append(torch.stack(columns, 1).reshape(-1, *p.shape))
    return found


def near(found: Tensor, truth: Tensor, what: Any, most: float = 1e-8) -> None:
    """Equal to 1e-8 of the parameter's largest entry; zeros, as behind a normalization, are rounding below 1e-14."""
    found, truth = found.detach(), truth.detach()
    assert found.shape == truth.shape, (what, found.shape, truth.shape)
    size = float(truth.abs().max().clamp_min(1e-6)) if truth.numel() else 1.0
    error = float((found - truth).abs().max()) / size if truth.numel() else 0.0
    assert error <= most, (what, error)


def rows_in(root: Tensor) -> Tensor:
    return root.reshape(*root.shape[:2], -1)


# ---------------------------------------------------------------------------------------------------------------
# The laws


class Runner:
    """A model of a kind, extended, next to the truth of the plain one."""

    def __init__(self, kind: Kind, rng: random.Random) -> None:
        self.kind, self.rng, plain = kind, rng, kind.model
        self.ours = extend(copy.deepcopy(plain))
        of = {name: p for name, p in plain.named_parameters() if p.requires_grad}
        self.state = copy.deepcopy(plain.state_dict())
        torch.manual_seed(7)
        made = kind.step(plain)
        self.head, self.loss, self.target = a_head(rng, made)
        given = self.head(made)
        truth = self.truth_of(given)
        self.n, grads, ggn = truth.n, truth.grads, truth.ggn
        self.loss(given.input, self.target).backward()
        self.grads = {name: p.grad for name, p in of.items()}
        self.after = copy.deepcopy(plain.state_dict())
        plain.load_state_dict(self.state)
        torch.manual_seed(7)
        try:
            with twice_differentiable():
                hessian = self.truth_of(self.head(kind.step(plain))).diag_hessian
            self.has_hessian = True
        except RuntimeError:  # no second derivative

            def terms() -> list[Tensor]:
                torch.manual_seed(7)
                return list(self.truth_of(self.head(kind.step(plain))).grads.values())

            hessian = dict(zip(of, differences(terms, list(of.values())), strict=True))
            self.has_hessian = False
        self.truth = {name: Expected(grads[name], ggn[name], hessian[name]) for name in of}
        self.twice = [self.n - 1, 0, self.n - 1]
        self.extended = extend(copy.deepcopy(self.loss))

    def truth_of(self, given: Given) -> Truth:
        return Truth(self.kind.model, [given.input], [lambda z: self.loss(z, self.target)], [given.owners])

    def subset(self, chosen: bool) -> tuple[Any, list[int]]:
        return (self.twice, self.twice) if chosen else (None, list(range(self.n)))

    def run(self, *extensions: Any) -> dict[str, nn.Parameter]:
        """One backward pass, which leaves the gradient and the state of the plain model."""
        ours = self.ours
        ours.load_state_dict(self.state)
        ours.zero_grad()
        torch.manual_seed(7)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = self.extended(self.head(self.kind.step(ours)).input, self.target)
            torch.manual_seed(11)
            with backpack(*extensions):
                loss.backward()
        mine = dict(ours.named_parameters())
        for name, grad in self.grads.items():
            p = mine[name]
            assert (p.grad is None) == (grad is None), ("grad", name)
            assert grad is None or torch.equal(p.grad.to_dense(), grad.to_dense()), ("grad", name)
        for key, value in ours.state_dict().items():
            assert torch.equal(value, self.after[key]), ("state", key)
        return mine

    def results(self, mine: dict[str, nn.Parameter], field: str) -> Any:
        """The field of each parameter, with its truth."""
        for name, truth in self.truth.items():
            if hasattr(mine[name], field):
                found = getattr(mine[name], field)
                delattr(mine[name], field)
                yield name, found, truth
            else:
                assert not truth.grads.any(), (name, field, "is missing")
                assert not truth.ggn.any(), (name, field, "is missing")

    def diagonals(self, chosen: list[bool], keep: int = 6) -> None:
        """Some exact quantities together, each of all samples or of the ``chosen`` ones."""
        picked = [self.subset(one) for one in chosen]
        w, rows = [c[0] for c in picked], [c[1] for c in picked]
        exact: dict[Any, Callable[[Expected], Tensor]] = {
            BatchGrad(w[0]): lambda t: t.grads[rows[0]],
            DiagGGNExact(w[1]): lambda t: t.diag_ggn()[rows[1]].sum(0),
            BatchDiagGGNExact(w[2]): lambda t: t.diag_ggn()[rows[2]],
            SqrtGGNExact(w[3]): lambda t: t.ggn[rows[3]],
        }
        twice: dict[Any, Callable[[Expected], Tensor]] = {
            DiagHessian(w[4]): lambda t: t.hessian[rows[4]].sum(0),
            BatchDiagHessian(w[5]): lambda t: t.hessian[rows[5]],
        }
        together = list(exact) + (list(twice) if self.has_hessian else [])
        together = self.rng.sample(together, min(keep, len(together)))
        mine = self.run(*together)
        for extension in together:
            for name, found, truth in self.results(mine, extension.savefield):
                if isinstance(extension, SqrtGGNExact):
                    assert found.shape[2:] == truth.grads.shape[1:], (name, extension.savefield, found.shape)
                    found = torch.einsum("cni,cnj->nij", rows_in(found), rows_in(found))
                near(found, {**exact, **twice}[extension](truth), (name, extension.savefield))
        for extension, expected in twice.items() if not self.has_hessian else ():
            try:
                mine = self.run(extension)
            except RuntimeError as error:
                assert "second derivative" in str(error)  # noqa: PT017
                continue
            for name, found, truth in self.results(mine, extension.savefield):
                near(found, expected(truth), (name, extension.savefield), 1e-5)  # the truth is by differences

    def factors(self, chosen: bool) -> None:
        """Drawn columns, and blocks that are one factor."""
        w, rows = self.subset(chosen)
        count = self.rng.randint(1, 3)
        mine = self.run(SqrtGGNMC(count, w), BatchGrad())
        drawn = {name: rows_in(found) for name, found, _ in self.results(mine, "sqrt_ggn_mc")}
        apart = [] if self.kind.mixes else [KFLR(w), KFAC(count, w)]
        mine = self.run(DiagGGNMC(count, w), *apart[:1])
        for name, found, _ in self.results(mine, "diag_ggn_mc"):
            near(found.flatten(), drawn[name].square().sum((0, 1)), (name, "diag_ggn_mc"))
        if self.kind.mixes:
            return
        for name, found, t in self.results(mine, "kflr"):
            if len(found) == 1 and found[0].dim() == 2:
                near(found[0], t.ggn[rows].sum(0), (name, "kflr"))
        mine = self.run(*apart[1:])
        for name, found, _ in self.results(mine, "kfac"):
            if len(found) == 1 and found[0].dim() == 2:
                near(found[0], torch.einsum("cni,cnj->ij", drawn[name], drawn[name]), (name, "kfac"))


def laws(kind: Kind, rng: random.Random) -> None:
    runner = Runner(kind, rng)
    chosen = [rng.random() < 0.5 for _ in range(6)]
    runner.diagonals(chosen)
    runner.diagonals([not one for one in chosen])
    runner.diagonals([rng.random() < 0.5 for _ in range(6)], rng.randint(1, 2))
    runner.factors(rng.random() < 0.5)


ALL = {**KINDS, **FURTHER}


def cases(seeds: range) -> list[tuple[str, int]]:
    """Names of kinds and seeds."""
    return [(name, seed) for name in ALL for seed in seeds]


def law_of(name: str, seed: int) -> None:
    """Where two axes of the output have the batch's size, and nothing tells which it is, that is an error."""
    rng = random.Random(f"second order {name}{seed}")
    torch.manual_seed(rng.randrange(2**30))
    try:
        laws(ALL[name](rng), rng)
    except RuntimeError as error:
        found = re.search(r"of shape \[(.*)\], does not tell where its samples lie", str(error))
        if found is None or len(set(found[1].split(", "))) == len(found[1].split(", ")):
            raise


@pytest.mark.parametrize(("name", "seed"), cases(range(1)))
def test_quantities_of_second_order_are_those_of_plain_autograd(name, seed):
    law_of(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), cases(range(1, 5)))
def test_quantities_of_more_models_are_those_of_plain_autograd(name, seed):
    law_of(name, seed)
