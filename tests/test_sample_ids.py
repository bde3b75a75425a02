"""``sample_ids``: users say which sample each leading entry of the model's output belongs to, ``-1`` for none."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.small import F64, Fn, L, P, rand
from torch import Tensor, nn
from truths.autograd import gradients
from truths.first_order import clipped, norms_of, quantities
from truths.second_order import Truth

from backpack import backpack, extend
from backpack.extensions import (
    GGNMP,
    HBP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    GGNGram,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

# ---------------------------------------------------------------------------------------------------------------
# Models


@dataclass
class Case:
    """A model, what it is called with, and ``units``: a number for each leading entry of the output.

    Entries of different units do not depend on each other (unless the case ``mixes``), so that samples may be made of
    any units.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    units: Tensor
    mixes: bool = False


def grouped(rng: random.Random, groups: int, least: int = 1) -> Tensor:
    """Ragged groups one after another: ``[0, 0, 0, 1, 2, 2]``."""
    return torch.arange(groups).repeat_interleave(torch.tensor([rng.randint(least, 3) for _ in range(groups)]))


def attention(s: Any, h: Tensor, apart: Tensor | None = None) -> Tensor:
    """``[n, t, d]``; ``apart``: pairs of positions that do not see each other."""
    scores = s.query(h) @ s.key(h).transpose(1, 2)
    if apart is not None:
        scores = scores.masked_fill(apart, float("-inf"))
    return scores.softmax(-1) @ s.value(h)


def heads_of_attention(size: int) -> dict[str, nn.Module]:
    return {"query": L(size, 2), "key": L(size, 2), "value": L(size, size)}


