"""Layers in the states in which users meet them: not initialized yet, on the fast path, with bags of any length."""

from functools import partial
from itertools import pairwise

import numpy
import pytest
import torch
from models.problem import Problem
from torch import nn
from truths import close
from truths.autograd import through_rows
from truths.first_order import check_first_order

from backpack import backpack, extend
from backpack.extensions import (
    KFLR,
    BatchDiagGGNExact,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    Variance,
)


def test_lazy_layers_may_be_extended_before_they_are_initialized():
    X = torch.randn(3, 4, dtype=torch.float64)
    model = extend(nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(2)).double())
    with backpack(BatchGrad()):
        model(X).square().sum().backward()
    for p in model.parameters():
        rows = [torch.autograd.grad(model(x[None]).square().sum(), p)[0] for x in X]
        assert close(p.grad_batch, torch.stack(rows))


def test_an_encoder_in_evaluation_mode_is_exact_beside_its_fast_path():
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().eval()
    X = torch.randn(3, 5, 4, dtype=torch.float64)
    extend(model)
    with torch.no_grad():
        fast = model(X)
    check_first_order(Problem(model, (X,)), lambda k: "all", 1.0)
    assert close(model(X), fast)


class Bags(nn.Module):
    """What is given first says how the samples are counted."""

    def __init__(self, offsets_first=False, **options):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(6, 4, padding_idx=2, **options), nn.Linear(4, 3)
        self.offsets_first = offsets_first

    def forward(self, *given):
        index, offsets = given[::-1] if self.offsets_first else given
        return self.out(self.bag(index, offsets))


@pytest.mark.parametrize("words", [7, 4])
@pytest.mark.parametrize("last", [False, True], ids=["", "last"])
@pytest.mark.parametrize("build", [partial(Bags, mode="sum"), partial(Bags, True), partial(nn.EmbeddingBag, 6, 4)])
def test_bags_cut_by_offsets_are_the_samples_whatever_is_given_first(build, last, words):
    """Also where there are as many words as bags, one of which is empty."""
    starts = [0, 2, 2, min(5, words)]
    index, offsets = torch.tensor([0, 1, 2, 5, 5, 5, 3])[:words], torch.tensor([*starts, words] if last else starts)
    model, targets = extend(build(include_last_offset=last).double()), torch.tensor([0, 1, 2, 1])
    lossfunc = extend(nn.CrossEntropyLoss(reduction="sum"))

    def output(index, offsets):
        return model(offsets, index) if getattr(model, "offsets_first", False) else model(index, offsets)

    loss = lossfunc(output(index, offsets), targets)
    with backpack(BatchGrad(), Variance(subsampling=[3, 1]), BatchDiagGGNExact(), DiagGGNExact(subsampling=[3, 1])):
        loss.backward()
    for p in model.parameters():
        grads, diagonals = [], []
        for place, (a, b) in enumerate(pairwise([*starts, words])):
            out = output(index[a:b], torch.tensor([0, b - a] if last else [0]))
            loss = nn.functional.cross_entropy(out, targets[place : place + 1])
            grads += torch.autograd.grad(loss, p, retain_graph=True)
            rows = torch.stack([torch.autograd.grad(z, p, retain_graph=True)[0].flatten() for z in out[0]])
            y = out[0].softmax(0)
            diagonals.append(((torch.diag(y) - y.outer(y)) @ rows * rows).sum(0).reshape(p.shape))
        grads, diagonals = torch.stack(grads), torch.stack(diagonals)
        assert close(p.grad_batch, grads)
        assert close(p.variance, grads[[3, 1]].var(0, correction=0), grads.square().max())
        assert close(p.diag_ggn_exact_batch, diagonals)
        assert close(p.diag_ggn_exact, diagonals[[3, 1]].sum(0))


