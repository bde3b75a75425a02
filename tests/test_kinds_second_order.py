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
import torch.nn.functional as F
from test_kinds import F64, KINDS, Fn, Kind, L, P, Step, _routed, by_rows, rand
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

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


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors are small: on a machine that is shared, threads would do little but wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MORE: dict[str, Callable[[random.Random], Kind]] = {}


def kind(f: Callable[[random.Random], Kind]) -> Callable[[random.Random], Kind]:
    MORE[f.__name__] = f
    return f


# ---------------------------------------------------------------------------------------------------------------
# What is given to the loss


@dataclass
class Given:
    """The input of a loss, and whose its entries are."""

    input: Tensor
    owners: Tensor

    @property
    def n(self) -> int:
        return int(self.owners.max()) + 1


def as_it_is(step: Step) -> Given:
    out, axis = rows_of(step)
    shape = [1] * out.dim()
    shape[axis] = out.shape[axis]
    return Given(out, torch.arange(out.shape[axis]).reshape(shape).expand(out.shape))


def by_samples(step: Step) -> Given:
    out, axis = rows_of(step)
    out = out.movedim(axis, 0)
    out = out.flatten(1) if out.dim() > 1 else torch.stack([out, out.sin()], 1)
    return Given(out, torch.arange(len(out))[:, None].expand(out.shape))


def by_positions(step: Step) -> Given:
    out, axis = rows_of(step)
    out = out.movedim(axis, 0)
    owners = torch.arange(len(out)).reshape(-1, *[1] * (out.dim() - 1)).expand(out.shape)
    return Given(out.flatten(0, -2), owners.flatten(0, -2))


def classes_second(step: Step) -> Given:
    out, axis = rows_of(step)
    out = out.movedim(axis, 0).movedim(-1, 1)
    return Given(out, torch.arange(len(out)).reshape(-1, *[1] * (out.dim() - 1)).expand(out.shape))


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
class Truth:
    """Of a parameter: individual gradients ``[n, *p]``, GGN blocks ``[n, P, P]``, Hessian diagonals ``[n, *p]``."""

    grads: Tensor
    ggn: Tensor
    hessian: Tensor

    def diag_ggn(self) -> Tensor:
        return self.ggn.diagonal(dim1=1, dim2=2).reshape(self.grads.shape)


