"""Activation checkpointing: right, and without keeping what it drops."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from truth import close

from backpack import backpack, extend
from backpack.extensions import (
    KFLR,
    BatchDiagGGNExact,
    BatchGrad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    Variance,
)
from backpack.uses import DenseUse

X = torch.arange(40, dtype=torch.float64).reshape(4, 2, 5).sin()
Y = torch.tensor([0, 2, 1, 0])


class Region(nn.Module):
    """Layers, a bare parameter in arithmetic, a computed weight, a layer called twice, one checkpoint in another."""

    def __init__(self, width=5):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, 7), nn.Linear(7, width)
        self.gru, self.scale = nn.GRU(width, width, batch_first=True), nn.Parameter(torch.rand(width))
        self.dropout, self.seen = nn.Dropout(0.3), []

    def inner(self, h):
        return self.second(self.first(h).tanh())

    def forward(self, x, again):
        h = self.gru(self.norm(x) * self.scale)[0]
        self.seen += [weakref.ref(h)]
        h = F.linear(self.dropout(self.again(self.inner, h, again)), self.second.weight.T)
        self.seen += [weakref.ref(h)]
        return h @ self.first.weight

    @staticmethod
    def again(function, h, again):
        return checkpoint(function, h, use_reentrant=False) if again else function(h)


class Model(nn.Module):
    def __init__(self, again):
        super().__init__()
        self.again, self.blocks, self.last = again, nn.ModuleList([Region(), Region()]), nn.Linear(10, 3)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, again=True, use_reentrant=False) if self.again else block(x, False)
        return self.last(x.flatten(1))


def models():
    torch.manual_seed(0)
    plain, again = extend(Model(False).double()), extend(Model(True).double())
    again.load_state_dict(plain.state_dict())
    return plain, again


def run(model, *exts, **options):
    torch.manual_seed(1)
    with backpack(*exts):
        extend(nn.CrossEntropyLoss())(model(X), Y).backward(**options)


EXTENSIONS = {
    "first order": [BatchGrad(), Variance([2, 0]), ClippedGrad(1e-2)],
    "seeds": [DiagGGNExact(chunk_size=1), SqrtGGNExact(), KFLR(approx="expand")],
    "both": [BatchGrad([1]), BatchDiagGGNExact(), DiagGGNMC(2)],
    "selected": [DiagGGNExact([3]), BatchDiagGGNExact([1, 1])],
}


def same(plain, again, exts):
    for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
        for field in (ext.savefield for ext in exts):
            pairs = [(getattr(p, field), getattr(q, field))]
            for a, b in zip(*pairs[0], strict=True) if field == "kflr" else pairs:
                assert close(b, a, rtol=1e-12), (name, field)


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_results_are_those_without(kind):
    plain, again = models()
    for model in (plain, again):
        run(model, *EXTENSIONS[kind])
    same(plain, again, EXTENSIONS[kind])


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("options", [{"retain_graph": True}, {"create_graph": True}])
def test_graphs_that_stay_give_the_same_again(options):
    exts = [BatchGrad(), DiagGGNExact()]
    plain, again = models()
    for model in (plain, again):
        torch.manual_seed(1)
        loss = extend(nn.CrossEntropyLoss())(model(X), Y)
        for _ in range(2):
            model.zero_grad()
            with backpack(*exts):
                loss.backward(**options)
    same(plain, again, exts)
    if "create_graph" in options:
        found = [
            torch.autograd.grad(sum(p.grad_batch[0].square().sum() for p in m.parameters()), list(m.parameters()))
            for m in (plain, again)
        ]
        assert all(close(b, a, rtol=1e-9) for a, b in zip(*found, strict=True))
        for model in (plain, again):
            for p in model.parameters():
                vars(p).clear()
                p.grad = None


def test_nothing_of_a_region_is_kept():
    _, again = models()
    with backpack(BatchGrad(), DiagGGNExact()):
        torch.manual_seed(1)
        loss = extend(nn.CrossEntropyLoss())(again(X), Y)
        assert all(len(block.seen) >= 2 for block in again.blocks)
        assert not any(seen() is not None for block in again.blocks for seen in block.seen)
        loss.backward()
    assert not any(seen() is not None for block in again.blocks for seen in block.seen)


def test_inputs_that_came_back_go_as_the_pass_goes_on():
    """Without the garbage collector."""
    model, left = models()[1], []
    torch.manual_seed(1)
    loss = extend(nn.CrossEntropyLoss())(model(X), Y)
    gc.collect()

    def hook(module):
        if module is model.blocks[0].norm:
            left.append([use for use in gc.get_objects() if type(use) is DenseUse])

    gc.disable()
    try:
        with backpack(BatchGrad(), extension_hook=hook):
            loss.backward()
    finally:
        gc.enable()
    assert left == [[]]


def test_the_exact_diagonal_of_the_hessian_is_refused():
    with pytest.raises(RuntimeError, match="DiagHessian .*Run the forward pass without it"):
        run(models()[1], DiagHessian())
