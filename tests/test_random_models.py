"""Random models of many kinds: all quantities of first order, and the gradient, against plain autograd."""

from __future__ import annotations

import copy
import gc
import random
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models.kinds import KINDS, Cubed, Kind, Step, by_rows, by_terms, sq
from models.small import Fn, L, P, rand
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from truths.autograd import individual_gradients, through_rows

from backpack import backpack, extend
from backpack.extensions import BatchDotGrad, BatchGrad, BatchL2Grad, ClippedGrad, SumGradSquared, Variance

F64 = torch.float64


def truth_of(step: Step, parameters: list[Tensor]) -> list[Tensor]:
    if step.terms is None:
        assert step.output is not None
        return through_rows(step.output, step.loss, parameters, step.axis)
    return individual_gradients(step.terms, parameters)


def subset(rng: random.Random, n: int) -> tuple[Any, list[int]]:
    choice = rng.randrange(4)
    if choice == 0:
        return None, list(range(n))
    if choice == 1:
        return slice(None, None, -1), list(range(n))[::-1]
    rows = [rng.randrange(n) for _ in range(rng.randint(1, n + 1))]
    return rows, rows


def near(found: Tensor, truth: Tensor, size: Tensor, what: Any) -> None:
    """Equal to 1e-9 of ``size``, which is broadcast against them."""
    assert found.shape == truth.shape, (what, found.shape, truth.shape)
    error = ((found.detach() - truth.detach()).abs() / size.clamp_min(1e-12)).max() if truth.numel() else 0.0
    assert error <= 1e-9, (what, float(error))


def laws(kind: Kind, rng: random.Random, ours: nn.Module | None = None) -> None:
    plain, ours = kind.model, ours or extend(copy.deepcopy(kind.model))
    names = [name for name, p in plain.named_parameters() if p.requires_grad]
    of = dict(plain.named_parameters())
    torch.manual_seed(7)
    state = copy.deepcopy(plain.state_dict())
    made = kind.step(plain)
    truth = truth_of(made, [of[name] for name in names])
    made.loss.backward()
    n = len(truth[0])
    squares = torch.stack([t.reshape(len(t), -1).square().sum(1) for t in truth]).sum(0)
    sizes = squares.sqrt()  # of each sample's gradient
    bound = 0.7 * float(sizes.mean()) + 1e-12
    after = {key: value.clone() for key, value in plain.state_dict().items()}
    for clipped in (False,) if kind.mixes else (False, True):
        ours.load_state_dict(state)
        for p in ours.parameters():
            p.grad = None
        chosen = [subset(rng, n) for _ in range(5)]
        w, rows = [c[0] for c in chosen], [c[1] for c in chosen]
        extensions: list[Any] = (
            [ClippedGrad(bound, w[0]), BatchL2Grad(w[1])]
            if clipped
            else [BatchGrad(w[0]), BatchL2Grad(w[1]), SumGradSquared(w[2]), Variance(w[3]), BatchDotGrad(w[4])]
        )
        torch.manual_seed(7)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = kind.step(ours).loss
            with backpack(*extensions):
                loss.backward()
        mine = dict(ours.named_parameters())
        for key, value in ours.state_dict().items():
            assert torch.equal(value, after[key]), ("state", key)
        for name, t in zip(names, truth, strict=True):
            p, q = mine[name], of[name]
            assert (p.grad is None) == (q.grad is None), ("grad", name)
            if q.grad is None:
                continue
            assert torch.equal(p.grad.to_dense(), q.grad.to_dense()), ("grad", name)
            if clipped:
                if not hasattr(p, "grad_clipped") and not t.any():
                    continue
                factor = (bound / sizes[rows[0]]).clamp(max=1)
                near(p.grad_clipped, torch.einsum("n,n...->...", factor, t[rows[0]]), sizes.max(), (name, "clipped"))
                continue
            if not hasattr(p, "grad_batch") and not t.any():
                continue
            one = [-1, *[1] * (t.dim() - 1)]
            near(p.grad_batch, t[rows[0]], sizes[rows[0]].reshape(one), (name, "grad_batch"))
            near(p.batch_l2, t[rows[1]].reshape(len(rows[1]), -1).square().sum(1), squares[rows[1]], (name, "batch_l2"))
            near(p.sum_grad_squared, t[rows[2]].square().sum(0), squares.max(), (name, "sum_grad_squared"))
            own = t[rows[3]]
            near(p.variance, own.square().mean(0) - own.mean(0).square(), squares.max(), (name, "variance"))
            flat, root = t[rows[4]].reshape(len(rows[4]), -1), sizes[rows[4]]
            near(p.batch_dot, flat @ flat.T, root[:, None] * root, (name, "batch_dot"))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_quantities_and_gradient_are_those_of_plain_autograd(name, seed):
    rng = random.Random(f"{name}{seed}")
    torch.manual_seed(rng.randrange(2**30))
    laws(KINDS[name](rng), rng)


