"""Activation checkpointing: right, and without keeping what it drops."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from truths import close
from truths.second_order import hessian_blocks

from backpack import backpack, disable, extend
from backpack.extensions import (
    HMP,
    KFLR,
    BatchDiagGGNExact,
    BatchDiagHessian,
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
    others = dense_uses()  # that tests before this one have left
    torch.manual_seed(1)
    loss = extend(nn.CrossEntropyLoss())(model(X), Y)
    gc.collect()

    def hook(module):
        if module is model.blocks[0].norm:
            left.append([use for use in dense_uses() if all(use is not other for other in others)])

    gc.disable()
    try:
        with backpack(BatchGrad(), extension_hook=hook):
            loss.backward()
    finally:
        gc.enable()
    assert left == [[]]


def dense_uses():
    """All that are alive."""
    return [use for use in gc.get_objects() if type(use) is DenseUse]


def blocks_of_the_hessian(model):
    """Of each parameter, ``[p, p]``."""
    torch.manual_seed(1)
    with disable():
        return hessian_blocks(model, lambda: nn.CrossEntropyLoss()(model(X), Y))


@pytest.mark.parametrize("training", [True, False])
def test_hessians_are_exact(training):
    """Of parameters that are used several times, too, the data of which come back cut off from the graph."""
    plain, again = models()
    plain.train(training), again.train(training)
    true = blocks_of_the_hessian(plain)
    run(again, DiagHessian(), BatchDiagHessian(chunk_size=3), BatchGrad(), HMP())
    whole = [p.diag_h_batch for p in again.parameters()]
    for p, block in zip(again.parameters(), true, strict=True):
        assert close(p.diag_h.flatten(), block.diagonal(), rtol=1e-9)
        assert close(p.diag_h_batch.sum(0).flatten(), block.diagonal(), rtol=1e-9)
        unit = torch.eye(p.numel(), dtype=p.dtype)[-1].reshape(p.shape)
        assert close(p.hmp(unit).flatten(), block[-1], rtol=1e-9)
    run(again, BatchDiagHessian([2, 0, 2]))
    assert all(close(p.diag_h_batch, w[[2, 0, 2]], rtol=1e-9) for p, w in zip(again.parameters(), whole, strict=True))


def left_of_regions(*exts):
    """How much memory that layers of regions returned is there when the backward pass begins, and when it has ended."""
    model, memory, found = models()[1], [], []

    def note(layer, inputs, output):
        for tensor in output if isinstance(output, tuple) else [output]:
            memory.append(StorageWeakRef(tensor.untyped_storage()))

    def count(*_):
        found.append(sum(not own.expired() for own in memory))

    for layer in (layer for block in model.blocks for layer in block.children()):
        layer.register_forward_hook(note)
    torch.manual_seed(1)
    with backpack(*exts):
        out = model(X)
        once = len(memory)
        out.register_hook(count)
        extend(nn.CrossEntropyLoss())(out, Y).backward()
    count()
    assert len(memory) >= 2 * once
    return found


@pytest.mark.parametrize("extension", [BatchGrad, DiagGGNExact, DiagHessian])
def test_nothing_that_came_back_for_an_extension_stays(extension):
    """When the ordinary backward pass goes on, nor after it: no more than PyTorch's own leaves."""
    assert max(left_of_regions(extension())) <= max(left_of_regions())


@pytest.mark.parametrize("extension", [BatchGrad, DiagGGNExact, DiagHessian])
def test_a_region_of_one_layer_alone(extension):
    """The pull-back may stop at its output, so that it would not be computed again."""

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = checkpoint(self.first, x, use_reentrant=False) if self.training else self.first(x)
            return self.last(h.tanh())

    torch.manual_seed(0)
    model, lossfunc = extend(Alone().double()), extend(nn.CrossEntropyLoss())
    found = []
    for again in (False, True):
        model.train(again)
        with backpack(extension()):
            lossfunc(model(X[:, 0]), Y).backward()
        found.append([getattr(p, extension.savefield) for p in model.parameters()])
    assert all(close(b, a, rtol=1e-12) for a, b in zip(*found, strict=True))
