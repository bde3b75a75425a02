"""Curvature is additive: what a pass gives for several extended losses is what the sum of their curvatures gives.

Ground truth: explicit Jacobians of the losses' inputs, and Hessians of the losses, in float64.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from models.small import F64, rand
from torch import Tensor, nn
from truths import close
from truths.second_order import Truth

from backpack import backpack, extend
from backpack.extensions import (
    EKFAC,
    GGNMP,
    HBP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchGrad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    DiagHessianMC,
    GGNGram,
    SqrtGGNExact,
    SqrtGGNMC,
)
from backpack.extensions.module_extension import ModuleExtension

# ---------------------------------------------------------------------------------------------------------------
# Losses of an input [N, ...], as functions of a module that may be extended


class Scores(nn.Module):
    """A value for each row: log-sum-exp and a linear part."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.logsumexp(z.flatten(1), 1) - (z * y).flatten(1).sum(1)


class Quartic(nn.Module):
    """A scalar whose entries interact within a sample."""

    def forward(self, z: Tensor) -> Tensor:
        rows = z.flatten(1)
        return (rows.square().sum(1).square() + rows.square().sum(1)).mean()


class Waves(nn.Module):
    """A scalar that is not convex."""

    def forward(self, z: Tensor) -> Tensor:
        return z.sin().sum()


Called = tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]


def cross_entropy(rng: random.Random, z: Tensor) -> Called:
    y = torch.randint(z.shape[1], (len(z), *z.shape[2:]))
    reduction = rng.choice(["mean", "sum", "none"])
    weight = torch.rand(z.shape[1], dtype=F64) if rng.random() < 0.3 else None
    loss = nn.CrossEntropyLoss(reduction=reduction, weight=weight)
    return loss, (lambda loss, z: loss(z, y).mean()) if reduction == "none" else (lambda loss, z: loss(z, y))


def squares(rng: random.Random, z: Tensor) -> Called:
    y, reduction = torch.randn_like(z), rng.choice(["mean", "sum", "none"])
    loss = nn.MSELoss(reduction=reduction)
    return loss, (lambda loss, z: loss(z, y).sum()) if reduction == "none" else (lambda loss, z: loss(z, y))


def binary(rng: random.Random, z: Tensor) -> Called:
    y = torch.rand_like(z).round()
    return nn.BCEWithLogitsLoss(reduction=rng.choice(["mean", "sum"])), lambda loss, z: loss(z, y)


def scores(rng: random.Random, z: Tensor) -> Called:
    y, weights = torch.randn_like(z), torch.rand(len(z), dtype=F64)
    reduce = rng.choice([Tensor.mean, Tensor.sum, lambda rows: weights @ rows, lambda rows: (rows * weights).sum() / 3])
    return Scores(), lambda loss, z: reduce(loss(z, y))


def quartic(rng: random.Random, z: Tensor) -> Called:
    return Quartic(), lambda loss, z: loss(z)


def waves(rng: random.Random, z: Tensor) -> Called:
    return Waves(), lambda loss, z: loss(z)


CONVEX = [cross_entropy, squares, binary, scores, quartic]


# ---------------------------------------------------------------------------------------------------------------
# Models, and what of them the losses are of


@dataclass
class Setting:
    """``inputs``: of the losses, ``[N, ...]`` each, from the models."""

    models: nn.ModuleList
    inputs: Callable[[nn.ModuleList], list[Tensor]]
    owners: list[list[int]] | None = None
    """Of the rows of each input, their samples; ``None``: rows are samples."""
    n: int | None = None
    """How many samples there are, if not as many as the rows of the first input."""


SETTINGS: dict[str, Callable[[random.Random], Setting]] = {}


def setting(function: Callable[[random.Random], Setting]) -> Callable[[random.Random], Setting]:
    SETTINGS[function.__name__] = function
    return function


def linear(i: int, o: int) -> nn.Linear:
    return nn.Linear(i, o, bias=random.random() < 0.8, dtype=F64)


def trunk(rng: random.Random, i: int, o: int) -> nn.Sequential:
    act = rng.choice([nn.Tanh, nn.Sigmoid, nn.ReLU, nn.SiLU])
    norm = rng.choice([nn.Identity(), nn.LayerNorm(o, dtype=F64), nn.PReLU(dtype=F64)])
    return nn.Sequential(linear(i, o), act(), norm)


class Heads(nn.Module):
    def __init__(self, trunk: nn.Module, *heads: nn.Module) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(heads)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.trunk(x)
        return [head(h) for head in self.heads]


@setting
def heads_of_one_trunk(rng: random.Random) -> Setting:
    x, sizes = rand(rng.randint(2, 3), 2), [rng.randint(2, 3) for _ in range(rng.randint(2, 3))]
    model = Heads(trunk(rng, 2, 3), *(linear(3, size) for size in sizes))
    return Setting(nn.ModuleList([model]), lambda models: models[0](x))


@setting
def heads_of_one_trunk_and_the_trunk(rng: random.Random) -> Setting:
    x = rand(rng.randint(2, 3), 2)
    model = Heads(trunk(rng, 2, 3), nn.Identity(), nn.Sequential(nn.Tanh(), linear(3, 2)))
    return Setting(nn.ModuleList([model]), lambda models: models[0](x))