def one_way(s: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """A layer of messages along edges."""
    h = s.a(x).tanh()
    messages = s.message(torch.cat([h.index_select(0, source), h.index_select(0, target)], 1)).tanh()
    return h + torch.zeros_like(h).index_add(0, target, messages)


def a_graph(rng: random.Random) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of nodes, edges inside of graphs, and the graph of each node."""
    batch = grouped(rng, rng.randint(2, 3))
    pairs = [(a, b) for a in range(len(batch)) for b in range(len(batch)) if batch[a] == batch[b]]
    edges = torch.tensor(rng.sample(pairs, rng.randint(1, len(pairs))))
    return rand(len(batch), 2), edges[:, 0], edges[:, 1], batch


CASES: dict[str, Callable[[random.Random], Case]] = {}
MIXED: dict[str, Callable[[random.Random], Case]] = {}


def case(f: Callable[[random.Random], Case]) -> Callable[[random.Random], Case]:
    CASES[f.__name__] = f
    return f


def mixed(f: Callable[[random.Random], Case]) -> Callable[[random.Random], Case]:
    MIXED[f.__name__] = f
    return f


@case
def perceptron(rng: random.Random) -> Case:
    n = rng.randint(3, 6)
    return Case(nn.Sequential(L(3, 4), nn.Tanh(), L(4, 2)), (rand(n, 3),), torch.arange(n))


@case
def convolutions(rng: random.Random) -> Case:
    n = rng.randint(2, 4)
    m = nn.Sequential(nn.Conv2d(1, 2, 3, dtype=F64), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), L(2, 3))
    return Case(m, (rand(n, 1, 4, 4),), torch.arange(n))


@case
def positions(rng: random.Random) -> Case:
    n, t = rng.randint(2, 3), rng.randint(2, 3)
    m = nn.Sequential(L(2, 3), nn.LayerNorm(3, dtype=F64), nn.Tanh(), L(3, 2))
    return Case(m, (rand(n, t, 2),), torch.arange(n * t).reshape(n, t))


@case
def positions_in_one_axis(rng: random.Random) -> Case:
    n, t = rng.randint(2, 3), rng.randint(2, 3)
    f = lambda s, x: s.b(s.a(x).tanh() * s.g + s.place[:t]).flatten(0, 1)  # noqa: E731
    units = torch.arange(n * t)
    m = Fn(f, a=L(2, 3), b=L(3, 2), g=P(3), place=P(4, 3))
    return Case(m, (rand(n, t, 2),), units.reshape(n, t) if rng.random() < 0.5 else units)


@case
def attention_within_rows(rng: random.Random) -> Case:
    n, t = rng.randint(2, 4), rng.randint(2, 3)
    m = Fn(lambda s, x: s.b(attention(s, s.a(x))), a=L(2, 3), b=L(3, 2), **heads_of_attention(3))
    units = torch.arange(n)
    return Case(m, (rand(n, t, 2),), units[:, None].repeat(1, t) if rng.random() < 0.5 else units)


@case
def recurrent(rng: random.Random) -> Case:
    n, t = rng.randint(2, 3), rng.randint(2, 3)
    kind = rng.choice([nn.RNN, nn.GRU])
    m = Fn(lambda s, x: s.b(s.rnn(x)[0]), rnn=kind(2, 2, batch_first=True, dtype=F64), b=L(2, 2))
    return Case(m, (rand(n, t, 2),), torch.arange(n))


@case
def documents_in_one_row(rng: random.Random) -> Case:
    document = grouped(rng, rng.randint(2, 3), least=2)[None]  # of one token, no gradient reaches query and key
    apart = document[:, :, None] != document[:, None, :]
    f = lambda s, tokens, apart: s.b(attention(s, s.table(tokens), apart))  # noqa: E731
    m = Fn(f, table=nn.Embedding(16, 3, dtype=F64), b=L(3, 2), **heads_of_attention(3))
    tokens = torch.randperm(16)[: document.numel()].reshape(document.shape)  # of equal ones, none reaches a query
    return Case(m, (tokens, apart), document)


@case
def graphs_by_node(rng: random.Random) -> Case:
    *inputs, batch = a_graph(rng)
    m = Fn(lambda s, *inputs: s.b(one_way(s, *inputs)), a=L(2, 3), message=L(6, 3), b=L(3, 2))
    return Case(m, tuple(inputs), batch)


@case
def graphs_by_graph(rng: random.Random) -> Case:
    *inputs, batch = a_graph(rng)
    count = int(batch.max()) + 1

    def f(s: Any, x: Tensor, source: Tensor, target: Tensor, batch: Tensor) -> Tensor:
        h = one_way(s, x, source, target)
        return s.b(h.new_zeros(count, 3).scatter_add(0, batch[:, None].expand(h.shape), h))

    return Case(Fn(f, a=L(2, 3), message=L(6, 3), b=L(3, 2)), (*inputs, batch), torch.arange(count))


@case
def bags_of_words(rng: random.Random) -> Case:
    n = rng.randint(3, 5)
    m = Fn(lambda s, x: s.b(s.table(x).mean(1).tanh()), table=nn.Embedding(5, 3, dtype=F64), b=L(3, 2))
    return Case(m, (torch.randint(5, (n, 3)),), torch.arange(n))


@case
def tied_weights(rng: random.Random) -> Case:
    n, t = rng.randint(2, 3), rng.randint(2, 3)
    f = lambda s, x: F.linear(s.a(s.table(x)).tanh(), s.table.weight)  # noqa: E731
    m = Fn(f, table=nn.Embedding(3, 3, dtype=F64), a=L(3, 3))
    return Case(m, (torch.randint(3, (n, t)),), torch.arange(n * t).reshape(n, t))


@case
def routed_experts(rng: random.Random) -> Case:
    n = rng.randint(3, 6)

    def f(s: Any, x: Tensor) -> Tensor:
        weight, chosen = s.gate(x).softmax(1).max(1)
        out = x.new_zeros(n, 2)
        for k, expert in enumerate(s.experts):
            rows = (chosen == k).nonzero().flatten()
            out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return s.b(out.tanh())

    m = Fn(f, gate=L(3, 2), experts=nn.ModuleList([L(3, 2), L(3, 2)]), b=L(2, 2))
    return Case(m, (rand(n, 3),), torch.arange(n))


@mixed
def batch_norm_in_training(rng: random.Random) -> Case:
    n = rng.randint(3, 5)
    m = nn.Sequential(L(2, 3), nn.BatchNorm1d(3, dtype=F64), nn.Tanh(), L(3, 2))
    return Case(m, (rand(n, 2),), torch.arange(n), mixes=True)


@mixed
def documents_that_see_each_other(rng: random.Random) -> Case:
    document = grouped(rng, rng.randint(2, 3))[None]
    m = Fn(lambda s, x: s.b(attention(s, s.a(x))), a=L(2, 3), b=L(3, 2), **heads_of_attention(3))
    return Case(m, (rand(*document.shape, 2),), document, mixes=True)


@mixed
def positions_that_see_each_other(rng: random.Random) -> Case:
    n, t = 2, rng.randint(2, 3)
    m = Fn(lambda s, x: s.b(attention(s, s.a(x))) * s.g, a=L(2, 3), b=L(3, 2), g=P(2), **heads_of_attention(3))
    return Case(m, (rand(n, t, 2),), torch.arange(n * t).reshape(n, t), mixes=True)


@mixed
def nodes_by_themselves(rng: random.Random) -> Case:
    *inputs, batch = a_graph(rng)
    m = Fn(lambda s, *inputs: s.b(one_way(s, *inputs)), a=L(2, 3), message=L(6, 3), b=L(3, 2))
    return Case(m, tuple(inputs), torch.arange(len(batch)), mixes=True)


# ---------------------------------------------------------------------------------------------------------------
# Samples


def as_they_are(units: Tensor) -> Any:
    return units


def permuted(units: Tensor) -> Any:
    return torch.randperm(int(units.max()) + 1)[units]


def several_to_a_user(units: Tensor) -> Any:
    return torch.randint(2, (int(units.max()) + 1,))[units]


def numbers_without_entries(units: Tensor) -> Any:
    return 1 + 2 * permuted(units)


def some_to_none(units: Tensor) -> Any:
    numbers = torch.randint(-1, 3, (int(units.max()) + 1,))
    numbers[0], numbers[-1] = 1, -1
    return numbers[units]


def counted(units: Tensor) -> Any:
    return some_to_none(units), 4


def all_one(units: Tensor) -> Any:
    return torch.zeros_like(units)


FORMS = [as_they_are, permuted, several_to_a_user, numbers_without_entries, some_to_none, counted, all_one]


def subset(rng: random.Random, n: int) -> tuple[Any, list[int]]:
    """Samples in one of the forms that ``subsampling`` takes, and their numbers."""
    rows = [rng.randrange(n) for _ in range(rng.randint(1, n + 1))]
    mask = [k in rows for k in range(n)]
    return rng.choice(
        [
            (None, list(range(n))),
            (slice(None, None, -1), list(range(n))[::-1]),
            (rows, rows),
            ([k - n for k in rows], rows),
            (torch.tensor(rows), rows),
            (mask, sorted(set(rows))),
            (range(1, n), list(range(1, n))) if n > 1 else ([0], [0]),
        ]
    )


# ---------------------------------------------------------------------------------------------------------------
# From an output to a loss


class PowerLoss(nn.Module):
    """No loss of PyTorch's; outputs of one row interact."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.scale * ((z - y).square().square().sum() + z.sum(-1).exp().sum() / 4)


@dataclass
class Head:
    """What of an output is given to a loss, and to which."""

    name: str
    select: Callable[[Tensor], Tensor]
    loss: nn.Module
    target: Tensor

    def value(self, out: Tensor) -> Tensor:
        return self.loss(self.select(out), self.target)


def selections(out: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Rows of classes, from an output: by name, what is done with it."""
    lead = out.shape[:-1]
    keep = torch.rand(lead) < 0.6
    keep.view(-1)[0] = True
    order = torch.randperm(lead.numel())
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "whole": lambda out: out,
        "masked": lambda out: out[keep],
        "reordered": lambda out: out.flatten(0, -2)[order],
        "without the first": lambda out: out[1:],
    }
    if len(lead) > 1:
        found |= {
            "flat": lambda out: out.flatten(0, 1),
            "shifted": lambda out: out[:, 1:].flatten(0, 1),
            "each second": lambda out: out[:, ::2].flatten(0, -2),
            "axes swapped": lambda out: out.transpose(0, 1).flatten(0, 1),
            "classes second": lambda out: out.transpose(1, 2),
        }
    return {name: select for name, select in found.items() if select(out).numel()}


HEADS = ["whole", "masked", "reordered", "without the first"]
FURTHER_HEADS = ["flat", "shifted", "each second", "axes swapped", "classes second"]  # where rows have positions
OF_ALL_ROWS = ["whole", "reordered", "flat", "axes swapped", "classes second"]


def a_head(rng: random.Random, out: Tensor, heads: Iterable[str]) -> Head:
    found = selections(out.detach())
    name = rng.choice([name for name in heads if name in found])
    return Head(name, found[name], *a_loss(rng, found[name](out.detach()), name == "classes second"))


def a_loss(rng: random.Random, z: Tensor, has_classes_second: bool) -> tuple[nn.Module, Tensor]:
    reduction = rng.choice(["mean", "sum"])
    if has_classes_second or (z.dim() == 2 and rng.random() < 0.4):
        return nn.CrossEntropyLoss(reduction=reduction), torch.randint(z.shape[1], (len(z), *z.shape[2:]))
    if rng.random() < 0.3:
        return PowerLoss(1.0 if reduction == "sum" else 1 / len(z)), torch.randn_like(z)
    if rng.random() < 0.5:
        return nn.BCEWithLogitsLoss(reduction=reduction), torch.rand_like(z)
    return nn.MSELoss(reduction=reduction), torch.randn_like(z)


# ---------------------------------------------------------------------------------------------------------------
# The truth


def near(found: Tensor, truth: Tensor, what: Any, size: float = 0.0, most: float = 1e-8) -> None:
    """Equal to 1e-8 of the truth's largest entry, or of ``size``."""
    found, truth = found.detach(), truth.detach()
    assert found.shape == truth.shape, (what, found.shape, truth.shape)
    scale = max(float(truth.abs().max()), size, 1e-6)
    error = float((found - truth).abs().max()) / scale
    assert error <= most, (what, error)


# ---------------------------------------------------------------------------------------------------------------
# One backward pass


@dataclass
class Draw:
    """A case, a head, samples, and all that is needed to run the extended model on them."""

    case: Case
    head: Head
    ids: Any
    truth: Truth
    ours: nn.Module
    loss: nn.Module
    rng: random.Random
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    plain: dict[str, Tensor | None]

    @property
    def n(self) -> int:
        return self.truth.n

    def run(self, *extensions: Any, retain_graph: bool = False) -> dict[str, dict[str, Any]]:
        """Results by savefield and name; the gradient is plain PyTorch's to the bit, and nothing else is left."""
        self.ours.load_state_dict(self.before)
        self.ours.zero_grad()
        kept = [dict(module._forward_hooks) for module in self.ours.modules()]
        with warnings.catch_warnings():
            if self.case.mixes:
                warnings.filterwarnings("ignore", "Samples are mixed by")
            loss = self.loss(self.head.select(self.ours(*self.case.inputs)), self.head.target)
            with backpack(*extensions, sample_ids=self.ids):
                loss.backward(retain_graph=retain_graph)
        found: dict[str, dict[str, Any]] = {extension.savefield: {} for extension in extensions}
        for name, p in self.ours.named_parameters():
            left = vars(p)
            for field in found.keys() & left.keys():
                found[field][name] = left.pop(field)
            assert not left, (name, list(left))
            assert not p._backward_hooks, name
            expected = self.plain[name]
            assert (p.grad is None) == (expected is None), (name, "gradient")
            assert expected is None or torch.equal(p.grad, expected), (name, "gradient")
        for module, hooks in zip(self.ours.modules(), kept, strict=True):
            assert module._forward_hooks == hooks
            assert not {"input0", "output"} & vars(module).keys()
        for key, value in self.ours.state_dict().items():
            assert torch.equal(value, self.after[key]), (key, "state")
        return found

    def compare(
        self, found: dict[str, Any], truth: dict[str, Tensor], what: str, of: Callable[[Tensor], Tensor]
    ) -> None:
        """Of each parameter; one that no sample reaches may have none."""
        for name, own in truth.items():
            if name in found:
                near(found[name], of(own), (name, what))
            else:
                assert self.plain[name] is None, (name, what, "is missing")


def draw(case: Case, rng: random.Random, form: Any, heads: Iterable[str] = (*HEADS, *FURTHER_HEADS)) -> Draw:
    ids = None if form is None else form(case.units)
    numbers, n = ids if isinstance(ids, tuple) else (ids, None)
    plain, ours = case.model, extend(copy.deepcopy(case.model))
    plain.zero_grad()
    before = copy.deepcopy(plain.state_dict())
    out = plain(*case.inputs)
    after = copy.deepcopy(plain.state_dict())
    if numbers is None:
        owner = torch.arange(len(out)).reshape(-1, *[1] * (out.dim() - 1)).expand(out.shape)
    else:
        lead = numbers.shape if numbers.shape == out.shape[: numbers.dim()] else out.shape[:1]
        owner = numbers.reshape(*lead, *[1] * (out.dim() - len(lead))).expand(out.shape)
    head = a_head(rng, out, heads)
    truth = Truth(plain, [out], [head.value], [owner], n)
    head.value(out).backward(retain_graph=True)
    grads = {name: p.grad for name, p in plain.named_parameters()}
    loss = extend(copy.deepcopy(head.loss))
    return Draw(case, head, ids, truth, ours, loss, rng, before, after, grads)


def subsets(d: Draw, count: int) -> tuple[list[Any], list[list[int]]]:
    chosen = [subset(d.rng, d.n) for _ in range(count)]
    return [given for given, _ in chosen], [rows for _, rows in chosen]


# ---------------------------------------------------------------------------------------------------------------
# The laws


def first_order(d: Draw) -> None:
    grads = d.truth.grads
    w, rows = subsets(d, 5)
    found = d.run(BatchGrad(w[0]), BatchL2Grad(w[1]), SumGradSquared(w[2]), Variance(w[3]), BatchDotGrad(w[4]))
    for field, own in zip(["grad_batch", "batch_l2", "sum_grad_squared", "variance", "batch_dot"], rows, strict=True):
        if field != "variance":
            d.compare(found[field], grads, field, lambda g, field=field, own=own: quantities(g[own])[field])
    for name, variance in found["variance"].items():
        own = grads[name][rows[3]]
        near(variance, own.var(0, correction=0), (name, "variance"), float(own.square().max()))


def of_bounded_norm(d: Draw) -> None:
    bound = 0.6 * float(norms_of(d.truth.grads).max()) + 1e-9
    w, (rows,) = subsets(d, 1)
    expected = clipped({name: g[rows] for name, g in d.truth.grads.items()}, bound)
    d.compare(d.run(ClippedGrad(bound, w[0]))["grad_clipped"], expected, "grad_clipped", lambda g: g)


def gauss_newton(d: Draw) -> None:
    w, rows = subsets(d, 5)
    size = d.rng.choice([None, 1, 2])
    exact = [DiagGGNExact(w[0], size), BatchDiagGGNExact(w[1], size), SqrtGGNExact(w[2], size), GGNGram(w[3])]
    found = d.run(*exact, BatchGrad(w[4]))
    d.compare(found["grad_batch"], d.truth.grads, "grad_batch", lambda g: g[rows[4]])
    d.compare(found["diag_ggn_exact"], d.truth.diag_ggn, "diag_ggn_exact", lambda t: t[rows[0]].sum(0))
    d.compare(found["diag_ggn_exact_batch"], d.truth.diag_ggn, "diag_ggn_exact_batch", lambda t: t[rows[1]])
    outer = {}
    for name, root in found["sqrt_ggn_exact"].items():
        assert root.shape[1:] == (len(rows[2]), *d.truth.parameters[name].shape), (name, root.shape)
        outer[name] = torch.einsum("cni,cnj->nij", root.flatten(2), root.flatten(2))
    d.compare(outer, d.truth.ggn, "sqrt_ggn_exact", lambda t: t[rows[2]])
    for name, gram in found["ggn_gram"].items():
        near(spectrum(gram), spectrum(d.truth.ggn[name][rows[3]].sum(0)), (name, "ggn_gram"))


def spectrum(matrix: Tensor) -> Tensor:
    """Traces of powers: the same for ``V V^T`` and ``V^T V``."""
    scale = matrix.trace().clamp(min=1e-30)
    unit = matrix / scale
    return torch.stack([scale, *(torch.linalg.matrix_power(unit, k).trace() * scale for k in (2, 3))])


def hessian(d: Draw) -> None:
    w, rows = subsets(d, 2)
    found = d.run(DiagHessian(w[0]), BatchDiagHessian(w[1]))
    d.compare(found["diag_h"], d.truth.diag_hessian, "diag_h", lambda t: t[rows[0]].sum(0))
    d.compare(found["diag_h_batch"], d.truth.diag_hessian, "diag_h_batch", lambda t: t[rows[1]])


def products(d: Draw) -> None:
    w, rows = subsets(d, 2)
    is_changed = d.head.name != "whole"  # then the products need this pass's graph
    found = d.run(HMP(subsampling=w[0]), GGNMP(subsampling=w[1]), retain_graph=is_changed)
    for name, p in d.truth.parameters.items():
        vector = torch.randn_like(p)
        for field, blocks, chosen in (("hmp", d.truth.hessian, rows[0]), ("ggnmp", d.truth.ggn, rows[1])):
            expected = (blocks[name][chosen].sum(0) @ vector.flatten()).reshape(p.shape)
            near(found[field][name](vector), expected, (name, field))


def laws(d: Draw, *which: Callable[[Draw], None]) -> None:
    for law in which:
        law(d)


def sweep(
    table: dict[str, Any], name: str, seed: int, heads: Iterable[str] = (*HEADS, *FURTHER_HEADS)
) -> Iterable[Draw]:
    """Two ways to number the samples of a random case; all forms come up over the seeds."""
    rng = random.Random(f"{name} {seed}")
    torch.manual_seed(rng.randrange(2**31))
    for form in rng.sample(FORMS, 2):
        yield draw(table[name](rng), rng, form, heads)


LAWS = [first_order, of_bounded_norm, gauss_newton, hessian, products]


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_the_samples_that_are_told(name):
    for d in sweep(CASES, name, 0):
        laws(d, *LAWS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 12))
@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_the_samples_that_are_told_at_length(name, seed):
    for d in sweep(CASES, name, seed):
        laws(d, *LAWS)


@pytest.mark.parametrize("form", FORMS)
def test_each_way_to_number_samples(form):
    rng = random.Random(str(form.__name__))
    for name in ("positions", "documents_in_one_row"):
        laws(draw(CASES[name](rng), rng, form), first_order, of_bounded_norm, gauss_newton, hessian)


@pytest.mark.parametrize("name", MIXED)
def test_where_samples_mix_each_ones_part_flows_through_its_rows(name):
    for d in sweep(MIXED, name, 0):
        laws(d, first_order, gauss_newton, hessian)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 12))
