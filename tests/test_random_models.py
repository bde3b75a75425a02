"""Random models of many kinds: all quantities of first order, and the gradient, against plain autograd."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import pytest
import torch
from models.kinds import KINDS, Kind, Step, by_rows
from models.small import Fn, L, rand
from torch import Tensor, nn
from truths.autograd import individual_gradients, through_rows
from truths.first_order import norms_of, quantities

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


FIELDS = ["grad_batch", "batch_l2", "sum_grad_squared", "variance", "batch_dot"]


def laws(kind: Kind, rng: random.Random, ours: nn.Module | None = None) -> None:
    plain, ours = kind.model, ours or extend(copy.deepcopy(kind.model))
    names = [name for name, p in plain.named_parameters() if p.requires_grad]
    parameters = dict(plain.named_parameters())
    torch.manual_seed(7)
    state = copy.deepcopy(plain.state_dict())
    made = kind.step(plain)
    truth = truth_of(made, [parameters[name] for name in names])
    made.loss.backward()
    n = len(truth[0])
    sizes = norms_of(dict(zip(names, truth, strict=True)))  # of each sample's gradient
    squares = sizes.square()
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
            p, q = mine[name], parameters[name]
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
            of = {field: quantities(t[r])[field] for field, r in zip(FIELDS, rows, strict=True)}
            root = sizes[rows[4]]
            near(p.batch_l2, of["batch_l2"], squares[rows[1]], (name, "batch_l2"))
            near(p.sum_grad_squared, of["sum_grad_squared"], squares.max(), (name, "sum_grad_squared"))
            near(p.variance, of["variance"], squares.max(), (name, "variance"))
            near(p.batch_dot, of["batch_dot"], root[:, None] * root, (name, "batch_dot"))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_quantities_and_gradient_are_those_of_plain_autograd(name, seed):
    rng = random.Random(f"{name}{seed}")
    torch.manual_seed(rng.randrange(2**30))
    laws(KINDS[name](rng), rng)


def test_batch_norm_in_training_where_sizes_do_not_tell_the_samples():
    x = rand(3, 4)
    model = Fn(lambda s, x: s.b(s.n(s.a((x - 0.1) / 0.3)).tanh()), a=L(4, 4), n=nn.BatchNorm1d(4, dtype=F64), b=L(4, 3))
    laws(Kind(model, lambda m: by_rows(m(x)), mixes=True), random.Random(0))