@setting
def one_model_called_twice(rng: random.Random) -> Setting:
    n = rng.randint(2, 3)
    xs = [rand(n, 2) for _ in range(2)]
    model = nn.Sequential(trunk(rng, 2, 3), linear(3, 2))
    return Setting(nn.ModuleList([model]), lambda models: [models[0](x) for x in xs])


@setting
def parts_of_one_output(rng: random.Random) -> Setting:
    x, cut = rand(rng.randint(2, 3), 2), rng.randint(2, 3)
    model = nn.Sequential(trunk(rng, 2, 3), linear(3, 5))

    def inputs(models: nn.ModuleList) -> list[Tensor]:
        out = models[0](x)
        return [out[:, :cut], out[:, cut:], *([out[:, 1:4]] if cut == 2 else [])]

    return Setting(nn.ModuleList([model]), inputs)


@setting
def one_output(rng: random.Random) -> Setting:
    x, count = rand(rng.randint(2, 3), 2), rng.randint(2, 4)
    model = nn.Sequential(trunk(rng, 2, 3), linear(3, 2))
    return Setting(nn.ModuleList([model]), lambda models: [models[0](x)] * count)


@setting
def modules_on_top_of_each_other(rng: random.Random) -> Setting:
    x = rand(rng.randint(2, 3), 2)

    def inputs(models: nn.ModuleList) -> list[Tensor]:
        below = models[0](x)
        return [below, models[1](below), models[2](below.sin())]

    return Setting(nn.ModuleList([trunk(rng, 2, 3), linear(3, 2), linear(3, 3)]), inputs)


@setting
def two_models(rng: random.Random) -> Setting:
    x = rand(rng.randint(2, 3), 2)

    def inputs(models: nn.ModuleList) -> list[Tensor]:
        one, other = models[0](x), models[1](x)
        return [one, other, one * other]

    return Setting(nn.ModuleList([nn.Sequential(trunk(rng, 2, 3), linear(3, 2)), linear(2, 2)]), inputs)


@setting
def positions(rng: random.Random) -> Setting:
    x = rand(rng.randint(2, 3), 3, 2)
    model = nn.Sequential(trunk(rng, 2, 3), linear(3, 2))

    def inputs(models: nn.ModuleList) -> list[Tensor]:
        out = models[0](x)
        return [out[:, 0], out.transpose(1, 2), out.mean(1)]

    return Setting(nn.ModuleList([model]), inputs)


@setting
def rows_of_one_output(rng: random.Random) -> Setting:
    """A part of the samples each, in some order."""
    n = rng.randint(4, 5)
    x, order, scores = rand(n, 2), torch.randperm(n), rand(n)
    model = nn.Sequential(trunk(rng, 2, 3), linear(3, 2))

    def inputs(models: nn.ModuleList) -> list[Tensor]:
        out = models[0](x)
        return [out[:2], out.sin()[2:], out[order[:3]], out[(scores > scores.median()) | (scores < scores.mean())]]

    return Setting(nn.ModuleList([model]), inputs, [[0, 1], list(range(2, n)), order[:3].tolist(), chosen(scores)])


def chosen(scores: Tensor) -> list[int]:
    return ((scores > scores.median()) | (scores < scores.mean())).nonzero().flatten().tolist()


@setting
def positions_that_a_mask_selects(rng: random.Random) -> Setting:
    n, t = rng.randint(2, 3), rng.randint(2, 3)
    x, mask = rand(n, t, 2), torch.rand(n, t) < 0.6
    mask[0, 0] = True
    model = nn.Sequential(trunk(rng, 2, 3), linear(3, 2))

    def inputs(models: nn.ModuleList) -> list[Tensor]:
        out = models[0](x)
        return [out[mask], out[~mask | mask[:1, :1]], out[0], out[-1:, 0]]

    rows = [mask, ~mask | mask[:1, :1]]
    return Setting(nn.ModuleList([model]), inputs, [*(m.nonzero()[:, 0].tolist() for m in rows), [0] * t, [n - 1]], n)


@setting
def an_image(rng: random.Random) -> Setting:
    x = rand(rng.randint(2, 3), 1, 3, 3)
    body = nn.Sequential(nn.Conv2d(1, 2, 2, dtype=F64), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten())
    model = Heads(body, linear(2, 3), linear(2, 2))
    return Setting(nn.ModuleList([model]), lambda models: models[0](x))


@setting
def mixed_samples(rng: random.Random) -> Setting:
    x = rand(rng.randint(2, 3), 2)
    model = Heads(nn.Sequential(linear(2, 3), nn.BatchNorm1d(3, dtype=F64), nn.Tanh()), linear(3, 2), linear(3, 3))
    return Setting(nn.ModuleList([model]), lambda models: models[0](x))


# ---------------------------------------------------------------------------------------------------------------
# Truth


def is_same(loss: nn.Module, other: nn.Module) -> bool:
    kinds = [(type(f), getattr(f, "reduction", None), len(f.state_dict())) for f in (loss, other)]
    return kinds[0] == kinds[1] and kinds[0][2] == 0