@pytest.mark.parametrize("name", MIXED)
def test_where_samples_mix_each_ones_part_flows_through_its_rows_at_length(name, seed):
    for d in sweep(MIXED, name, seed):
        laws(d, first_order, gauss_newton, hessian)


@pytest.mark.parametrize("form", [None, as_they_are, some_to_none])
@pytest.mark.parametrize("head", HEADS + FURTHER_HEADS)
def test_a_loss_may_be_given_a_part_of_the_output_in_any_order(head, form):
    rng = random.Random(f"{head} {form and form.__name__}")
    names = ["positions"] + ["perceptron"] * (head in HEADS)
    for name in names:
        laws(draw(CASES[name](rng), rng, form, [head]), first_order, gauss_newton, hessian)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["attention_within_rows", "recurrent", "documents_in_one_row", "tied_weights"])
@pytest.mark.parametrize("head", HEADS + FURTHER_HEADS)
def test_a_loss_may_be_given_a_part_of_the_output_of_any_model(head, name, seed):
    rng = random.Random(f"{head} {name} {seed}")
    torch.manual_seed(rng.randrange(2**31))
    made = CASES[name](rng)
    if head == "without the first" and len(made.units) == 1:
        head = "masked"
    for form in [rng.choice(FORMS)] + [None] * (name != "documents_in_one_row"):
        laws(draw(made, rng, form, [head]), *LAWS)


