"""The generalized Gauss-Newton matrix against explicit Jacobians and loss Hessians."""

import warnings

import pytest
import torch
from models.networks import LABELS, NETWORKS, Sequences, make, mlp, values
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint
from truths import close
from truths.second_order import explicit

from backpack import backpack, extend
from backpack.curvature.spliced_graph import SplicedGraph
from backpack.extensions import (
    HMP,
    KFLR,
    KFRA,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchGrad,
    DiagGGNExact,
    DiagGGNMC,
    GGNGram,
    SqrtGGNExact,
    SqrtGGNMC,
)


def check(model, X, lossfunc, y, n):
    diagonals, ggn = explicit(model, X, lossfunc, y, n)
    plain = torch.autograd.grad(lossfunc(model(X), y), list(model.parameters()))
    first, last = [0], [n - 1, 0]
    for parameter in model.parameters():
        parameter.grad = None
    loss = lossfunc(model(X), y)
    with backpack(
        DiagGGNExact(chunk_size=2),
        BatchDiagGGNExact(subsampling=last),
        SqrtGGNExact(chunk_size=2),
        GGNGram(),
        BatchGrad(first),
    ):
        loss.backward()
    roots = torch.cat([p.sqrt_ggn_exact.flatten(2) for p in model.parameters()], 2).flatten(0, 1)
    for parameter, grad, truth in zip(model.parameters(), plain, diagonals, strict=True):
        assert torch.equal(parameter.grad, grad)
        size = 1e-6 * ggn.abs().max()
        assert close(parameter.diag_ggn_exact, truth.sum(0), size, 1e-9)
        assert close(parameter.diag_ggn_exact_batch, truth[last], size, 1e-9)
    assert close(roots.T @ roots, ggn, rtol=1e-9)
    assert close(GGNGram.total(model.parameters()), roots @ roots.T, rtol=1e-9)
    loss = lossfunc(model(X), y)
    with backpack(DiagGGNExact(subsampling=first), BatchDiagGGNExact(), SqrtGGNExact(subsampling=last)):
        loss.backward()
    selected = torch.cat([p.sqrt_ggn_exact.flatten(2) for p in model.parameters()], 2)
    assert close(selected, roots.unflatten(0, (-1, n))[:, last], rtol=1e-9)
    for parameter, truth in zip(model.parameters(), diagonals, strict=True):
        assert close(parameter.diag_ggn_exact, truth[0], 1e-6 * ggn.abs().max(), 1e-9)
        assert close(parameter.diag_ggn_exact_batch, truth, 1e-6 * ggn.abs().max(), 1e-9)


@pytest.mark.parametrize("network", NETWORKS)
def test_ggn_of_networks_is_exact(network):
    check(*make(network, "bce" if network == "sigmoid_bce" else "cross_entropy"), n=4)


def test_ggn_of_a_loss_of_the_users_own_is_exact():
    check(*make("mlp", "custom"), n=4)


def test_roots_that_are_computed_in_pieces_have_memory_of_their_own():
    model, X, lossfunc, y = make("mlp", "cross_entropy")
    one, other = SqrtGGNExact(chunk_size=2), SqrtGGNExact(chunk_size=2)
    other.savefield = "other_root"
    with backpack(one, other, SqrtGGNMC()):
        lossfunc(model(X), y).backward()
    for parameter in model.parameters():
        assert torch.equal(parameter.sqrt_ggn_exact, parameter.other_root)
        assert len({getattr(parameter, name).data_ptr() for name in ("sqrt_ggn_exact", "other_root")}) == 2


@pytest.mark.parametrize("flat", [False, True])
def test_ggn_of_sequences_counts_whole_sequences_as_samples(flat):
    torch.manual_seed(0)
    index, target = torch.randint(0, 6, (3, 4)), torch.randint(0, 6, (3, 4))
    target[0, 1] = -100
    model, lossfunc = extend(Sequences(flat).double()), extend(nn.CrossEntropyLoss())
    check(model, index, lossfunc, target.flatten() if flat else target, n=3)


@pytest.mark.parametrize("loss", ["cross_entropy_options", "mse", "bce_logits", "poisson", "custom"])
def test_sampled_diagonals_average_to_the_exact_ones(loss):
    """Within five standard errors, estimated from independent draws, entry by entry."""
    model, X, lossfunc, y = make("mlp", loss)
    diagonals, _ = explicit(model, X, lossfunc, y, 4)
    draws = 1500
    with backpack(SqrtGGNMC(draws), DiagGGNMC(draws, subsampling=[2]), BatchDiagGGNMC(draws, chunk_size=400)):
        lossfunc(model(X), y).backward()
    for parameter, truth in zip(model.parameters(), diagonals, strict=True):
        each = parameter.sqrt_ggn_mc.square() * draws
        error = 5 * each.std(0) / draws**0.5 + 1e-12
        assert bool(((each.mean(0) - truth).abs() <= error).all())
        assert bool(((parameter.diag_ggn_mc_batch - truth).abs() <= 1.5 * error).all())
        assert bool(((parameter.diag_ggn_mc - truth[2]).abs() <= 1.5 * error[2]).all())


def test_dropout_masks_of_the_forward_pass_are_those_of_the_selected_samples():
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double().train())
    lossfunc, X = extend(nn.CrossEntropyLoss()), values(4, 4)
    state = torch.get_rng_state()
    with backpack(BatchDiagGGNExact()):
        lossfunc(model(X), LABELS).backward()
    whole = [p.diag_ggn_exact_batch[[3, 1]] for p in model.parameters()]
    torch.set_rng_state(state)
    with backpack(BatchDiagGGNExact(subsampling=[3, 1])):
        lossfunc(model(X), LABELS).backward()
    assert all(close(p.diag_ggn_exact_batch, w) for p, w in zip(model.parameters(), whole, strict=True))


