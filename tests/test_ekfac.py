"""Second moments in the eigenbasis of Kronecker factors, against the exact block in that basis."""

import pytest
import torch
from models.networks import LABELS, NETWORKS, make, values
from test_kronecker_factors import LINEAR, Rest, Words, block
from torch import nn
from truths import close
from truths.second_order import explicit

from backpack import backpack, extend
from backpack.extensions import EKFAC, KFLR
from backpack.utils.kroneckers import kfacs_to_mat


def check(parameter, G):
    """``G``: the exact block, in the order of the factors."""
    bases, eigenvalues = parameter.ekfac
    for basis, factor in zip(bases, parameter.kflr, strict=True):
        if factor.dim() == 1:
            assert torch.equal(basis, torch.ones_like(factor))
            continue
        assert close(basis.T @ basis, torch.eye(len(factor), dtype=factor.dtype))
        diagonal = basis.T @ factor @ basis
        assert close(diagonal, torch.diag(diagonal.diagonal()), factor.abs().max(), 1e-9)
    U = kfacs_to_mat(bases)
    assert close(eigenvalues.flatten(), (U.T @ G @ U).diagonal(), 1e-9, 1e-9)
    assert eigenvalues.shape == tuple(len(factor) for factor in parameter.kflr)
    distance = (parameter.ekfac.dense() - G).norm()
    assert distance <= (kfacs_to_mat(parameter.kflr) - G).norm() * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("approx", [None, "expand", "reduce"])
@pytest.mark.parametrize("name", LINEAR)
def test_eigenvalues_are_the_curvature_along_the_basis_and_no_diagonal_is_nearer(name, approx):
    make_layer, shape, _ = LINEAR[name]
    layer, X = make_layer().double(), torch.randn(shape, dtype=torch.float64)
    model, lossfunc = nn.Sequential(layer, Rest(layer(X)[0].numel()).double()), nn.CrossEntropyLoss()
    _, ggn = explicit(model, X, lossfunc, LABELS, 4)
    extend(model)
    with backpack(EKFAC(fisher="exact", approx=approx), KFLR(approx=approx)):
        extend(lossfunc)(model(X), LABELS).backward()
    parameters = list(model.parameters())
    G = block(ggn, parameters, layer.weight)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        order = torch.arange(layer.weight.numel()).reshape(layer.weight.shape).transpose(0, 1).flatten()
        G = G[order][:, order]
    check(layer.weight, G)
    check(layer.bias, block(ggn, parameters, layer.bias))


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied", "lstm", "gru"])
def test_of_networks(name):
    model, X, lossfunc, y = make(name, "cross_entropy")
    _, ggn = explicit(model, X, lossfunc, y, 4)
    with backpack(EKFAC(fisher="exact"), KFLR()):
        lossfunc(model(X), y).backward()
    parameters = list(model.parameters())
    for parameter in parameters:
        check(parameter, block(ggn, parameters, parameter))
    assert name in NETWORKS


def test_of_layers_that_are_wider_than_the_batch_is_large():
    model = nn.Sequential(nn.Linear(40, 5), nn.Tanh(), nn.Linear(5, 48), nn.Tanh(), nn.Linear(48, 3)).double()
    X, y, lossfunc = torch.randn(2, 40, dtype=torch.float64), LABELS[:2], nn.CrossEntropyLoss()
    _, ggn = explicit(model, X, lossfunc, y, 2)
    extend(model)
    with backpack(EKFAC(fisher="exact"), KFLR()):
        extend(lossfunc)(model(X), y).backward()
    parameters = list(model.parameters())
    for parameter in parameters:
        check(parameter, block(ggn, parameters, parameter))


class SomeChannels(nn.Module):
    """A grouped convolution with some rows of a parameter."""

    def __init__(self, start, stop):
        super().__init__()
        self.start, self.stop = start, stop
        self.weight = nn.Parameter(torch.randn(8, 2, 3))

    def forward(self, x):
        return torch.conv1d(x, self.weight[self.start : self.stop], groups=2).flatten(1).tanh()


@pytest.mark.parametrize("rows", [(0, 4), (2, 6), (0, 8)])
def test_of_grouped_convolutions_with_some_rows_of_a_parameter(rows):
    model, lossfunc = nn.Sequential(SomeChannels(*rows), nn.LazyLinear(3)).double(), nn.CrossEntropyLoss()
    X = torch.randn(len(LABELS), 4, 5, dtype=torch.float64)
    model(X)
    _, ggn = explicit(model, X, lossfunc, LABELS, len(LABELS))
    extend(model)
    with backpack(EKFAC(fisher="exact"), KFLR()):
        extend(lossfunc)(model(X), LABELS).backward()
    check(model[0].weight, block(ggn, list(model.parameters()), model[0].weight))


@pytest.mark.parametrize("tied", [None, "linear", "matmul"])
def test_of_embeddings(tied):
    model, index = Words(tied).double(), torch.tensor([[0, 1, 2, 4], [2, 0, 0, 1], [4, 4, 1, 3]])
    y, lossfunc = values(3, 5 if tied else 3), nn.MSELoss()
    _, ggn = explicit(model, index, lossfunc, y, 3)
    extend(model)
    with backpack(EKFAC(fisher="exact"), KFLR()):
        extend(lossfunc)(model(index), y).backward()
    check(model.words.weight, ggn)


def test_seeds_that_are_looped_are_gathered():
    model, lossfunc, X = nn.Sequential(nn.Linear(4, 3), nn.Mish(), nn.Linear(3, 3)).double(), nn.MSELoss(), values(4, 4)
    y = values(4, 3)
    _, ggn = explicit(model, X, lossfunc, y, 4)
    extend(model)
    with backpack(EKFAC(fisher="exact"), KFLR()):
        extend(lossfunc)(model(X), y).backward()
    check(model[0].weight, block(ggn, list(model.parameters()), model[0].weight))


def test_empirical_eigenvalues_are_second_moments_of_gradients():
    model, X, lossfunc, y = make("mlp", "cross_entropy")
    rows = [
        torch.autograd.grad(nn.CrossEntropyLoss()(model(x[None]), t[None]), model[0].weight)[0]
        for x, t in zip(X, y, strict=True)
    ]
    with backpack(EKFAC(fisher="empirical", subsampling=[2, 0])):
        lossfunc(model(X), y).backward()
    (left, right), eigenvalues = model[0].weight.ekfac
    truth = sum((left.T @ rows[n] @ right).square() for n in (2, 0)) / 4
    assert close(eigenvalues, truth, rtol=1e-9)