@dataclass
class Total:
    """Several losses of a setting: plain, and extended."""

    setting: Setting
    calls: list[Called]
    n: int
    owners: list[list[int]]

    @staticmethod
    def drawn(name: str, rng: random.Random, kinds: list[Any]) -> Total:
        torch.manual_seed(rng.randrange(2**30))
        random.seed(rng.randrange(2**30))
        setting = SETTINGS[name](rng)
        with torch.no_grad():
            inputs = setting.inputs(copy.deepcopy(setting.models))
        same, calls = rng.random() < 0.3, []
        for z in inputs:
            loss, call = rng.choice(kinds)(rng, z)
            known = [other for other, _ in calls if same and is_same(other, loss)]
            calls.append((known[0] if known else loss, call))
        owners = setting.owners or [list(range(len(z))) for z in inputs]
        return Total(setting, calls, setting.n or max(max(own) for own in owners) + 1, owners)

    def extended(self) -> tuple[nn.ModuleList, Tensor]:
        models = copy.deepcopy(self.setting.models)
        for model in models:
            extend(model)
        values = []
        for (loss, call), z in zip(self.calls, self.setting.inputs(models), strict=True):
            values.append(call(extend(loss), z))
        return models, sum(values[1:], start=values[0])

    def plain(self) -> Truth:
        models = copy.deepcopy(self.setting.models)
        inputs = self.setting.inputs(models)
        rows = [torch.tensor(own).reshape(-1, *[1] * (z.dim() - 1)) for own, z in zip(self.owners, inputs, strict=True)]
        owners = [own.expand(z.shape) for own, z in zip(rows, inputs, strict=True)]
        return truth_of(models, inputs, self.calls, owners=owners, n=self.n)


def truth_of(model: nn.Module, inputs: list[Tensor], calls: list[Called], **options: Any) -> Truth:
    return Truth(model, inputs, [partial(call, loss) for loss, call in calls], **options)


def units(p: Tensor) -> Tensor:
    return torch.eye(p.numel(), dtype=F64).reshape(p.numel(), *p.shape)


@pytest.mark.filterwarnings("ignore:Samples are mixed", "ignore:.*taken entry by entry")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", SETTINGS)
def test_curvatures_of_several_losses_add_up(name, seed):
    rng = random.Random(f"{name} {seed}")
    total = Total.drawn(name, rng, CONVEX)
    rows = None if seed % 2 == 0 else [rng.randrange(total.n) for _ in range(rng.randint(1, 3))]
    models, loss = total.extended()
    chunk = rng.choice([None, 1, 2])
    extensions = [
        DiagGGNExact(rows, chunk),
        BatchDiagGGNExact(rows),
        SqrtGGNExact(rows, chunk),
        GGNGram(rows),
        DiagHessian(rows),
        BatchDiagHessian(rows),
        GGNMP(subsampling=rows),
        HMP(subsampling=rows),
    ]
    with backpack(*extensions):
        loss.backward(retain_graph=True)
    truth = total.plain()
    chosen = list(range(total.n)) if rows is None else rows
    for label, p in models.named_parameters():
        ggn, hessian = truth.ggn[label][chosen], truth.hessian[label][chosen]
        size = hessian.abs().max()
        each = truth.diag_ggn[label][chosen]
        assert close(p.diag_ggn_exact_batch, each, rtol=1e-9), label
        assert close(p.diag_ggn_exact, each.sum(0), rtol=1e-9), label
        each = truth.diag_hessian[label][chosen]
        assert close(p.diag_h_batch, each, size, rtol=1e-9), label
        assert close(p.diag_h, each.sum(0), size, rtol=1e-9), label
        root = p.sqrt_ggn_exact.flatten(2)
        assert close(torch.einsum("cnp,cnq->npq", root, root), ggn, rtol=1e-9), label
        assert close(p.ggn_gram, root.flatten(0, 1) @ root.flatten(0, 1).T, rtol=1e-9), label
        assert close(p.ggnmp(units(p)).detach().reshape(p.numel(), -1), ggn.sum(0), rtol=1e-9), label
        assert close(p.hmp(units(p)).detach().reshape(p.numel(), -1), hessian.sum(0), size, rtol=1e-9), label