def test_an_operator_without_batching_rule_is_looped_without_a_warning():
    model = extend(nn.Sequential(nn.Linear(4, 3), nn.Mish(), nn.Linear(3, 3)).double())
    check(model, values(4, 4), extend(nn.CrossEntropyLoss()), LABELS, 4)


def test_a_loss_that_couples_samples_is_refused():
    class Coupled(nn.Module):
        def forward(self, out, target):
            return (out.sum(0) - target.sum(0)).square().sum()

    model, lossfunc = extend(mlp().double()), extend(Coupled())
    with pytest.raises(ValueError, match="couples the samples"), backpack(DiagGGNExact()):
        lossfunc(model(values(4, 4)), values(4, 3)).backward()


@pytest.mark.parametrize(
    ("extension", "values"),
    [
        (DiagGGNExact, lambda p: [p.diag_ggn_exact]),
        (GGNGram, lambda p: [p.ggn_gram]),
        (KFLR, lambda p: p.kflr),
        (KFRA, lambda p: p.kfra),
        (BatchDiagHessian, lambda p: [p.diag_h_batch]),
        (HMP, lambda p: [p.hmp(torch.ones_like(p))]),
    ],
)
def test_curvature_comes_without_the_gradient_as_well(extension, values):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3), nn.Sigmoid(), nn.Conv1d(1, 2, 2), nn.Flatten()]
    model = extend(nn.Sequential(layers[0], layers[1], nn.Unflatten(1, (1, 3)), *layers[2:]).double())
    lossfunc = extend(nn.CrossEntropyLoss())
    X, y = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 3, 1])
    with backpack(extension()):
        lossfunc(model(X), y).backward(retain_graph=True)
    expected = [value for p in model.parameters() for value in values(p)]
    for p in model.parameters():
        vars(p).clear()
        p.grad = None
    output = model(X)
    with backpack(extension()):
        torch.autograd.grad(lossfunc(output, y), output, retain_graph=True)
    found = [value for p in model.parameters() for value in values(p)]
    assert all(p.grad is None for p in model.parameters())
    assert len(found) == len(expected) >= 4
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_results_are_differentiable():
    model, X, lossfunc, y = make("mlp", "cross_entropy")
    parameters = list(model.parameters())
    with backpack(DiagGGNExact()), warnings.catch_warnings():
        torch.autograd.grad(lossfunc(model(X), y), parameters, create_graph=True)
    found = torch.autograd.grad(sum(p.diag_ggn_exact.sum() for p in parameters), parameters)

    def trace(*weights):
        out = torch.func.functional_call(model, dict(zip(dict(model.named_parameters()), weights, strict=True)), X)
        p = out.softmax(1)
        root = torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)
        total = 0
        for column in root.unbind(2):
            for n in range(4):
                grads = torch.autograd.grad(out[n], weights, column[n] / 2, create_graph=True)
                total = total + sum(g.square().sum() for g in grads)
        return total

    truth = torch.autograd.grad(trace(*parameters), parameters)
    assert all(close(f, t, 1e-6) for f, t in zip(found, truth, strict=True))


class Twice(nn.Module):
    """What is pooled is used by something else as well."""

    def forward(self, x):
        return nn.functional.max_pool2d(x, 3, 1, 1) + x


class Recomputed(nn.Module):
    def forward(self, x):
        return checkpoint(lambda x: nn.functional.max_pool2d(x.relu(), 2), x, use_reentrant=False)


POOLINGS = {
    "disjoint": (1, 1, nn.ReLU(), nn.MaxPool2d(2)),
    "overlapping": (1, 1, nn.ReLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    "dilated": (1, 0, nn.Sigmoid(), nn.MaxPool2d(2, 1, dilation=2)),
    "one-dimensional": (1, 0, nn.ReLU(), nn.Flatten(2), nn.MaxPool1d(3, 2)),
    "one-dimensional, of a ReLU": (1, 1, nn.Flatten(2), nn.ReLU(), nn.MaxPool1d(3, 2)),
    "in a row": (2, 1, nn.ReLU(inplace=True), nn.MaxPool2d(3, 1), nn.MaxPool2d(2)),
    "of a convolution's output": (1, 0, nn.MaxPool2d(2)),
    "of a ReLU that is used twice": (1, 0, nn.ReLU(), Twice()),
    "checkpointed": (0, 0, Recomputed()),
}


@pytest.mark.parametrize("name", POOLINGS)
def test_seeds_go_through_max_pooling_by_turns(name, monkeypatch):
    monkeypatch.setattr("backpack.curvature.nodes_without_vmap.SMALL", 0)
    torch.manual_seed(0)
    expected, rectified, *layers = POOLINGS[name]
    model = extend(nn.Sequential(nn.Conv2d(2, 3, 3), *layers, nn.Flatten(), nn.LazyLinear(4)).double())
    lossfunc, X, y = extend(nn.CrossEntropyLoss()), torch.randn(3, 2, 8, 8).double(), torch.tensor([0, 3, 1])
    model(X)
    diagonals, _ = explicit(model, X, lossfunc, y, 3)
    out = model(X)
    found = SplicedGraph([get_gradient_edge(out)]).poolings
    assert len(found) == expected
    assert len([pooling for pooling in found if pooling.below]) == rectified
    with backpack(BatchDiagGGNExact()):
        lossfunc(out, y).backward()
    for parameter, truth in zip(model.parameters(), diagonals, strict=True):
        assert close(parameter.diag_ggn_exact_batch, truth)