# ---------------------------------------------------------------------------------------------------------------
# What a step leaves behind


def small() -> nn.Module:
    return nn.Sequential(L(3, 4), nn.Tanh(), L(4, 2))


def check(model: nn.Module, step: Callable[[nn.Module], Tensor]) -> None:
    """``grad_batch`` of a step against its terms."""
    ours = extend(copy.deepcopy(model))
    truth = truth_of(by_terms(step(model)), list(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        terms = step(ours)
        with backpack(BatchGrad()):
            terms.sum().backward()
    size = max(t.abs().max() for t in truth)
    for (name, p), t in zip(ours.named_parameters(), truth, strict=True):
        near(p.grad_batch, t, size, name)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "added to": lambda out: out.add_(1),
    "multiplied": lambda out: out.mul_(2),
    "a row written": lambda out: out.__setitem__(0, 0) or out,  # type: ignore[func-returns-value]
    "a column scaled": lambda out: out.select(-1, 1).mul_(3) is None or out,
}
RETURNS: dict[str, Callable[[Tensor], Tensor]] = {
    "a tensor": lambda out: out,
    "a view": lambda out: out.view(len(out), 2, 2),
    "a slice": lambda out: out[:, :3],
    "transposed twice": lambda out: out.mT.mT,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("returned", RETURNS)
def test_outputs_may_be_changed_in_place(returned, change):
    x = rand(4, 3)
    model = Fn(lambda s, x: RETURNS[returned](s.b(s.a(x).tanh())), a=L(3, 4), b=L(4, 4))
    check(model, lambda m: sq(CHANGES[change](m(x))))


@dataclass
class Result:
    logits: Tensor
    more: tuple[Tensor, ...]


def test_outputs_in_a_dataclass_are_outputs():
    x = rand(4, 3)
    model = Fn(lambda s, x: Result(s.b(s.a(x).tanh()), (s.a(x),)), a=L(3, 4), b=L(4, 2))
    check(model, lambda m: sq((lambda r: torch.cat([r.logits, *r.more], 1))(m(x))))


def test_the_state_of_a_model_is_as_after_a_plain_step():
    x = rand(3, 4)

    def f(s: Any, x: Tensor) -> Tensor:
        s.seen = s.seen + x.sum()
        s.calls.append(len(x))
        s.kept = s.a((x - 0.1) / 0.3)
        return s.b(s.kept.tanh())

    model = Fn(f, a=L(4, 4), b=L(4, 3))
    model.register_buffer("seen", torch.zeros((), dtype=F64))
    model.calls = []
    ours = extend(copy.deepcopy(model))
    sq(model(x)).sum().backward()
    with backpack(BatchGrad()):
        sq(ours(x)).sum().backward()
    assert ours.calls == model.calls
    assert torch.equal(ours.seen, model.seen)
    assert torch.equal(ours.kept, model.kept)
    assert ours.kept.requires_grad


def test_batch_norm_in_training_where_sizes_do_not_tell_the_samples():
    x = rand(3, 4)
    model = Fn(lambda s, x: s.b(s.n(s.a((x - 0.1) / 0.3)).tanh()), a=L(4, 4), n=nn.BatchNorm1d(4, dtype=F64), b=L(4, 3))
    laws(Kind(model, lambda m: by_rows(m(x)), mixes=True), random.Random(0))


def test_linear_hooks_of_tensors_change_individual_gradients_too():
    x = rand(4, 3)

    def f(s: Any, x: Tensor) -> Tensor:
        h = s.a(x)
        h.register_hook(lambda grad: 2 * grad)
        return s.b(h.tanh())

    check(Fn(f, a=L(3, 4), b=L(4, 2)), lambda m: sq(m(x)))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "layer norm": lambda: nn.LayerNorm(4, dtype=F64),
    "group norm": lambda: nn.GroupNorm(1, 4, dtype=F64),
    "rms norm": lambda: nn.RMSNorm(4, dtype=F64),
    "batch norm": lambda: nn.BatchNorm1d(4, dtype=F64),
    "batch norm in eval": lambda: nn.BatchNorm1d(4, dtype=F64).eval(),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(L(4, 4)),
    "prelu": lambda: nn.PReLU(4, dtype=F64),
    "bilinear": lambda: Fn(lambda s, h: s.l(h, h.sin()), l=nn.Bilinear(4, 4, 4, dtype=F64)),
    "power": lambda: Fn(lambda s, h: h.sigmoid() ** s.p, p=P(4)),
    "convolution": lambda: Fn(lambda s, h: s.l(h[:, None])[:, 0], l=nn.Conv1d(1, 1, 3, padding=1, dtype=F64)),
    "permuted": lambda: Fn(lambda s, h: s.l(h[[1, 0, 3, 2]])[[2, 1, 0, 3]], l=L(4, 4)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_individual_gradients_are_differentiable(layer):
    x = rand(4, 3)
    model = nn.Sequential(L(3, 4), LAYERS[layer](), L(4, 2))
    ours = extend(copy.deepcopy(model))
    parameters, mine = list(model.parameters()), list(ours.parameters())
    stacked = individual_gradients(sq(model(x)), parameters, create_graph=True)
    truth = torch.autograd.grad(sum(g.pow(3).sum() for g in stacked), parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        total = sq(ours(x)).sum()
        with backpack(BatchGrad()):
            grads = torch.autograd.grad(total, mine, create_graph=True)
    found = torch.autograd.grad(sum(p.grad_batch.pow(3).sum() for p in mine), mine)
    size = max(t.abs().max() for t in truth)
    for (name, _), a, b in zip(model.named_parameters(), found, truth, strict=True):
        near(a, b, size, name)
    largest = max(rows.abs().max() for rows in stacked)
    for (name, _), grad, rows in zip(model.named_parameters(), grads, stacked, strict=True):
        near(grad, rows.sum(0), largest, name)


PARTS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: LAYERS[name]
        for name in ("tanh", "layer norm", "batch norm", "weight norm", "power", "permuted", "convolution")
    },
    "function": lambda: Fn(lambda s, h: Cubed.apply(h, 3, s.w, None)[0], w=P(4)),
    "recurrent": lambda: Fn(lambda s, h: s.l(h[:, None])[0][:, 0], l=nn.GRU(4, 4, batch_first=True, dtype=F64)),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_may_be_checkpointed(part):
    x = rand(4, 3)
    f = lambda s, x: s.b(checkpoint(s.p, s.a(x), use_reentrant=False) if s.saves else s.p(s.a(x)))  # noqa: E731
    model = Fn(f, a=L(3, 4), p=PARTS[part](), b=L(4, 2))
    model.saves = False

    def step(m: Any) -> Tensor:
        m.saves = m is not model
        return sq(m(x))

    check(model, step)


def _relu_first() -> nn.Module:
    return extend(Fn(lambda s, h, *_: s.l(h.relu()), l=L(10, 10)))


class Box:
    pass


def _residual(m: nn.Module) -> None:
    h = rand(4, 10).requires_grad_() * 1
    h.add_(m(h).sin())
    with backpack(BatchGrad()):
        h.sum().backward()


def _dict(m: nn.Module) -> None:
    state: dict[str, Tensor] = {}
    state["out"] = m(rand(4, 10), state)
    with backpack(BatchGrad()):
        state["out"].sum().backward()


def _object(m: nn.Module) -> None:
    box: Any = Box()
    box.out = m(rand(4, 10), box)
    with backpack(BatchGrad()):
        box.out.sum().backward()


def _plain(m: nn.Module) -> None:
    with backpack(BatchGrad()):
        m(rand(4, 10)).sum().backward()


def _penalty(m: nn.Module) -> None:
    x = rand(4, 10).requires_grad_()
    out = m(x).sin().sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with backpack(BatchGrad()):
        (out + grad.square().sum()).backward()


def _create_graph(m: nn.Module) -> None:
    with backpack(BatchGrad()):
        torch.autograd.grad(m(rand(4, 10)).sin().sum(), list(m.parameters()), create_graph=True)
    sum(p.grad_batch.square().sum() for p in m.parameters()).backward()
    for p in m.parameters():
        del p.grad_batch


@pytest.mark.parametrize("use", [_plain, _penalty, _create_graph, _residual, _dict, _object])
def test_nothing_of_a_step_stays(use):
    model = _relu_first()
    kept: list[Any] = []
    hook = model.register_forward_hook(lambda *given: kept.append(weakref.ref(given[2])))
    for _ in range(5):
        use(model)
        model.zero_grad()
    hook.remove()
    gc.collect()
    assert [ref() is None for ref in kept] == [True] * len(kept)


def test_a_loss_on_rows_without_a_sample_is_not_left_out_silently():
    x, chosen = rand(5, 3), torch.tensor([3, 1, 0])
    model = extend(Fn(lambda s, x: (lambda h: (s.b(h.tanh()[chosen]), h))(s.a(x)), a=L(3, 4), b=L(4, 2)))
    out, h = model(x)
    with warnings.catch_warnings(record=True) as told, backpack(BatchGrad()):
        warnings.simplefilter("always")
        (sq(out).sum() + sq(h).sum()).backward()
    parts = [torch.allclose(p.grad_batch.sum(0), p.grad) for p in model.parameters()]
    assert all(parts) or told