@pytest.mark.parametrize("name", ["documents_in_one_row", "graphs_by_node", "routed_experts"])
def test_groups_of_samples_of_similar_length_change_nothing(name, monkeypatch):
    monkeypatch.setattr("backpack.uses.ragged.SMALL", 0)
    for d in sweep(CASES, name, 7):
        laws(d, first_order, gauss_newton, hessian, products)
    for d in sweep(CASES, name, 8, OF_ALL_ROWS):
        kronecker(d)


# ---------------------------------------------------------------------------------------------------------------
# Kronecker factors


class Factors:
    """Of the linear layers that are called, from what came in and the cotangents of each sample's columns."""

    def __init__(self, d: Draw, rows: list[int], approx: str | None, fisher: str) -> None:
        calls: dict[str, tuple[Tensor, Tensor]] = {}
        handles = []
        for path, module in d.case.model.named_modules():
            if isinstance(module, nn.Linear):

                def keep(module: nn.Module, args: Any, output: Tensor, path: str = path) -> None:
                    calls[f"{path}.weight"] = args[0].detach().flatten(0, -2), output

                handles.append(module.register_forward_hook(keep))
        out = d.case.model(*d.case.inputs)
        for handle in handles:
            handle.remove()
        self.of = {}
        (hessian,) = d.truth.loss_hessians
        for name, (x, z) in calls.items():
            A, B = (torch.zeros(size, size, dtype=F64) for size in (x.shape[1], z.shape[-1]))
            for n in rows:
                own = d.truth.owners[0] == n
                reached = _cotangents(out, z, own * rand(*own.shape))
                x_n = x[reached.any(1)]
                columns = _columns(d, hessian, own, fisher)
                for column in columns:
                    g = _cotangents(out, z, column)
                    B += g.T @ g if approx == "expand" else torch.outer(g.sum(0), g.sum(0))
                if len(x_n) and approx == "reduce":
                    x_n = x_n.mean(0, keepdim=True)
                A += x_n.T @ x_n / (max(1, len(x_n)) if approx == "expand" else 1)
            self.of[name] = [B, A / len(rows)]