def dense(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad.to_dense()


def first_of(given: Given, loss: nn.Module, target: Tensor, parameters: list[Tensor]) -> list[Truth]:
    """Individual gradients and the GGN, from the explicit Jacobian of the loss's input and Hessian of the loss."""
    size = given.input.numel()
    hessian = torch.autograd.functional.hessian(lambda z: loss(z, target), given.input.detach()).reshape(size, size)
    (grad,) = torch.autograd.grad(loss(given.input, target), given.input, retain_graph=True)
    rows = []
    for unit in torch.eye(size, dtype=F64):
        unit = unit.reshape(given.input.shape)
        grads = torch.autograd.grad(given.input, parameters, unit, retain_graph=True, allow_unused=True)
        rows.append([dense(g, p) for g, p in zip(grads, parameters, strict=True)])
    own = [given.owners.flatten() == n for n in range(given.n)]
    for k in own:
        assert not hessian[k][:, ~k].any()
    found = []
    for place, p in enumerate(parameters):
        jacobian = torch.stack([row[place].flatten() for row in rows])
        grads = torch.stack([grad.flatten()[k] @ jacobian[k] for k in own]).reshape(-1, *p.shape)
        ggn = torch.stack([jacobian[k].T @ hessian[k][:, k] @ jacobian[k] for k in own])
        found.append(Truth(grads, ggn, torch.zeros_like(grads)))
    return found


def diagonals_of(given: Given, loss: nn.Module, target: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """The diagonals of the Hessian of each sample's term, entry by entry."""
    found: list[list[Tensor]] = [[] for _ in parameters]
    for n in range(given.n):
        term = loss(torch.where(given.owners == n, given.input, given.input.detach()), target)
        grads = torch.autograd.grad(term, parameters, create_graph=True, allow_unused=True)
        for rows, g, p in zip(found, grads, parameters, strict=True):
            row = torch.zeros(p.numel(), dtype=p.dtype)
            for k, entry in enumerate(dense(g, p).flatten()) if g is not None and g.requires_grad else ():
                (second,) = torch.autograd.grad(entry, p, retain_graph=True, allow_unused=True)
                row[k] = dense(second, p).flatten()[k]
            rows.append(row.reshape(p.shape))
    return [torch.stack(rows) for rows in found]


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
        self.names, parameters = list(of), list(of.values())
        self.state = copy.deepcopy(plain.state_dict())
        torch.manual_seed(7)
        made = kind.step(plain)
        self.head, self.loss, self.target = a_head(rng, made)
        given = self.head(made)
        truth = first_of(given, self.loss, self.target, parameters)
        self.n = given.n
        self.loss(given.input, self.target).backward()
        self.grads = {name: p.grad for name, p in of.items()}
        self.after = copy.deepcopy(plain.state_dict())
        plain.load_state_dict(self.state)
        torch.manual_seed(7)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                given = self.head(kind.step(plain))
            for own, hessian in zip(truth, diagonals_of(given, self.loss, self.target, parameters), strict=True):
                own.hessian = hessian
            self.has_hessian = True
        except RuntimeError:  # no second derivative

            def terms() -> list[Tensor]:
                torch.manual_seed(7)
                return [own.grads for own in first_of(self.head(kind.step(plain)), self.loss, self.target, parameters)]

            for own, hessian in zip(truth, differences(terms, parameters), strict=True):
                own.hessian = hessian
            self.has_hessian = False
        self.truth = dict(zip(self.names, truth, strict=True))
        self.twice = [self.n - 1, 0, self.n - 1]
        self.extended = extend(copy.deepcopy(self.loss))

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
        exact: dict[Any, Callable[[Truth], Tensor]] = {
            BatchGrad(w[0]): lambda t: t.grads[rows[0]],
            DiagGGNExact(w[1]): lambda t: t.diag_ggn()[rows[1]].sum(0),
            BatchDiagGGNExact(w[2]): lambda t: t.diag_ggn()[rows[2]],
            SqrtGGNExact(w[3]): lambda t: t.ggn[rows[3]],
        }
        twice: dict[Any, Callable[[Truth], Tensor]] = {
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


# ---------------------------------------------------------------------------------------------------------------
# More kinds


@kind
def mixed_on_a_branch(rng: random.Random) -> Kind:
    x = rand(rng.randint(2, 4), 3)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(x).tanh()
        return s.b(h) + s.c((h - h.mean(0)).sin()) * s.g

    return Kind(Fn(f, a=L(3, 4), b=L(4, 2), c=L(4, 2), g=P(2)), lambda m: by_rows(m(x)), mixes=True)


@kind
def mixed_between_uses_of_one_weight(rng: random.Random) -> Kind:
    x = rand(rng.randint(2, 4), 3)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(x).tanh()
        h = s.a(h - h.mean(0)).sigmoid() * s.g
        return s.a(h.softmax(0) if rng_choice else h) + s.g

    rng_choice = rng.random() < 0.5
    return Kind(Fn(f, a=L(3, 3), g=P(3)), lambda m: by_rows(m(x)), mixes=True)


@kind
def attention_over_rows(rng: random.Random) -> Kind:
    x = rand(rng.randint(2, 4), 3)
    fused = rng.random() < 0.5

    def f(s: Any, x: Tensor) -> Tensor:
        q, k, v = s.a(x).chunk(3, 1)
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None])[0] if fused else (q @ k.T).softmax(1) @ v
        return s.b(x + s.c(mixed)).tanh()

    return Kind(Fn(f, a=L(3, 12), c=L(4, 3), b=L(3, 2)), lambda m: by_rows(m(x)), mixes=True)


@kind
def neighbours_in_a_graph(rng: random.Random) -> Kind:
    n = rng.randint(2, 5)
    x, edges = rand(n, 2), torch.randint(n, (2, 2 * n))

    def f(s: Any, x: Tensor, edges: Tensor) -> Tensor:
        for layer in (s.a, s.b):
            h = layer(x)
            x = (h + torch.zeros_like(h).index_add_(0, edges[1], s.m(h)[edges[0]])).tanh()
        return s.c(x)

    return Kind(Fn(f, a=L(2, 3), b=L(3, 3), m=L(3, 3), c=L(3, 2)), lambda m: by_rows(m(x, edges)), mixes=True)


@kind
def some_positions_mixed(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 3), rng.randint(2, 3)
    x = rand(n, t, 2)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(x)
        first = h[:, :1] - h[:, :1].mean(0)
        return s.b(torch.cat([first.exp(), h[:, 1:].cos()], 1) * s.g)

    return Kind(Fn(f, a=L(2, 3), b=L(3, 2), g=P(t, 3)), lambda m: by_rows(m(x)), mixes=True)


@kind
def batch_norm_in_the_middle(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)
    norm = nn.BatchNorm1d(4, dtype=F64, momentum=None if rng.random() < 0.3 else 0.1)
    m = nn.Sequential(L(3, 4), nn.Softplus(), norm, nn.Tanh(), L(4, 3), nn.BatchNorm1d(3, dtype=F64), L(3, 2))
    m[rng.choice([2, 5])].eval()
    return Kind(m, lambda m: by_rows(m(x)), mixes=True)


@kind
def weights_scaled_by_the_batch(rng: random.Random) -> Kind:
    x = rand(rng.randint(2, 4), 3)
    f = lambda s, x: s.b((F.linear(x, s.w * s.a(x).mean(0).sigmoid())).tanh())  # noqa: E731
    return Kind(Fn(f, w=P(4, 3), a=L(3, 3), b=L(4, 2)), lambda m: by_rows(m(x)), mixes=True)


@kind
def checkpointed_regions(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x, deep = rand(n, 3), rng.random() < 0.5
    mixes = rng.random() < 0.4

    def part(s: Any, h: Tensor) -> Tensor:
        h = s.b(h).tanh() * s.g
        if deep:
            h = checkpoint(s.d, h, use_reentrant=False)
        return h - h.mean(0) if mixes else h

    def f(s: Any, x: Tensor) -> Tensor:
        h = checkpoint(part, s, s.a(x), use_reentrant=False)
        return s.c(checkpoint(part, s, h.sin(), use_reentrant=False))

    deeper = nn.Sequential(L(4, 4), nn.Softplus(), nn.LayerNorm(4, dtype=F64))
    return Kind(Fn(f, a=L(3, 4), b=L(4, 4), c=L(4, 2), d=deeper, g=P(4)), lambda m: by_rows(m(x)), mixes=mixes)


@kind
def changed_in_place(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(x).mul_(2)
        view = h.view(n, 2, 2)
        view[:, 0].mul_(s.g)
        h = h.clone()
        h[:, 1:3].add_(s.c(x).sigmoid_())
        h.t()[0].copy_(s.c(x.cos())[:, 0])
        out = s.b(h.relu_() if rng_choice else h.exp_())
        return out.add_(s.p).unsqueeze_(1)

    rng_choice = rng.random() < 0.5
    return Kind(Fn(f, a=L(3, 4), b=L(4, 2), c=L(3, 2), g=P(2), p=P(2)), lambda m: by_rows(m(x)))


@kind
def views_and_shared_memory(rng: random.Random) -> Kind:
    n, t = rng.randint(2, 4), rng.randint(2, 3)
    x = rand(n, t, 4)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(x).view(n, t, 2, 2).transpose(1, 2)
        one, other = h.unbind(1)
        h = torch.stack([one * s.g, other.tanh()], -1).as_strided((n, t, 4), (4 * t, 4, 1))
        h = h.expand(2, n, t, 4).diagonal(0, 2, 3)[1][:, : min(t, 4)]
        return s.b(h.unfold(1, 2, 1).square()).squeeze(1)

    return Kind(Fn(f, a=L(4, 4), b=L(2, 2), g=P(2)), lambda m: by_rows(m(x)))


@kind
def two_extended_parts(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x, y = rand(n, 3), rand(n, 3)

    def step(m: Any) -> Step:
        one, other = m.parts[0](x), m.parts[0](y)
        return by_rows(m.parts[1](one * other) + (one - other).square()[:, :2])

    m = nn.Module()
    m.parts = nn.ModuleList([nn.Sequential(L(3, 4), nn.Tanh()), nn.Sequential(L(4, 3), nn.Sigmoid(), L(3, 2))])
    return Kind(m, step)


@kind
def two_calls_beside_each_other(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x, y = rand(n, 3), rand(n, 3)
    m = nn.Sequential(L(3, 4), nn.GELU(), L(4, 2))
    join = rng.choice([torch.sub, torch.mul, lambda a, b: torch.stack([a, b], 1), lambda a, b: torch.cat([a, b], 1)])
    return Kind(m, lambda m: by_rows(join(m(x), m(y))))


@kind
def not_piecewise_linear(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(x)
        gate, value = h.chunk(2, 1)
        h = F.silu(gate) * value + F.glu(h) + gate.softmax(1).cumsum(1)
        h = h + F.normalize(h, dim=1) + h.logsumexp(1, keepdim=True) + h.norm(dim=1, keepdim=True)
        h = h / (1 + h.square()) + torch.atan2(h, s.g.exp()) + h.std(1, keepdim=True) + s.b(h).erf().sum(1)[:, None]
        h = h + (h[:, :, None] * h[:, None].abs().add(0.1).pow(1.5)).mean(2).sin() + h.tanh().prod(1, keepdim=True)
        return s.b(F.layer_norm(h, (3,), s.g, s.p))

    return Kind(Fn(f, a=L(3, 6), b=L(3, 2), g=P(3), p=P(3)), lambda m: by_rows(m(x)))


@kind
def without_second_derivatives(rng: random.Random) -> Kind:
    x = rand(rng.randint(2, 4), 3)
    f = lambda s, x: s.b(torch.cdist(s.a(x)[:, None], s.q)[:, 0].tanh())  # noqa: E731
    return Kind(Fn(f, a=L(3, 3), b=L(2, 2), q=P(2, 3)), lambda m: by_rows(m(x)))


@kind
def norms_of_each_sample(rng: random.Random) -> Kind:
    n = rng.randint(1, 3)
    x = rand(n, 2, 4)
    norms = [nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.LayerNorm([4, 4]), nn.RMSNorm(4)]
    m = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, dtype=F64), rng.choice(norms).to(F64), nn.Tanh(), nn.Conv1d(4, 2, 2, dtype=F64)
    )
    return Kind(m, lambda m: by_rows(m(x)))


@kind
def matrix_functions(rng: random.Random) -> Kind:
    n = rng.randint(2, 3)
    x = rand(n, 3)

    def f(s: Any, x: Tensor) -> Tensor:
        k = s.w @ s.w.T + torch.eye(3, dtype=F64)
        h = torch.linalg.solve(k, s.a(x).T).T
        root = torch.linalg.cholesky(s.b(x).reshape(n, 2, 2).square() + 2 * torch.eye(2, dtype=F64))
        return h[:, :2] + torch.linalg.det(k).log() + root.sum(1) + torch.matrix_exp(s.v)[0, :2]

    return Kind(Fn(f, w=P(3, 3), a=L(3, 3), b=L(3, 4), v=P(2, 2)), lambda m: by_rows(m(x)))


class Straight(torch.autograd.Function):
    """Its derivative is another one than the function's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return (x * scale).round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        return g * scale.tanh(), (g * x).sum(0)


@kind
def derivatives_that_are_given(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)
    f = lambda s, x: s.b(Straight.apply(s.a(x).tanh(), s.g))  # noqa: E731
    return Kind(Fn(f, a=L(3, 4), b=L(4, 2), g=P(4)), lambda m: by_rows(m(x)))


@kind
def tied_transposed_and_sliced(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)

    def f(s: Any, x: Tensor) -> Tensor:
        h = F.linear(x, s.w, s.p).tanh()
        h = F.linear(h, s.w.T, s.p[:3]) + s.p[1:] * s.w[0]
        return F.linear(h, s.w[1:3], s.w[3, :2]).sigmoid() + s.p.sum() * s.w.diagonal()[:2]

    return Kind(Fn(f, w=P(4, 3), p=P(4)), lambda m: by_rows(m(x)))


@kind
def hidden_layers_with_a_derivative(rng: random.Random) -> Kind:
    n = rng.randint(2, 3)
    x, mixes = rand(n, 2), rng.random() < 0.4

    def f(s: Any, x: Tensor) -> Tensor:
        z = x.clone().requires_grad_()
        energy = s.b((s.a(z) * s.g).tanh()).square()
        energy = energy - energy.mean(0) if mixes else energy
        (g,) = torch.autograd.grad(energy.square().sum(), z, create_graph=True)
        return s.c(g.sin())

    return Kind(Fn(f, a=L(2, 3), b=L(3, 1), c=L(2, 2), g=P(3)), lambda m: by_rows(m(x)), mixes=mixes)


@kind
def frozen_below(rng: random.Random) -> Kind:
    n = rng.randint(2, 4)
    x = rand(n, 3)
    m = nn.Sequential(L(3, 4), nn.Tanh(), L(4, 4), nn.BatchNorm1d(4, dtype=F64), nn.Sigmoid(), L(4, 2))
    for part in m[: rng.randint(1, 3)]:
        part.requires_grad_(False)
    return Kind(m, lambda m: by_rows(m(x)), mixes=True)


ALL = {**KINDS, **MORE}


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


# ---------------------------------------------------------------------------------------------------------------
# History


def a_step(model: nn.Module, batch: tuple[Any, ...], training: bool, extensions: list[Any], draw: int) -> str | None:
    """A backward pass of an extended model; the beginning of the message, if there is an error."""
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


def history(seed: int, steps: int = 5) -> None:
    rng = random.Random(f"history of second order {seed}")
    torch.manual_seed(seed)
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
    model = Fn(_routed, **parts)
    ours = extend(copy.deepcopy(model))
    for draw in range(steps):
        n, t, branch, training = rng.randint(1, 4), rng.randint(2, 3), rng.randrange(2), rng.random() < 0.4
        batch = (rand(n, t, 3), branch, torch.rand(n), torch.randint(2 + branch, (n,)), rng.choice(["mean", "sum"]))
        extensions = rng.choice(
            [
                lambda: [BatchGrad(), DiagGGNExact()],
                lambda: [BatchDiagGGNExact([0, 0]), SqrtGGNExact()],
                lambda: [DiagGGNMC(2), SqrtGGNMC(2), KFAC()],
                lambda: [KFLR(slice(None, None, -1)), BatchGrad([0])],
                lambda: [DiagHessian()],
                lambda: [BatchDiagHessian([0]), DiagGGNExact([0])],
            ]
        )
        frozen = rng.choice([None, "a", "norm", "experts", "heads"])
        for name, part in ours.named_children():
            part.requires_grad_(name != frozen)
        fresh = copy.deepcopy(model)
        for (_, p), q in zip(ours.named_parameters(), fresh.parameters(), strict=True):
            q.requires_grad_(p.requires_grad)
        fresh.load_state_dict(ours.state_dict())
        plain = copy.deepcopy(fresh)
        extend(fresh)
        one = a_step(ours, batch, training, extensions(), draw)
        assert one == a_step(fresh, batch, training, extensions(), draw)
        if one is not None:
            continue
        a_step(plain, batch, training, [], draw)
        for (name, p), q, r in zip(ours.named_parameters(), fresh.parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (r.grad is None), (draw, name)
            assert p.grad is None or torch.equal(p.grad, r.grad), (draw, name, "gradient")
            for field in {e.savefield for e in extensions()} if p.grad is not None else ():
                a, b = (leaves(getattr(own, field, None)) for own in (p, q))
                assert len(a) == len(b), (draw, name, field)
                assert all(map(torch.equal, a, b)), (draw, name, field)
        for key, value in plain.state_dict().items():
            assert torch.equal(value, fresh.state_dict()[key]), (draw, key)
            assert torch.equal(value, ours.state_dict()[key]), (draw, key)


def leaves(found: Any) -> list[Tensor]:
    return [] if found is None else found if isinstance(found, list) else [found]


@pytest.mark.parametrize("seed", range(3))
def test_history_does_not_matter(seed):
    history(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 15))
def test_long_histories_do_not_matter(seed):
    history(seed, 10)