def test_words_that_all_bags_take_belong_to_each_of_them():
    class Both(Bags):
        def forward(self, index, offsets):
            words = nn.functional.embedding(index, self.bag.weight).mean(0)
            return super().forward(index, offsets) + words.sum()

    model = extend(Both().double())
    out = model(torch.tensor([0, 1, 2, 2, 5, 5, 3]), torch.tensor([0, 2, 3, 6]))
    loss = out.square().sum()
    expected = through_rows(out, loss, list(model.parameters()))
    with pytest.warns(UserWarning, match="Samples are mixed by Add"), backpack(BatchGrad()):
        loss.backward()
    assert all(close(p.grad_batch, rows) for p, rows in zip(model.parameters(), expected, strict=True))


class Weighed(nn.Linear):
    def forward(self, x, weights):
        return super().forward(x) * torch.from_numpy(weights)


def test_a_model_may_be_given_arrays_beside_tensors():
    model, lossfunc = extend(Weighed(4, 3).double()), extend(nn.CrossEntropyLoss(reduction="sum"))
    X, y, weights = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0]), numpy.array([0.5, 2.0, -1.0])
    with backpack(BatchGrad()):
        lossfunc(model(X, weights), y).backward()
    for n in range(5):
        (truth,) = torch.autograd.grad(lossfunc(model(X[n : n + 1], weights), y[n : n + 1]), model.weight)
        assert close(model.weight.grad_batch[n], truth)


@pytest.mark.parametrize("both", [False, True], ids=["", "states"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"num_layers": 2, "bias": False}, {"num_layers": 2, "batch_first": True}],
    ids=str,
)
def test_fused_recurrent_layers_in_single_precision_are_right(options, both):
    torch.manual_seed(0)
    layer, axis = nn.LSTM(3, 4, **options), 0 if options.get("batch_first") else 1
    x = torch.randn(5, 6, 3)

    def value(x):
        out, (_, cell) = layer(x)
        return out.square().sum() + (cell.sin().sum() if both else 0)

    parameters = list(extend(layer).parameters())
    expected = [torch.autograd.grad(value(x.narrow(axis, n, 1)), parameters) for n in range(x.shape[axis])]
    with backpack(BatchGrad(), Variance(subsampling=[2, 0])):
        value(x).backward()
    for p, rows in zip(parameters, map(torch.stack, zip(*expected, strict=True)), strict=True):
        assert close(p.grad_batch, rows, rtol=1e-5)
        assert close(p.variance, rows[[2, 0]].var(0, correction=0), rows.square().max(), rtol=1e-5)


class WithoutEntries(nn.Module):
    """Parameters without entries, beside others."""

    def __init__(self):
        super().__init__()
        self.some, self.none = nn.Linear(4, 3), nn.Parameter(torch.zeros(0, 4))
        self.double()

    def forward(self, x):
        return torch.cat([nn.functional.linear(x, self.none), self.some(x)], -1)


@pytest.mark.parametrize("shape", [(5, 4), (5, 2, 4)])
def test_parameters_without_entries_have_results_without_entries(shape):
    model, X = extend(WithoutEntries()), torch.randn(shape, dtype=torch.float64)
    lossfunc, y = extend(nn.MSELoss(reduction="sum")), torch.zeros(*shape[:-1], 3, dtype=torch.float64)
    results = []
    for part in (model, model.some):
        with backpack(BatchGrad(), BatchL2Grad(), BatchDotGrad(), Variance(), ClippedGrad(0.1), DiagGGNExact(), KFLR()):
            lossfunc(part(X), y).backward()
        results.append(dict(vars(model.some.weight)))
    for field in ("grad_batch", "batch_l2", "batch_dot", "variance", "grad_clipped", "diag_ggn_exact"):
        assert close(results[0][field], results[1][field])
    assert all(close(one, other) for one, other in zip(results[0]["kflr"], results[1]["kflr"], strict=True))
    with backpack(BatchGrad(), BatchL2Grad(), DiagGGNExact()):
        lossfunc(model(X), y).backward()
    none = model.none
    assert none.grad_batch.shape == (5, 0, 4) and none.diag_ggn_exact.shape == (0, 4) and not none.batch_l2.any()
