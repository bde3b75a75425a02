"""What a model went through before a pass does not matter: results are those of a new model in the same state."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import pytest
import torch
from models.small import F64, Fn, L, P, rand
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import (
    KFAC,
    KFLR,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)

BACKWARDS = slice(None, None, -1)
FIRST = [
    lambda: [BatchGrad(), Variance()],
    lambda: [BatchL2Grad(), BatchDotGrad([0, 0])],
    lambda: [ClippedGrad(0.1)],
    lambda: [SumGradSquared(BACKWARDS)],
]
SECOND = [
    lambda: [BatchGrad(), DiagGGNExact()],
    lambda: [BatchDiagGGNExact([0, 0]), SqrtGGNExact()],
    lambda: [DiagGGNMC(2), SqrtGGNMC(2), KFAC()],
    lambda: [KFLR(BACKWARDS), BatchGrad([0])],
    lambda: [DiagHessian()],
    lambda: [BatchDiagHessian([0]), DiagGGNExact([0])],
]


def routed(s: Any, x: Tensor, branch: int, place: Tensor) -> Tensor:
    n, t = x.shape[:2]
    h = s.norm(s.a(x).flatten(0, 1)).reshape(n, t, 4)
    choice = s.route(h).argmax(-1)
    out = torch.zeros_like(h)
    for k, expert in enumerate(s.experts):
        rows = (choice == k).nonzero(as_tuple=True)
        if len(rows[0]):
            out = out.index_put(rows, expert(h[rows]), accumulate=True)
    order = place.argsort(descending=True)
    h = (s.drop(out + s.p[:t]))[order][order.argsort()]
    return s.heads[branch](h.tanh().mean(1)) * s.scale


def model_of_many_ways() -> nn.Module:
    """Experts, of which some get no row, two heads, rows that are sorted, dropout, statistics of batches."""
    parts: dict[str, Any] = {
        "a": nn.utils.parametrizations.weight_norm(L(3, 4)),
        "norm": nn.BatchNorm1d(4, dtype=F64),
        "route": L(4, 3),
        "experts": nn.ModuleList(L(4, 4) for _ in range(3)),
        "drop": nn.Dropout(0.2),
        "p": P(4, 4),
        "heads": nn.ModuleList([L(4, 2), L(4, 3)]),
        "scale": P(),
    }
    return Fn(routed, **parts)


def a_step(model: nn.Module, batch: tuple[Any, ...], training: bool, extensions: list[Any], draw: int) -> str | None:
    """The beginning of the message, if there is an error; without extensions, a plain step."""
    *inputs, target, reduction = batch
    model.train(training)
    model.zero_grad()
    lossfunc = nn.CrossEntropyLoss(reduction=reduction)
    torch.manual_seed(draw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not extensions:
            lossfunc(model(*inputs), target).backward()
            return None
        try:
            with backpack(*extensions):
                extend(lossfunc)(model(*inputs), target).backward()
        except RuntimeError as raised:
            return str(raised).partition(":")[0]
    return None


def check_history(choices: list[Any], seed: int, steps: int = 5) -> None:
    rng = random.Random(f"history {seed}")
    torch.manual_seed(seed)
    model = model_of_many_ways()
    ours = extend(copy.deepcopy(model))
    for draw in range(steps):
        n, t, branch, training = rng.randint(1, 5), rng.randint(2, 4), rng.randrange(2), rng.random() < 0.4
        batch = (rand(n, t, 3), branch, torch.rand(n), torch.randint(2 + branch, (n,)), rng.choice(["mean", "sum"]))
        extensions = rng.choice(choices)
        frozen = rng.choice([None, "a", "norm", "experts", "heads"])
        for name, part in ours.named_children():
            part.requires_grad_(name != frozen)
        fresh = copy.deepcopy(model)
        for p, q in zip(ours.parameters(), fresh.parameters(), strict=True):
            q.requires_grad_(p.requires_grad)
        fresh.load_state_dict(ours.state_dict())
        plain = copy.deepcopy(fresh)
        extend(fresh)
        one = a_step(ours, batch, training, extensions(), draw)
        assert one == a_step(fresh, batch, training, extensions(), draw)
        same_state(ours, fresh, draw)
        if one is not None:
            continue
        a_step(plain, batch, training, [], draw)
        same_state(ours, plain, draw)
        for (name, p), q, r in zip(ours.named_parameters(), fresh.parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (r.grad is None), (draw, name)
            assert p.grad is None or torch.equal(p.grad, r.grad), (draw, name, "gradient")
            for field in {e.savefield for e in extensions()} if p.grad is not None else ():
                a, b = (leaves(getattr(own, field, None)) for own in (p, q))
                assert len(a) == len(b), (draw, name, field)
                assert all(map(torch.equal, a, b)), (draw, name, field)


def same_state(one: nn.Module, other: nn.Module, draw: int) -> None:
    for key, value in other.state_dict().items():
        assert torch.equal(value, one.state_dict()[key]), (draw, key)


def leaves(found: Any) -> list[Tensor]:
    return [] if found is None else found if isinstance(found, list) else [found]


@pytest.mark.parametrize("seed", range(6))
def test_first_order_does_not_depend_on_earlier_passes(seed):
    check_history(FIRST, seed)


@pytest.mark.parametrize("seed", range(3))
def test_second_order_does_not_depend_on_earlier_passes(seed):
    check_history(SECOND, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 15))
def test_many_earlier_passes_do_not_matter(seed):
    check_history([*FIRST, *SECOND], seed, 10)