def _cotangents(out: Tensor, z: Tensor, cotangent: Tensor) -> Tensor:
    return gradients(out, [z], cotangent)[0].reshape(-1, z.shape[-1])


def _columns(d: Draw, hessian: Tensor, own: Tensor, fisher: str) -> list[Tensor]:
    """Of a root of the loss's Hessian in the outputs of a sample; or the gradient of its terms before reduction."""
    if fisher == "empirical":
        return [d.truth.cotangents[0] * own / weight_of_terms(d.head) ** 0.5]
    k = own.flatten()
    if not k.any():
        return []
    values, vectors = torch.linalg.eigh(hessian[k][:, k])
    columns = []
    for column in (vectors * values.clamp(min=0).sqrt()).T:
        whole = torch.zeros_like(hessian[0])
        whole[k] = column
        columns.append(whole.reshape(own.shape))
    return columns


def weight_of_terms(head: Head) -> float:
    """What the reduction multiplies each term by."""
    if getattr(head.loss, "reduction", "sum") == "sum":
        return 1.0
    return 1 / head.target.numel()


WITH_LINEAR_LAYERS = [
    "perceptron",
    "positions",
    "positions_in_one_axis",
    "attention_within_rows",
    "documents_in_one_row",
    "graphs_by_node",
    "graphs_by_graph",
    "routed_experts",
]


def kronecker(d: Draw) -> None:
    approx = d.rng.choice([None, "expand", "reduce"])
    w, rows = subsets(d, 3)
    found = d.run(KFLR(w[0], approx=approx), *_kfac(w[1:], approx))
    for field, fisher, chosen in zip(
        ("kflr", "exact", "empirical"), ("exact", "exact", "empirical"), rows, strict=True
    ):
        factors = Factors(d, chosen, approx, fisher).of
        for name, own in found[field].items():
            if name in factors:
                for k, (one, expected) in enumerate(zip(own, factors[name], strict=True)):
                    near(one, expected, (name, field, approx, "BA"[k]))
            elif len(own) == 1:
                near(own[0], _single(d, name, chosen, fisher), (name, field))
            else:
                assert name in ("table.weight", "place"), name  # whose inputs are numbers of rows
        for name in factors:
            assert name in found[field] or d.plain[name] is None, (name, field, "is missing")


def _kfac(w: list[Any], approx: str | None) -> list[KFAC]:
    found = [
        KFAC(subsampling=given, fisher=f, approx=approx) for given, f in zip(w, ("exact", "empirical"), strict=True)
    ]
    for extension in found:
        extension.savefield = extension.fisher
    return found


def _single(d: Draw, name: str, rows: list[int], fisher: str) -> Tensor:
    """The exact block of a parameter that is no matrix of a linear map."""
    if fisher == "exact":
        return d.truth.ggn[name][rows].sum(0)
    g = d.truth.grads[name][rows].flatten(1) / weight_of_terms(d.head) ** 0.5
    return g.T @ g


@pytest.mark.parametrize("name", WITH_LINEAR_LAYERS)
def test_factors_are_sums_over_the_samples_that_are_told(name):
    for d in sweep(CASES, name, 100, OF_ALL_ROWS):
        kronecker(d)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(101, 116))
@pytest.mark.parametrize("name", WITH_LINEAR_LAYERS)
def test_factors_are_sums_over_the_samples_that_are_told_at_length(name, seed):
    for d in sweep(CASES, name, seed, OF_ALL_ROWS):
        kronecker(d)


def test_input_factors_are_the_mean_over_all_numbers_also_those_without_entries():
    model, x = extend(L(3, 2)), rand(4, 3)
    with backpack(KFLR(), sample_ids=(torch.tensor([0, 3, 0, -1]), 5)):
        extend(nn.MSELoss())(model(x), rand(4, 2)).backward()
    near(model.weight.kflr[1], x[:3].T @ x[:3] / 5, "A")


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_the_positions_of_a_sample_are_its_own_however_many_another_has(approx):
    model, x, ids = extend(L(3, 2)), rand(5, 3), torch.tensor([0, 0, 0, 1, 2])
    own = [x[ids == k] for k in range(3)]
    if approx == "reduce":
        own = [rows.mean(0, keepdim=True) for rows in own]
    with backpack(KFLR(approx=approx), sample_ids=ids):
        extend(nn.MSELoss())(model(x), rand(5, 2)).backward()
    near(model.weight.kflr[1], sum(rows.T @ rows / len(rows) for rows in own) / 3, "A")


@pytest.mark.parametrize("ids", [(torch.zeros(3, dtype=torch.int64), 1), torch.ones(3, dtype=torch.int64)])
def test_a_weight_that_one_sample_alone_uses_has_two_factors(ids):
    model, x = extend(L(3, 2)), rand(3, 3)
    with backpack(KFLR(), sample_ids=ids):
        extend(nn.MSELoss())(model(x), rand(3, 2)).backward()
    count = ids[1] if isinstance(ids, tuple) else 2
    assert [len(factor) for factor in model.weight.kflr] == [2, 3]
    near(model.weight.kflr[1], x.T @ x / count, "A")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = L(2, 2), L(2, 2), L(2, 2)

    def forward(self, x: Tensor, apart: Tensor | None) -> Tensor:
        return attention(self, x, apart)


