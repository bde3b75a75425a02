"""Individual gradients where outputs are changed in place or hooked, and graphs are differentiated or checkpointed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models.kinds import Cubed, sq
from models.small import F64, Fn, L, P, rand
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from truths import close
from truths.autograd import individual_gradients

from backpack import backpack, extend
from backpack.extensions import BatchGrad, BatchL2Grad


def check(model: nn.Module, step: Callable[[nn.Module], Tensor]) -> None:
    """``grad_batch`` of a step against its terms."""
    ours = extend(copy.deepcopy(model))
    truth = individual_gradients(step(model), model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        terms = step(ours)
        with backpack(BatchGrad()):
            terms.sum().backward()
    size = max(t.abs().max() for t in truth)
    for (name, p), t in zip(ours.named_parameters(), truth, strict=True):
        assert close(p.grad_batch, t, size, 1e-9), name


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
        assert close(a, b, size, 1e-9), name
    largest = max(rows.detach().abs().max() for rows in stacked)
    for (name, _), grad, rows in zip(model.named_parameters(), grads, stacked, strict=True):
        assert close(grad, rows.sum(0), largest, 1e-9), name


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


def test_a_loss_on_rows_without_a_sample_is_not_left_out_silently():
    x, chosen = rand(5, 3), torch.tensor([3, 1, 0])
    model = extend(Fn(lambda s, x: (lambda h: (s.b(h.tanh()[chosen]), h))(s.a(x)), a=L(3, 4), b=L(4, 2)))
    out, h = model(x)
    with warnings.catch_warnings(record=True) as told, backpack(BatchGrad()):
        warnings.simplefilter("always")
        (sq(out).sum() + sq(h).sum()).backward()
    parts = [torch.allclose(p.grad_batch.sum(0), p.grad) for p in model.parameters()]
    assert all(parts) or told


class Rows(nn.Module):
    """Returns a row for each position, in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.table, self.mix, self.last = nn.Embedding(9, 5), nn.GRU(5, 5, batch_first=True), nn.Linear(5, 3)
        self.double().way = way

    def forward(self, ids):
        h = self.table(ids).tanh()
        if "mixed" in self.way:
            h = self.mix(h)[0]
        if "inside" in self.way:
            return self.last(h.flatten(0, 1))
        out = self.last(h)
        return (out.transpose(0, 1) if "turned" in self.way else out).reshape(-1, 3)


@pytest.mark.parametrize("way", ["flat", "flat inside", "turned", "mixed", "mixed inside", "mixed turned"])
@pytest.mark.parametrize("positions", [4, 7])
def test_a_batch_of_one_sequence_has_one_sample(way, positions):
    model, ids, lossfunc = extend(Rows(way)), torch.randint(9, (4, positions)), nn.CrossEntropyLoss(reduction="sum")
    y = torch.randint(3, (4, positions))
    turned = "turned" in way

    def individual(ids, y):
        with backpack(BatchGrad(), BatchL2Grad()):
            lossfunc(model(ids), (y.T if turned else y).flatten()).backward()
        return {name: (p.grad_batch, p.batch_l2) for name, p in model.named_parameters() if hasattr(p, "grad_batch")}

    rows = individual(ids, y)
    for n in range(4):
        for name, (grads, norms) in individual(ids[n : n + 1], y[n : n + 1]).items():
            assert grads.shape[0] == 1
            assert close(grads[0], rows[name][0][n]) and close(norms[0], rows[name][1][n])