@pytest.mark.filterwarnings("ignore:Samples are mixed", "ignore:.*taken entry by entry")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", SETTINGS)
def test_the_hessian_of_losses_that_need_not_be_convex(name, seed):
    rng = random.Random(f"not convex {name} {seed}")
    total = Total.drawn(name, rng, [*CONVEX, waves, waves])
    rows = None if seed == 0 else [total.n - 1, 0]
    models, loss = total.extended()
    with backpack(BatchDiagHessian(rows), DiagHessian(rows), HMP(subsampling=rows)):
        loss.backward(retain_graph=True)
    truth = total.plain()
    chosen = list(range(total.n)) if rows is None else rows
    for label, p in models.named_parameters():
        hessian = truth.hessian[label][chosen]
        each, size = hessian.diagonal(dim1=1, dim2=2).reshape(-1, *p.shape), hessian.abs().max()
        assert close(p.diag_h_batch, each, size, rtol=1e-9), label
        assert close(p.diag_h, each.sum(0), size, rtol=1e-9), label
        assert close(p.hmp(units(p)).detach().reshape(p.numel(), -1), hessian.sum(0), size, rtol=1e-9), label


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - {"mixed_samples"}))
def test_kronecker_factors_are_those_of_the_joined_root(name, seed):
    """Biases have the exact block; the eigenvalues of EKFAC are the block's along its bases, in each setting."""
    rng = random.Random(f"factors {name} {seed}")
    total = Total.drawn(name, rng, CONVEX)
    rows = None if seed % 2 == 0 else [total.n - 1, 0]
    models, loss = total.extended()
    with backpack(KFLR(rows), EKFAC(subsampling=rows, fisher="exact")):
        loss.backward()
    truth = total.plain()
    for label, p in models.named_parameters():
        block = truth.ggn[label][slice(None) if rows is None else rows].sum(0)
        if len(p.kflr) == 1:
            assert close(p.kflr[0], block, rtol=1e-9), label
        U = p.ekfac.bases[0].contiguous()
        for basis, factor in zip(p.ekfac.bases, p.kflr, strict=True):
            turned = basis.T @ factor @ basis
            assert close(turned, turned.diagonal().diag(), factor.abs().max(), 1e-9), label
        for basis in p.ekfac.bases[1:]:
            U = torch.kron(U, basis.contiguous())
        along = (U.T @ block @ U).diagonal()
        assert close(p.ekfac.eigenvalues.flatten(), along, block.abs().max(), rtol=1e-9), label


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("subsampling", [None, [2, 0, 2]])
def test_output_factors_add_up_and_the_input_factor_is_there_once(fisher, subsampling):
    torch.manual_seed(0)
    x, y, z = rand(4, 3), torch.randint(3, (4,)), rand(4, 2)
    first, heads = nn.Linear(3, 3, dtype=F64), [nn.Linear(3, 3, dtype=F64), nn.Linear(3, 2, dtype=F64)]
    model = Heads(nn.Sequential(first, nn.Tanh()), *heads)
    losses = [nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")]
    targets, chosen = [y, z], list(range(4)) if subsampling is None else subsampling
    output = (x @ first.weight.T + first.bias).detach().requires_grad_()
    h = output.tanh()
    B, own = torch.zeros(3, 3, dtype=F64), []
    for head, loss, target in zip(heads, losses, targets, strict=True):
        out = head(h)
        if fisher == "exact":
            H = torch.autograd.functional.hessian(lambda o, f=loss, t=target: f(o, t), out.detach())
        else:
            (g,) = torch.autograd.grad(loss(out, target), out, retain_graph=True)
            weight = 0.25 if isinstance(loss, nn.CrossEntropyLoss) else 1.0  # of a term in the loss
            H = torch.einsum("nd,me->ndme", g, g) / weight
        J = torch.stack(
            [
                torch.stack(
                    [torch.autograd.grad(out[n, d], output, retain_graph=True)[0][n] for d in range(out.shape[1])]
                )
                for n in range(4)
            ]
        )
        B += sum(J[n].T @ H[n, :, n] @ J[n] for n in chosen)
        own.append(sum(H[n, :, n] for n in chosen))
    extend(model)
    with backpack(KFLR(subsampling) if fisher == "exact" else KFAC(1, subsampling, fisher)):
        first_loss, second_loss = (extend(f)(o, t) for f, o, t in zip(losses, model(x), targets, strict=True))
        (first_loss + second_loss).backward()
    field = "kflr" if fisher == "exact" else "kfac"
    inputs = [x, h.detach(), h.detach()]
    for layer, outputs, into in zip([first, *heads], [B, *own], inputs, strict=True):
        found = getattr(layer.weight, field)
        assert close(found[0], outputs, rtol=1e-9)
        assert close(found[1], into[chosen].T @ into[chosen] / len(chosen), rtol=1e-9)
        assert close(getattr(layer.bias, field)[0], outputs, rtol=1e-9)


@pytest.mark.parametrize("subsampling", [None, [1, 0]])
def test_columns_are_in_the_order_of_the_calls(subsampling):
    torch.manual_seed(0)
    x, z = rand(3, 2), rand(3, 2)
    model = extend(nn.Linear(2, 4, bias=False, dtype=F64))
    one, other = extend(nn.MSELoss(reduction="sum")), extend(nn.MSELoss())
    out = model(x)
    second = other(out[:, 2:], z)
    first = one(out[:, :2], z)
    with backpack(SqrtGGNExact(subsampling)):
        (first + second).backward()
    chosen = x if subsampling is None else x[subsampling]
    expected = torch.zeros(4, len(chosen), 4, 2, dtype=F64)
    for column, scale in enumerate([(2 / 6) ** 0.5] * 2 + [2**0.5] * 2):
        expected[column, :, (column + 2) % 4] = scale * chosen
    assert close(model.weight.sqrt_ggn_exact, expected)


@pytest.mark.parametrize("modify", ["clip", "abs"])
def test_the_positive_curvature_modifies_what_all_losses_leave_over(modify):
    """``R`` of a function is weighed by the gradient that arrives from all losses together, and modified then."""
    torch.manual_seed(0)
    x, y, z = rand(3, 2), torch.randint(3, (3,)), rand(3, 2)
    first, heads = nn.Linear(2, 4, dtype=F64), [nn.Linear(4, 3, dtype=F64), nn.Linear(4, 2, dtype=F64)]
    a = (x @ first.weight.T + first.bias).detach().requires_grad_()
    outs = [head(a.tanh()) for head in heads]
    losses, targets = [nn.CrossEntropyLoss(), nn.MSELoss()], [y, z]
    block = torch.zeros(8, 8, dtype=F64)
    by_weight = torch.stack([torch.kron(torch.eye(4, dtype=F64), row[None]) for row in x])  # d a_n / d W
    for out, loss, target in zip(outs, losses, targets, strict=True):
        H = torch.autograd.functional.hessian(lambda o, f=loss, t=target: f(o, t), out.detach())
        for n in range(3):
            J = torch.stack([torch.autograd.grad(entry, a, retain_graph=True)[0][n] for entry in out[n]]) @ by_weight[n]
            block += J.T @ H[n, :, n] @ J
    total = sum(loss(out, target) for out, loss, target in zip(outs, losses, targets, strict=True))
    h = a.detach().tanh()
    (g,) = torch.autograd.grad(total, a)
    curved = g / (1 - h**2) * (-2 * h * (1 - h**2))
    assert (curved < 0).any()
    for n in range(3):
        R = curved[n].clamp(min=0) if modify == "clip" else curved[n].abs()
        block += by_weight[n].T @ R.diag() @ by_weight[n]
    model = extend(Heads(nn.Sequential(first, nn.Tanh()), *heads))
    one, other = (extend(f)(o, t) for f, o, t in zip(losses, model(x), targets, strict=True))
    with backpack(PCHMP(modify=modify)):
        (one + other).backward()
    assert close(first.weight.pchmp(units(first.weight)).detach().flatten(1), block, rtol=1e-9)


SIGMAS = 6.0


@pytest.mark.parametrize("name", ["heads_of_one_trunk", "parts_of_one_output", "one_model_called_twice", "one_output"])
def test_what_is_drawn_has_the_sum_as_its_expectation(name):
    total = Total.drawn(name, random.Random(f"drawn {name}"), [cross_entropy, squares, binary, scores])
    count = 400
    models, loss = total.extended()
    torch.manual_seed(1)
    with backpack(SqrtGGNMC(count), DiagGGNMC(count), BatchDiagGGNMC(count), KFAC(count)):
        loss.backward()
    truth = total.plain()
    for label, p in models.named_parameters():
        columns = p.sqrt_ggn_mc.flatten(2)
        assert len(columns) == count * len(total.calls)
        squared = columns.square()
        assert close(p.diag_ggn_mc_batch.flatten(1), squared.sum(0))
        assert close(p.diag_ggn_mc.flatten(), squared.sum((0, 1)))
        if len(p.kfac) == 1:
            assert close(p.kfac[0], torch.einsum("cnp,cnq->pq", columns, columns))
        draws = count * squared.unflatten(0, (len(total.calls), count)).sum(0)
        error = draws.std(0) / count**0.5
        off = (draws.mean(0) - truth.diag_ggn[label].flatten(1)).abs()
        assert bool((off <= SIGMAS * error + 1e-12).all()), label


def test_the_hessian_that_is_drawn_has_the_sum_as_its_expectation():
    total = Total.drawn("heads_of_one_trunk", random.Random("drawn hessian"), [cross_entropy, squares])
    truth, draws = total.plain(), []
    models, loss = total.extended()
    torch.manual_seed(1)
    for _ in range(200):
        with backpack(DiagHessianMC()):
            loss.backward(retain_graph=True)
        draws.append([p.diag_h_mc.flatten() for p in models.parameters()])
    for (label, _), found in zip(models.named_parameters(), zip(*draws, strict=True), strict=True):
        values = torch.stack(found)
        off = (values.mean(0) - truth.diag_hessian[label].sum(0).flatten()).abs()
        assert bool((off <= SIGMAS * values.std(0) / 200**0.5 + 1e-12).all()), label


@pytest.mark.parametrize("second", ["same input", "another input"])
def test_averaged_curvature_is_defined_where_all_losses_have_one_input(second):
    torch.manual_seed(0)
    x, y, z = rand(3, 2), torch.randint(2, (3,)), rand(3, 2)
    model = extend(nn.Sequential(nn.Linear(2, 2, dtype=F64), nn.Sigmoid(), nn.Linear(2, 2, dtype=F64)))
    one, other = extend(nn.CrossEntropyLoss()), extend(nn.MSELoss())
    extensions = [
        KFRA(),
        HBP("hessian", "exact", "average", "E[J^T E(H) J]"),
    ]
    out = model(x)
    loss = one(out, y) + other(out if second == "same input" else out.tanh(), z)
    if second == "another input":
        for extension in extensions:
            words = "CrossEntropyLoss and MSELoss, have different inputs"
            with pytest.raises(RuntimeError, match=words), backpack(extension):
                loss.backward(retain_graph=True)
        return
    with backpack(*extensions):
        loss.backward()
    f = lambda out: nn.functional.cross_entropy(out, y) + nn.functional.mse_loss(out, z)  # noqa: E731
    H = torch.autograd.functional.hessian(f, out.detach())
    H = sum(H[n, :, n] for n in range(3))
    last = model[2].weight
    assert close(last.kfra[0], H, rtol=1e-9) and close(last.hbp[0], H, rtol=1e-9)
    a = model[0](x).detach().requires_grad_()
    h = a.sigmoid()
    slope = (h * (1 - h)).detach()
    pulled = last.detach().T @ H @ last.detach() * (slope.T @ slope / 3)
    assert close(model[0].weight.kfra[0], pulled, rtol=1e-9)
    (g,) = torch.autograd.grad(f(h @ last.detach().T + model[2].bias.detach()), h)
    R = (g * slope * (1 - 2 * h.detach())).sum(0)
    assert close(model[0].weight.hbp[0], pulled + R.diag(), rtol=1e-9)


def test_a_factor_of_one_loss_warns_and_leaves_the_others():
    torch.manual_seed(0)
    x, z = rand(3, 2), rand(3, 2)
    model, one, other = extend(nn.Linear(2, 2, dtype=F64)), extend(nn.MSELoss()), extend(nn.BCEWithLogitsLoss())
    out = model(x)
    with pytest.warns(UserWarning, match=r"MSELoss was multiplied by a factor \(2\)"), backpack(DiagGGNExact()):
        (2 * one(out, z) + other(out, z.sigmoid())).backward()
    p = out.detach().sigmoid()
    H = 2 / 6 + p * (1 - p) / 6
    assert close(model.weight.diag_ggn_exact, H.T @ x.square())


# ---------------------------------------------------------------------------------------------------------------
# Losses of rows


@pytest.mark.parametrize(
    "reduce", [Tensor.mean, Tensor.sum, lambda rows: (rows / 7).sum(), lambda rows: rows[1:].mean()]
)
def test_a_loss_that_returns_a_value_for_each_row_is_one(reduce):
    torch.manual_seed(0)
    x, y = rand(4, 3), rand(4, 2)
    model, lossfunc = nn.Sequential(nn.Linear(3, 3, dtype=F64), nn.Tanh(), nn.Linear(3, 2, dtype=F64)), Scores()
    call = lambda loss, z: reduce(loss(z, y))  # noqa: E731
    truth = truth_of(model, [model(x)], [(lossfunc, call)])
    extend(model)
    with backpack(BatchGrad(), DiagGGNExact(), DiagHessian(), KFAC(fisher="empirical")):
        call(extend(lossfunc), model(x)).backward()
    weights = torch.autograd.functional.jacobian(reduce, torch.zeros(4, dtype=F64))
    for label, p in zip(truth.parameters, model.parameters(), strict=True):
        assert close(p.diag_ggn_exact.flatten(), truth.diag_ggn[label].sum(0).flatten(), rtol=1e-9)
        assert close(p.diag_h.flatten(), truth.diag_hessian[label].sum(0).flatten(), rtol=1e-9)
        assert close(p.grad_batch.sum(0), p.grad)
        if len(p.kfac) == 1:
            own = p.grad_batch.flatten(1)[weights > 0]
            assert close(p.kfac[0], own.T @ (own / weights[weights > 0, None]), rtol=1e-9)


class ScoresOfPositions(nn.Module):
    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.logsumexp(z, -1) - (z * y).sum(-1)


@pytest.mark.parametrize("reduce", [Tensor.mean, Tensor.sum, lambda values: values[:, 1:].mean()])
def test_a_loss_that_returns_a_value_for_each_position_is_one(reduce):
    torch.manual_seed(0)
    x, y = rand(3, 2, 3), rand(3, 2, 2)
    model, lossfunc = (
        nn.Sequential(nn.Linear(3, 3, dtype=F64), nn.Tanh(), nn.Linear(3, 2, dtype=F64)),
        ScoresOfPositions(),
    )
    call = lambda loss, z: reduce(loss(z, y))  # noqa: E731
    truth = truth_of(model, [model(x)], [(lossfunc, call)])
    extend(model)
    with backpack(DiagGGNExact(), DiagHessian()):
        call(extend(lossfunc), model(x)).backward()
    for label, p in zip(truth.parameters, model.parameters(), strict=True):
        assert close(p.diag_ggn_exact.flatten(), truth.diag_ggn[label].sum(0).flatten(), rtol=1e-9)
        assert close(p.diag_h.flatten(), truth.diag_hessian[label].sum(0).flatten(), rtol=1e-9)


class Weighted(nn.Module):
    """A loss that is made of others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")

    def forward(self, z: Tensor, y: Tensor, target: Tensor) -> Tensor:
        return 0.3 * self.one(z, y) + 2 * self.other(z.tanh(), target) + self.one(z[:, :2], y)


def test_a_loss_that_is_made_of_others_is_one_loss():
    torch.manual_seed(0)
    x, y, target = rand(4, 3), torch.randint(2, (4,)), rand(4, 3)
    model, lossfunc = nn.Sequential(nn.Linear(3, 3, dtype=F64), nn.Tanh(), nn.Linear(3, 3, dtype=F64)), Weighted()
    call = lambda loss, z: loss(z, y, target)  # noqa: E731
    truth = truth_of(model, [model(x)], [(lossfunc, call)])
    extend(model)
    with backpack(DiagHessian(), HMP(), BatchDiagHessian()):
        call(extend(lossfunc), model(x)).backward()
    for label, p in zip(truth.parameters, model.parameters(), strict=True):
        hessian = truth.hessian[label]
        assert close(p.diag_h_batch.flatten(1), hessian.diagonal(dim1=1, dim2=2), rtol=1e-9)
        assert close(p.diag_h.flatten(), hessian.diagonal(dim1=1, dim2=2).sum(0), rtol=1e-9)
        assert close(p.hmp(units(p)).detach().reshape(p.numel(), -1), hessian.sum(0), rtol=1e-9)


def test_results_of_several_losses_can_be_differentiated():
    torch.manual_seed(0)
    x, y, z = rand(3, 2), torch.randint(3, (3,)), rand(3, 2)
    model = Heads(nn.Sequential(nn.Linear(2, 3, dtype=F64), nn.Tanh()), *(nn.Linear(3, s, dtype=F64) for s in (3, 2)))
    losses = [(nn.CrossEntropyLoss(), lambda loss, out: loss(out, y)), (nn.MSELoss(), lambda loss, out: loss(out, z))]

    def total(model: nn.Module) -> Tensor:
        truth = truth_of(model, model(x), losses)
        return sum(diagonal.sum() for diagonal in truth.diag_ggn.values())

    ours = extend(copy.deepcopy(model))
    values = [call(extend(loss), out) for (loss, call), out in zip(losses, ours(x), strict=True)]
    with backpack(DiagGGNExact()):
        torch.autograd.grad(values[0] + values[1], list(ours.parameters()), create_graph=True)
    found = sum(p.diag_ggn_exact.sum() for p in ours.parameters())
    assert close(found, total(model), rtol=1e-9)
    directions = [torch.randn_like(p) for p in model.parameters()]
    grads = torch.autograd.grad(found, list(ours.parameters()), materialize_grads=True)
    step, moved = 1e-5, []
    for sign in (1, -1):
        there = copy.deepcopy(model)
        with torch.no_grad():
            for p, direction in zip(there.parameters(), directions, strict=True):
                p.add_(direction, alpha=sign * step)
        moved.append(total(there))
    slope = sum((g * direction).sum() for g, direction in zip(grads, directions, strict=True))
    assert close(slope, (moved[0] - moved[1]) / (2 * step), rtol=1e-6)


def test_hooks_and_rules_see_the_columns_of_all_losses():
    class Columns(ModuleExtension):
        def __init__(self) -> None:
            super().__init__(["weight"])

        def weight(self, ext: Any, module: nn.Module, g_inp: Any, g_out: Any, columns: Tensor) -> Tensor:
            return torch.einsum("vno,ni->oi", columns.square(), module.input0.square())

    torch.manual_seed(0)
    x, y, z = rand(3, 2), torch.randint(3, (3,)), rand(3, 2)
    model = Heads(nn.Sequential(nn.Linear(2, 3, dtype=F64), nn.Tanh()), *(nn.Linear(3, s, dtype=F64) for s in (3, 2)))
    one, other, done = extend(nn.CrossEntropyLoss()), extend(nn.MSELoss()), []
    ruled = DiagGGNExact()
    ruled.savefield = "by_rule"
    ruled.set_module_extension(nn.Linear, Columns(), overwrite=True)

    def hook(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            done.append(id(module))
            assert all(hasattr(p, "diag_ggn_exact") for p in module.parameters())

    extend(model)
    with backpack(DiagGGNExact(), extension_hook=hook):
        outs = model(x)
        (one(outs[0], y) + other(outs[1], z)).backward()
    assert len(done) == 3 and len(set(done)) == 3
    with backpack(ruled):
        outs = model(x)
        (one(outs[0], y) + other(outs[1], z)).backward()
    for layer in (model.trunk[0], *model.heads):
        assert close(layer.weight.by_rule, layer.weight.diag_ggn_exact, rtol=1e-9)


@pytest.mark.parametrize("reduce", [lambda rows: rows.square().mean(), lambda rows: rows.exp().sum().log()])
def test_a_loss_of_rows_that_is_changed_afterwards_is_none(reduce):
    torch.manual_seed(0)
    model, lossfunc = extend(nn.Linear(3, 2, dtype=F64)), extend(Scores())
    loss = reduce(lossfunc(model(rand(4, 3)), rand(4, 2)))
    with pytest.raises(RuntimeError, match="did not start from an extended loss"), backpack(DiagGGNExact()):
        loss.backward()


def test_layers_that_are_extended_one_by_one_are_no_losses():
    torch.manual_seed(0)
    x, y = rand(4, 3), rand(4)
    layers = [nn.Linear(3, 2, dtype=F64), nn.Tanh(), nn.Linear(2, 1, dtype=F64), nn.Flatten(0), nn.Sigmoid()]
    model = nn.Sequential(*layers)
    truth = truth_of(model, [model(x)], [(nn.MSELoss(), lambda loss, z: loss(z, y))])
    for layer in layers:
        extend(layer)
    with backpack(DiagGGNExact()):
        extend(nn.MSELoss())(model(x), y).backward()
    for label, p in zip(truth.parameters, model.parameters(), strict=True):
        assert close(p.diag_ggn_exact.flatten(), truth.diag_ggn[label].sum(0).flatten(), rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------------
# Terms beside extended losses


def model_and_loss() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, dtype=F64), nn.Tanh(), nn.Linear(3, 2, dtype=F64))
    return extend(model), extend(nn.MSELoss()), rand(4, 3), rand(4, 2)


def of_the_output(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).abs().mean()


def of_a_plain_loss(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long))


def gradient_penalty(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return g.square().sum()


@pytest.mark.parametrize("term", [of_the_output, of_a_plain_loss, gradient_penalty])
@pytest.mark.parametrize("extension", [DiagGGNExact, DiagHessian, KFAC, HMP, KFRA])
def test_a_term_beside_the_losses_is_an_error_that_names_it(term, extension):
    model, lossfunc, x, y = model_and_loss()
    loss = lossfunc(model(x), y) + 0.1 * term(model, x)
    words = {
        of_the_output: f"{extension.__name__}: .* Mul of Mean of Abs of the output of Sequential",
        of_a_plain_loss: "Mul of NllLoss of LogSoftmax of the output of Sequential",
        gradient_penalty: "Mul of Sum of",
    }
    with pytest.raises(RuntimeError, match=words[term] + r".*extend\(\)"), backpack(extension(), BatchGrad()):
        loss.backward()
    assert not any(hasattr(p, "grad_batch") or p.grad is not None for p in model.parameters())


def test_the_remedy_for_a_term_beside_the_losses():
    class Absolute(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return 0.1 * z.square().mean()

    model, lossfunc, x, y = model_and_loss()
    out = model(x)
    with backpack(DiagGGNExact()):
        (lossfunc(out, y) + extend(Absolute())(out)).backward()
    found = [p.diag_ggn_exact for p in model.parameters()]
    out = model(x)
    with pytest.warns(UserWarning, match="factor"), backpack(DiagGGNExact()):
        (1.1 * lossfunc(out, y)).backward()
    assert all(close(a, 1.1 * p.diag_ggn_exact) for a, p in zip(found, model.parameters(), strict=True))


def test_a_pass_that_does_not_come_to_the_term_has_results():
    model, lossfunc, x, y = model_and_loss()
    out, other = model(x), model(2 * x)
    loss = lossfunc(out, y) + other.abs().sum()
    with backpack(DiagGGNExact()):
        torch.autograd.grad(loss, out, retain_graph=True)
    assert all(hasattr(p, "diag_ggn_exact") for p in model.parameters())
    with pytest.raises(RuntimeError, match="Sum of Abs of the output"), backpack(DiagGGNExact()):
        torch.autograd.grad(loss, [out, other])


def test_a_loss_that_depends_on_no_parameter_adds_nothing():
    model, lossfunc, x, y = model_and_loss()
    free = rand(4, 2).requires_grad_()
    out = model(x)
    with backpack(DiagGGNExact()):
        lossfunc(out, y).backward(retain_graph=True)
    before = [p.diag_ggn_exact for p in model.parameters()]
    with backpack(DiagGGNExact()):
        (lossfunc(out, y) + extend(nn.MSELoss())(free, y)).backward()
    assert all(torch.equal(p.diag_ggn_exact, found) for p, found in zip(model.parameters(), before, strict=True))


def test_losses_of_different_numbers_of_samples_are_an_error():
    model, lossfunc, x, y = model_and_loss()
    loss = lossfunc(model(x), y) + lossfunc(model(x[:3]), y[:3])
    with pytest.raises(RuntimeError, match="4 and 3 samples|3 and 4 samples"), backpack(DiagGGNExact()):
        loss.backward()


# ---------------------------------------------------------------------------------------------------------------
# Nothing old survives


@pytest.mark.parametrize("extension", [BatchGrad(), ClippedGrad(0.1), DiagGGNExact(), KFAC(), HMP(), SqrtGGNExact()])
def test_what_a_pass_does_not_reach_keeps_no_old_result(extension):
    torch.manual_seed(0)

    class Tasks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Linear(3, 3, dtype=F64)
            self.heads = nn.ModuleList([nn.Linear(3, 2, dtype=F64), nn.Linear(3, 2, dtype=F64)])

        def forward(self, x: Tensor, task: int) -> Tensor:
            return self.heads[task](self.trunk(x))

    model, lossfunc, x, y = extend(Tasks()), extend(nn.MSELoss()), rand(4, 3), rand(4, 2)
    bystander = extend(nn.Linear(3, 2, dtype=F64))
    with backpack(extension):
        lossfunc(bystander(x), y).backward()
    for task in (0, 1):
        model.trunk.bias.requires_grad_(task == 0)
        with backpack(extension):
            lossfunc(model(x, task), y).backward()
        for place, head in enumerate(model.heads):
            assert all(hasattr(p, extension.savefield) == (place == task) for p in head.parameters())
        assert hasattr(model.trunk.weight, extension.savefield)
        assert hasattr(model.trunk.bias, extension.savefield) == (task == 0)
    assert all(hasattr(p, extension.savefield) for p in bystander.parameters())


def test_a_pass_that_fails_leaves_no_old_result():
    model, lossfunc, x, y = model_and_loss()
    with backpack(DiagGGNExact()):
        lossfunc(model(x), y).backward()
    with pytest.raises(RuntimeError, match="not an extended loss"), backpack(DiagGGNExact()):
        (lossfunc(model(x), y) + model(x).sum()).backward()
    assert not any(hasattr(p, "diag_ggn_exact") for p in model.parameters())


def test_results_of_other_extensions_stay():
    model, lossfunc, x, y = model_and_loss()
    with backpack(DiagGGNExact()):
        lossfunc(model(x), y).backward()
    with backpack(BatchGrad()):
        lossfunc(model(x), y).backward()
    assert all(hasattr(p, "diag_ggn_exact") and hasattr(p, "grad_batch") for p in model.parameters())