def packed(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two documents in each row, their numbers, and which positions are kept apart."""
    ids = torch.tensor([0, 0, 0, 1, 1]) + 2 * torch.arange(rows)[:, None]
    return rand(rows, 5, 2), ids, ids[:, :, None] != ids[:, None, :]


@pytest.mark.parametrize("rows", [1, 2])
def test_documents_behind_a_block_mask_do_not_mix(rows):
    model, (x, ids, apart) = extend(Attention()), packed(rows)
    with backpack(KFLR(), ClippedGrad(1.0), sample_ids=ids):
        extend(nn.MSELoss())(model(x, apart), rand(rows, 5, 2)).backward()
    for layer in (model.query, model.key, model.value):
        assert [len(factor) for factor in layer.weight.kflr] == [2, 2]


@pytest.mark.parametrize("rows", [1, 2])
def test_documents_without_a_mask_mix(rows):
    model, (x, ids, _) = extend(Attention()), packed(rows)
    loss = extend(nn.MSELoss())
    with pytest.warns(UserWarning, match="Samples are mixed by"), backpack(BatchGrad(), sample_ids=ids):
        loss(model(x, None), rand(rows, 5, 2)).backward()
    for extension in (KFLR(), ClippedGrad(1.0)):
        with pytest.raises(RuntimeError, match="samples are mixed by"), backpack(extension, sample_ids=ids):
            loss(model(x, None), rand(rows, 5, 2)).backward()


@pytest.mark.parametrize("name", MIXED)
def test_factors_and_clipping_are_refused_where_samples_mix(name):
    rng = random.Random(name)
    d = draw(MIXED[name](rng), rng, permuted)
    for extension in (KFLR(), ClippedGrad(1.0)):
        with pytest.raises(RuntimeError, match="samples are mixed by"):
            d.run(extension)
        assert all(p.grad is None and not vars(p) for p in d.ours.parameters())


# ---------------------------------------------------------------------------------------------------------------
# Samples that are counted as without numbers


@pytest.mark.parametrize("name", ["perceptron", "convolutions", "attention_within_rows", "recurrent", "routed_experts"])
def test_numbers_in_order_change_nothing(name):
    rng = random.Random(name)
    made = CASES[name](rng)
    model, loss = extend(made.model), extend(nn.MSELoss())
    target = torch.randn_like(model(*made.inputs))

    def results(ids: Any, *extensions: Any) -> list[Any]:
        model.zero_grad()
        with backpack(*extensions, sample_ids=ids):
            loss(model(*made.inputs), target).backward()
        fields = [extension.savefield for extension in extensions]
        return [getattr(p, field) for p in model.parameters() if p.grad is not None for field in ["grad", *fields]]

    ids = torch.arange(len(target))
    first = (
        lambda: [BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), BatchDotGrad(), ClippedGrad(0.1)],
        lambda: [BatchGrad([0, -1]), BatchL2Grad([1]), ClippedGrad(0.1, slice(None, None, -1))],
    )
    for make in first:
        assert all(map(torch.equal, results(ids, *make()), results(None, *make())))
        assert all(map(torch.equal, results((ids, len(ids)), *make()), results(None, *make())))
    second = [DiagGGNExact(), BatchDiagGGNExact(), SqrtGGNExact(), GGNGram(), DiagHessian(), BatchDiagHessian([0])]
    for one, other in zip(results(ids, *second), results(None, *second), strict=True):
        near(one, other, name, most=1e-12)
    for one, other in zip(results(ids, KFLR([1, 0])), results(None, KFLR([1, 0])), strict=True):
        for k, factor in enumerate(one):
            near(factor, other[k], name, most=1e-12)


@pytest.mark.parametrize("written", [list, Tensor.numpy, Tensor.int, lambda ids: ids.to(torch.uint8)])
def test_numbers_may_be_written_in_several_ways(written):
    model, x, ids = extend(L(3, 2)), rand(4, 3), torch.tensor([1, 0, 1, 2])
    found = []
    for given in (ids, written(ids)):
        with backpack(BatchGrad(), sample_ids=given):
            model(x).square().sum().backward()
        found.append(model.weight.grad_batch)
    assert torch.equal(*found)


def test_both_calls_of_a_model_in_one_pass_have_these_numbers():
    model, x, y, ids = L(3, 2), rand(4, 3), rand(4, 3), torch.tensor([1, 0, 1, -1])
    rows = [model(x[ids == n]).tanh().sum() + model(y[ids == n]).square().sum() for n in range(2)]
    truth = torch.stack([torch.autograd.grad(row, model.weight)[0] for row in rows])
    extend(model)
    with backpack(BatchGrad(), sample_ids=ids):
        (model(x).tanh().sum() + model(y).square().sum()).backward()
    near(model.weight.grad_batch, truth, "grad_batch")


def test_a_pass_that_stores_no_gradients_has_these_numbers():
    model, x, ids = extend(L(3, 2)), rand(4, 3), torch.tensor([1, 0, 1, -1])
    with backpack(BatchGrad(), sample_ids=ids):
        torch.autograd.grad(model(x).sin().sum(), model.weight)
    found = model.weight.grad_batch
    with backpack(BatchGrad(), sample_ids=ids):
        model(x).sin().sum().backward()
    assert torch.equal(found, model.weight.grad_batch)


@pytest.mark.parametrize("returns_logits", [False, True])
def test_a_loss_that_the_model_computes_itself_is_taken_apart_by_these_numbers(returns_logits):
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = L(3, 2)

        def forward(self, x: Tensor, y: Tensor) -> Any:
            z = self.a(x)
            loss = F.cross_entropy(z, y)
            return (loss, z) if returns_logits else loss

    model, x, y, ids = WithLoss(), rand(4, 3), torch.tensor([0, 1, 1, 0]), torch.tensor([1, 0, 1, -1])
    terms = F.cross_entropy(model.a(x), y, reduction="none") / 4
    truth = [torch.autograd.grad(terms[ids == n].sum(), model.a.weight, retain_graph=True)[0] for n in range(2)]
    out = extend(model)(x, y)
    with backpack(BatchGrad(), sample_ids=ids):
        (out[0] if returns_logits else out).backward()
    near(model.a.weight.grad_batch, torch.stack(truth), "grad_batch")


def test_entries_of_no_sample_contribute_to_nothing_but_the_gradient():
    model, x = extend(L(3, 2)), rand(3, 3)
    with backpack(BatchGrad(), DiagGGNExact(), KFLR(), sample_ids=(torch.full((3,), -1), 2)):
        extend(nn.MSELoss())(model(x), rand(3, 2)).backward()
    for p in model.parameters():
        assert p.grad.any()
        assert torch.equal(p.grad_batch, torch.zeros(2, *p.shape, dtype=F64))
        assert not p.diag_ggn_exact.any()
        assert not any(factor.any() for factor in p.kflr)


# ---------------------------------------------------------------------------------------------------------------
# Drawn columns


def test_drawn_columns_have_the_exact_ones_as_their_expectation():
    """Within five standard errors of independent draws, entry by entry; input factors are the same."""
    model, x, ids = extend(nn.Sequential(L(3, 3), nn.Tanh(), L(3, 3))), rand(6, 3), torch.tensor([2, 0, -1, 2, 0, 3])
    loss, y = extend(nn.CrossEntropyLoss()), torch.randint(3, (6,))
    draws = []
    for _ in range(30):
        model.zero_grad()
        with backpack(DiagGGNMC(40), KFAC(40, subsampling=[0, 2]), sample_ids=ids):
            loss(model(x), y).backward()
        draws.append([(p.diag_ggn_mc, *p.kfac) for p in model.parameters()])
    with backpack(DiagGGNExact(), KFLR([0, 2]), sample_ids=ids):
        loss(model(x), y).backward()
    for place, p in enumerate(model.parameters()):
        for part, exact in ((0, p.diag_ggn_exact), (1, p.kflr[0])):
            each = torch.stack([drawn[place][part] for drawn in draws])
            bound = 5 * each.std(0) / len(draws) ** 0.5 + 1e-12
            assert bool(((each.mean(0) - exact).abs() <= bound).all())
        assert all(map(torch.equal, draws[0][place][2:], p.kflr[1:]))


# ---------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (torch.zeros(4), TypeError, "integer tensor"),
        (torch.zeros(4, dtype=torch.bool), TypeError, "integer tensor"),
        (torch.zeros(4, dtype=torch.complex64), TypeError, "integer tensor"),
        (torch.tensor(0), TypeError, "integer tensor"),
        ([0.5, 1], TypeError, "integer tensor"),
        ((torch.zeros(4), 3), TypeError, "integer tensor"),
        ((torch.arange(4), 4.0), TypeError, "number of samples"),
        ((torch.arange(4), True), TypeError, "number of samples"),
        (torch.tensor([0, 1, -2, 3]), ValueError, "-2"),
        ((torch.arange(4), 3), ValueError, "holds 3, but there are 3 samples"),
        ((torch.full((4,), -1), 0), ValueError, "no entry"),
        ((torch.zeros(4, dtype=torch.int64), 0), ValueError, "0 samples"),
        (torch.full((4,), -1), ValueError, "no entry"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "no entry"),
    ],
)
def test_what_numbers_no_samples_is_refused_at_once(ids, error, words):
    with pytest.raises(error, match=words):
        backpack(BatchGrad(), sample_ids=ids)


@pytest.mark.parametrize("shape", [(3,), (5,), (1,), (4, 3), (4, 2, 2), (2, 4), (1, 4)])
@pytest.mark.parametrize("extensions", [[BatchGrad()], [DiagGGNExact()], [BatchGrad(), DiagHessian()]])
def test_numbers_that_do_not_fit_are_refused_before_anything_is_computed(shape, extensions):
    """But those of ``[1, 4]``, which are one number for each of the 4 entries."""
    model, ids = extend(nn.Sequential(L(3, 2), nn.Tanh(), L(2, 2))), torch.zeros(shape, dtype=torch.int64)
    loss = extend(nn.MSELoss())(model(rand(4, 3)), rand(4, 2))
    if shape == (1, 4):
        with backpack(*extensions, sample_ids=ids):
            loss.backward()
        return
    words = rf"sample_ids, of shape \[{', '.join(map(str, shape))}\].*Sequential.*\[4, 2\]"
    with pytest.raises(RuntimeError, match=words), backpack(*extensions, sample_ids=ids):
        loss.backward()
    assert all(p.grad is None and not vars(p) for p in model.parameters())
    with backpack(*extensions):
        extend(nn.MSELoss())(model(rand(4, 3)), rand(4, 2)).backward()


@pytest.mark.parametrize("chosen", [[3], [-4], [True, False]])
def test_subsampling_counts_the_samples_that_are_told(chosen):
    model, x = extend(L(3, 2)), rand(5, 3)
    with (
        pytest.raises(IndexError, match="batch (of|has) 3"),
        backpack(BatchGrad(chosen), sample_ids=torch.tensor([0, 2, 2, -1, 0])),
    ):
        model(x).square().sum().backward()
    assert all(p.grad is None and not vars(p) for p in model.parameters())


def test_a_loss_that_couples_samples_is_refused_in_second_order():
    model, x = extend(L(3, 2)), rand(4, 3)

    class OfTheSum(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.sum().square()

    loss = extend(OfTheSum())(model(x))
    with (
        pytest.raises(ValueError, match="couples the samples"),
        backpack(DiagGGNExact(), sample_ids=torch.tensor([0, 1, 0, 1])),
    ):
        loss.backward()
    with backpack(DiagGGNExact(), sample_ids=torch.tensor([0, 0, 0, 0])):
        extend(OfTheSum())(model(x)).backward()


@pytest.mark.parametrize("make", [KFRA, lambda: HBP("hessian", "sum", "average", "E[J^T E(H) J]")], ids=["KFRA", "HBP"])
def test_curvature_that_is_averaged_over_rows_needs_one_row_a_sample(make):
    model, x, y = extend(nn.Sequential(L(3, 4), nn.Sigmoid(), L(4, 2))), rand(4, 3), rand(4, 2)
    lossfunc = extend(nn.MSELoss())
    refused = pytest.raises(RuntimeError, match="each row must be a sample of its own.*KFLR")
    with refused, backpack(make(), sample_ids=torch.tensor([0, 0, 1, 1])):
        lossfunc(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------
# What random cases have found


class Residual(nn.Module):
    """Below attention there is a layer that all of its operands come from, of more channels than positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.query, self.key, self.value = L(2, 5), L(5, 2), L(5, 2), L(5, 5)

    def forward(self, x: Tensor, apart: Tensor | None) -> Tensor:
        h = self.first(x)
        return h + attention(self, h, apart)


@pytest.mark.parametrize("ids", [[[0, 0, 0, 1]], [[0, 0, 1, 1]], [[0, 0, 1], [2, 2, 3]], [[0, 1, 1], [2, 2, 2]]])
def test_hidden_positions_are_not_in_the_hessian_of_documents(ids):
    numbers = torch.tensor(ids)
    apart = numbers[:, :, None] != numbers[:, None, :]
    rng = random.Random(0)
    made = Case(Residual(), (rand(*numbers.shape, 2), apart), numbers)
    torch.manual_seed(0)
    laws(draw(made, rng, as_they_are, ["whole"]), first_order, gauss_newton, hessian, products)


class Fused(nn.Module):
    """Layers of PyTorch's attention, whose query, key and value are rows of one matrix."""

    def __init__(self, layers: int = 2, normalized: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(L(4, 12) for _ in range(layers))
        self.norm = nn.RMSNorm(4, dtype=F64) if normalized else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(x)
        for layer in self.layers:
            x = x + F.scaled_dot_product_attention(*layer(x).chunk(3, -1), attn_mask=mask)
        return x


@pytest.mark.parametrize("ids", [[[0, 0, 1]], [[0, 0, 0], [2, 2, 1], [3, 3, 3]]])
def test_a_document_of_one_token_does_not_mix_with_others(ids):
    numbers = torch.tensor(ids)
    mask = numbers[:, :, None] == numbers[:, None, :]
    made = Case(Fused(), (rand(*numbers.shape, 4), mask), numbers)
    laws(draw(made, random.Random(0), as_they_are, ["whole"]), first_order, of_bounded_norm, gauss_newton)


@pytest.mark.parametrize("ids", [[[0, 1]], [[0, 0, 1, 1]], [[0, 1, 1], [2, 2, 3]]])
@pytest.mark.parametrize("frozen", [(), ("norm.weight",), ("layers.0.weight",), ("norm.weight", "layers.0.bias")])
def test_documents_do_not_mix_where_the_layer_below_only_normalizes_the_data(ids, frozen):
    numbers = torch.tensor(ids)
    mask = numbers[:, :, None] == numbers[:, None, :]
    model = Fused(1, normalized=True)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    made = Case(model, (rand(*numbers.shape, 4), mask), numbers)
    laws(draw(made, random.Random(0), as_they_are, ["whole"]), first_order, of_bounded_norm, gauss_newton)


class AttentionOverRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(4, dtype=F64), L(4, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.last(x + self.attention(h, h, h, need_weights=False)[0])


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("positions", [1, 2])
def test_all_rows_may_belong_to_one_of_several_samples(sample, positions):
    made = Case(AttentionOverRows(), (rand(2, positions, 4),), torch.tensor([[0] * positions, [1] * positions]))
    laws(draw(made, random.Random(0), lambda units: (0 * units + sample, 3), ["whole"]), first_order, of_bounded_norm)


def test_instance_normalization_does_not_mix_where_there_is_one_sample_of_several():
    model = nn.Sequential(nn.InstanceNorm2d(2, affine=True, dtype=F64), nn.Flatten(), L(18, 2))
    made = Case(model, (rand(1, 2, 3, 3),), torch.tensor([0]))
    laws(draw(made, random.Random(0), lambda units: (units, 3), ["whole"]), first_order, of_bounded_norm)


@pytest.mark.parametrize("rows", [[0, 2, 0], [1, 1, 1, 2]])
@pytest.mark.parametrize("form", [None, as_they_are, several_to_a_user])
@pytest.mark.parametrize("name", ["perceptron", "positions"])
def test_rows_of_a_loss_may_repeat(name, form, rows):
    rng = random.Random(f"{name} {rows}")
    torch.manual_seed(0)
    x = rand(3, 3) if name == "perceptron" else rand(3, 2, 2)
    model = nn.Sequential(L(x.shape[-1], 3), nn.Tanh(), L(3, 2))
    units = torch.arange(x[..., 0].numel()).reshape(x.shape[:-1])
    d = draw(Case(model, (x,), units), rng, form, ["whole"])
    select = lambda out: out[rows]  # noqa: E731
    head = Head("repeated", select, nn.MSELoss(), torch.randn_like(select(d.truth.inputs[0].detach())))
    (out,), (owner,) = d.truth.inputs, d.truth.owners
    truth = Truth(d.case.model, [out], [head.value], [owner], d.n)
    d = Draw(**{**vars(d), "head": head, "truth": truth, "loss": extend(nn.MSELoss())})
    d.case.model.zero_grad()
    head.value(out).backward(retain_graph=True)
    d.plain = {name: p.grad for name, p in d.case.model.named_parameters()}
    laws(d, first_order, gauss_newton, hessian)


def test_a_single_row_that_is_seen_is_no_proof_against_the_first_axis():
    """Half of the rows are overwritten, and of the others a loss takes one."""

    def f(s: Any, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        out, hidden = flat * s.scale, torch.tensor([0, 1, 3])
        out[hidden] = s.a(flat[hidden])
        return s.b(out.reshape(2, 2, 3))

    model = extend(Fn(f, scale=P(3), a=L(3, 3), b=L(3, 3)))
    x = rand(2, 2, 3)
    out = model(x)
    rows = [torch.autograd.grad(out[n].sin().sum(), model.scale, retain_graph=True)[0] for n in range(2)]
    with backpack(BatchGrad()):
        model(x).sin().sum().backward()
    near(model.scale.grad_batch, torch.stack(rows), "scale")


def test_instance_norm_above_frozen_biases_keeps_a_single_sample_apart():
    layer = nn.Conv2d(1, 2, 3, bias=False).to(F64)
    model = extend(nn.Sequential(layer, nn.InstanceNorm2d(2, affine=True).to(F64), nn.Flatten(), L(8, 2)))
    x = rand(2, 1, 4, 4)
    with backpack(ClippedGrad(1e-3), sample_ids=(torch.tensor([1, 1]), 3)):
        model(x).square().sum().backward()
    norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
    for p in model.parameters():
        near(p.grad_clipped, p.grad * 1e-3 / norm, "grad_clipped")
