"""Kronecker factors and their eigendecomposition on every kind of layer, against plain autograd by samples."""

import pytest
import torch
from models.kronecker import Rest, Words
from models.layers import CASES, build
from models.networks import LABELS, make, values
from models.small import differentiate
from torch import nn
from truths import close
from truths.kronecker import LAYERS, Truth, check

from backpack import backpack, extend
from backpack.extensions import EKFAC, KFAC, KFLR

ONE_TENSOR = [name for name in CASES if name not in ("keywords_and_names", "bag_weighted", "lstm_root_sequence_first")]
SLOW = [name for name in ONE_TENSOR if "3d" in name]


LINEAR = {  # layer, shape of the inputs
    "linear": (lambda: nn.Linear(3, 2), (4, 3)),
    "sequence": (lambda: nn.Linear(3, 2), (4, 3, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2, stride=2, padding=1), (4, 2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 2, dilation=2, padding=1), (4, 2, 3, 4)),
    "conv1d_overlapping": (lambda: nn.Conv1d(2, 3, 4, dilation=2, padding=5), (4, 2, 3)),
    "conv2d_same": (lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), (4, 2, 3, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1), padding=1), (4, 2, 1, 3, 3)),
    "grouped": (lambda: nn.Conv2d(4, 6, 2, groups=2), (4, 4, 3, 2)),
    "depthwise": (lambda: nn.Conv1d(3, 6, 2, groups=3), (4, 3, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (4, 2, 3)),
    "transposed2d": (lambda: nn.ConvTranspose2d(2, 3, (2, 3), stride=(3, 2), dilation=2, padding=1), (4, 2, 2, 2)),
    "transposed_grouped": (lambda: nn.ConvTranspose1d(4, 6, 2, groups=2), (4, 4, 3)),
}


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


def check_all(model, X, lossfunc, y, approx=None, chosen=None):
    """Of all parameters, the factors of a layer's weight included, for all samples or the ``chosen`` ones."""
    truth = Truth(model, X, lossfunc, y, range(len(X)) if chosen is None else chosen, approx)
    options = {"approx": approx, "subsampling": chosen}
    differentiate(model, lossfunc, X, y, KFLR(chunk_size=1, **options), EKFAC(fisher="exact", **options))
    for path, parameter in model.named_parameters():
        check(path, parameter, truth, parameter.kflr, parameter.ekfac, close, rtol=1e-9)
        assert parameter.ekfac.eigenvalues.shape == tuple(map(len, parameter.kflr))
    return truth


@pytest.mark.parametrize("approx", [None, "expand", "reduce"])
@pytest.mark.parametrize("name", LINEAR)
def test_factors_and_eigenvalues_of_a_linear_map_are_their_definitions(name, approx):
    make_layer, shape = LINEAR[name]
    layer, X = make_layer().double(), torch.randn(shape, dtype=torch.float64)
    model = nn.Sequential(layer, Rest(layer(X)[0].numel()).double())
    for chosen in (None, [3, 1]):
        truth = check_all(model, X, nn.CrossEntropyLoss(), LABELS, approx, chosen)
        assert "0.weight" in truth.factors and not truth.unknown


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied", "lstm", "gru"])
def test_factors_and_eigenvalues_in_networks_are_their_definitions(name):
    model, X, lossfunc, y = make(name, "cross_entropy")
    check_all(model, X, lossfunc, y)


def test_layers_may_be_wider_than_the_batch_is_large():
    model = nn.Sequential(nn.Linear(40, 5), nn.Tanh(), nn.Linear(5, 48), nn.Tanh(), nn.Linear(48, 3)).double()
    check_all(model, torch.randn(2, 40, dtype=torch.float64), nn.CrossEntropyLoss(), LABELS[:2])


class SomeChannels(nn.Module):
    """A grouped convolution with some rows of a parameter."""

    def __init__(self, start, stop):
        super().__init__()
        self.start, self.stop = start, stop
        self.weight = nn.Parameter(torch.randn(8, 2, 3))

    def forward(self, x):
        return torch.conv1d(x, self.weight[self.start : self.stop], groups=2).flatten(1).tanh()


@pytest.mark.parametrize("rows", [(0, 4), (2, 6), (0, 8)])
def test_grouped_convolutions_may_use_some_rows_of_a_parameter(rows):
    model = nn.Sequential(SomeChannels(*rows), nn.LazyLinear(3)).double()
    X = torch.randn(len(LABELS), 4, 5, dtype=torch.float64)
    model(X)
    check_all(model, X, nn.CrossEntropyLoss(), LABELS)


@pytest.mark.parametrize("tied", [None, "linear", "matmul"])
def test_eigenvalues_of_tied_embeddings_are_those_of_the_block(tied):
    index = torch.tensor([[0, 1, 2, 4], [2, 0, 0, 1], [4, 4, 1, 3]])
    check_all(Words(tied).double(), index, nn.MSELoss(), values(3, 5 if tied else 3))


def test_columns_that_are_pulled_back_one_by_one_are_gathered():
    model = nn.Sequential(nn.Linear(4, 3), nn.Mish(), nn.Linear(3, 3)).double()
    check_all(model, values(4, 4), nn.MSELoss(), values(4, 3))


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
    differentiate(model, nn.CrossEntropyLoss(), X, y, KFLR(), EKFAC(fisher="exact"))
    for name, parameter in model.layer.named_parameters():
        check(f"0.{name}", parameter, truth, parameter.kflr, parameter.ekfac, close)


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
