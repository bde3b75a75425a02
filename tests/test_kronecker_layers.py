"""Kronecker factors and their eigendecomposition on every kind of layer, against plain autograd by samples."""

import pytest
import torch
from models.layers import CASES, build
from torch import nn
from truths import close
from truths.kronecker import LAYERS, Truth, check

from backpack import backpack, extend
from backpack.extensions import EKFAC, KFAC, KFLR

ONE_TENSOR = [name for name in CASES if name not in ("keywords_and_names", "bag_weighted", "lstm_root_sequence_first")]
SLOW = [name for name in ONE_TENSOR if "3d" in name]


class Head(nn.Module):
    """A few numbers, none of which depends on one output only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        out = self.model(x)
        out = out if isinstance(out, torch.Tensor) else out[0]
        flat = out.flatten(1)
        mix = torch.arange(3 * flat.shape[1], dtype=flat.dtype).sin().reshape(3, -1)
        return (flat @ mix.T / flat.shape[1] ** 0.5).tanh()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in ONE_TENSOR])
def test_factors_and_eigenvalues_are_those_of_plain_autograd(name):
    problem = build(name)
    approx = [None, "expand", "reduce"][ONE_TENSOR.index(name) % 3]
    model, X = Head(problem.model), problem.inputs[0]
    y = torch.arange(len(X)) % 3
    chosen = [len(X) - 1, 0]
    truth = Truth(model, X, nn.CrossEntropyLoss(), y, chosen, approx)
    if type(problem.model) in LAYERS:
        assert truth.factors and not truth.unknown
    extend(model)
    exact = KFAC(fisher="exact", approx=approx, subsampling=chosen)
    with backpack(exact, EKFAC(fisher="exact", approx=approx, subsampling=chosen)):
        extend(nn.CrossEntropyLoss())(model(X), y).backward()
    for path, parameter in model.named_parameters():
        if parameter.grad is not None:
            check(path, parameter, truth, parameter.kfac, parameter.ekfac, close)


@pytest.mark.parametrize("name", [name for name in ONE_TENSOR if name not in SLOW])
def test_a_batch_of_one_sample_has_factors_of_the_same_shapes(name):
    problem = build(name)
    model, X = Head(problem.model), problem.inputs[0]
    if X.is_floating_point() and X.dim() > 2:
        size, dims = X.shape[1], X.dim() - 2
        conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"InstanceNorm{dims}d")
        model = nn.Sequential(conv(size, size, 1), norm(size, affine=True), model).double()
    extend(model)
    shapes = []
    for n in (len(X), 1):
        with backpack(KFLR()):
            extend(nn.MSELoss())(model(X[:n]), torch.ones(n, 3, dtype=torch.float64)).backward()
        shapes.append({path: [f.shape for f in p.kflr] for path, p in model.named_parameters() if p.grad is not None})
    assert shapes[0] == shapes[1]


def test_a_bag_is_an_embedding_whose_rows_are_added():
    index, y = torch.tensor([[0, 1, 2, 2], [4, 0, 0, 1], [4, 4, 1, 3]]), torch.tensor([1, 0, 2])

    class Added(nn.Module):
        def __init__(self, bag):
            super().__init__()
            self.words = nn.EmbeddingBag(5, 3, mode="sum") if bag else nn.Embedding(5, 3)
            self.bag = bag

        def forward(self, index):
            return (self.words(index) if self.bag else self.words(index).sum(1)).tanh()

    bag, model = Added(True).double(), Added(False).double()
    model.load_state_dict(bag.state_dict())
    truth = Truth(model, index, nn.CrossEntropyLoss(), y, [0, 1, 2])
    extend(bag)
    with backpack(KFLR(), EKFAC(fisher="exact")):
        extend(nn.CrossEntropyLoss())(bag(index), y).backward()
    check("words.weight", bag.words.weight, truth, bag.words.weight.kflr, bag.words.weight.ekfac, close)


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(3, 2, 4)

    def forward(self, x):
        return self.layer(x, x[:, :2].sin()).tanh()


def test_factors_of_a_bilinear_map_are_those_of_a_linear_map_of_products():
    model, X, y = Pairs().double(), torch.randn(5, 3).double(), torch.tensor([1, 0, 2, 3, 1])
    products = (X[:, :, None] * X[:, None, :2].sin()).flatten(1)
    linear = nn.Sequential(nn.Linear(6, 4), nn.Tanh()).double()
    with torch.no_grad():
        linear[0].weight.copy_(model.layer.weight.flatten(1))
        linear[0].bias.copy_(model.layer.bias)
    truth = Truth(linear, products, nn.CrossEntropyLoss(), y, range(5))
    extend(model)
    with backpack(KFLR(), EKFAC(fisher="exact")):
        extend(nn.CrossEntropyLoss())(model(X), y).backward()
    for name, parameter in model.layer.named_parameters():
        check(f"0.{name}", parameter, truth, parameter.kflr, parameter.ekfac, close)
