"""What a layer costs does not depend on how many there are: no recursion, and no work for each pair of layers.

Work is counted as calls of Python functions and as operations of PyTorch, which every machine does alike.
"""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from models.small import L, rand
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from backpack import accumulate, backpack, extend, summary, verify
from backpack.extensions import (
    EKFAC,
    GGNMP,
    HBP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagGGNExact,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    GGNGram,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

FEW, MANY = 25, 100
X, Y = rand(4, 3), torch.tensor([0, 2, 1, 1])


class Residual(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.layer, self.activation = L(3, 3), activation()

    def forward(self, x):
        return x + 0.1 * self.activation(self.layer(x))


def chain(depth, activation=nn.ReLU):
    return nn.Sequential(*[part for _ in range(depth) for part in (L(3, 3), activation())], L(3, 3))


def residual(depth, activation=nn.ReLU):
    return nn.Sequential(*[Residual(activation) for _ in range(depth)], L(3, 3))


MODELS = {"chain": chain, "residual": residual, "curved chain": partial(chain, activation=nn.Tanh)}


def step(*extensions, products=False):
    """A function of a model that runs one step."""

    def run(model):
        extend(model)
        loss = extend(nn.CrossEntropyLoss())(model(X), Y)
        with backpack(*extensions):
            loss.backward(retain_graph=products)
        for parameter in model.parameters():
            assert all(hasattr(parameter, extension.savefield) for extension in extensions)

    return run


WORK = {
    "first order": step(BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), BatchDotGrad()),
    "ClippedGrad": step(ClippedGrad(0.1)),
    **{type(own).__name__: step(own) for own in (DiagGGNExact(), DiagGGNMC(), BatchDiagGGNExact(), SqrtGGNExact())},
    **{type(own).__name__: step(own) for own in (GGNGram(), KFAC(), KFLR(), EKFAC(), KFRA())},
    **{type(own).__name__: step(own, products=True) for own in (HMP(), GGNMP(), PCHMP())},
    "HBP": step(HBP("ggn", "sum", "average", "E[J^T E(H) J]")),
    "DiagHessian": step(DiagHessian()),
    "summary": lambda model: summary(model, X),
    "verify": lambda model: verify(model, nn.CrossEntropyLoss(), X, Y, BatchGrad(), BatchL2Grad(), DiagGGNExact()),
    "accumulate": lambda model: accumulate(model, nn.CrossEntropyLoss(), [(X, Y)] * 2, BatchGrad(), KFAC()),
}


CASES = [(model, name) for model in ("chain", "residual") for name in WORK]
CASES.append(("curved chain", "PCHMP"))
"""Models and what is done with them. Columns of the Hessian's diagonal grow with the number of curved functions."""


class Operations(TorchDispatchMode):
    """Counts operations of PyTorch."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def work(function, *args):
    """How many functions of Python a call calls, and how many operations of PyTorch."""
    calls = 0

    def notice(frame, event, _):
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(notice)
    try:
        with Operations() as mode:
            function(*args)
    finally:
        sys.setprofile(before)
    return calls, mode.count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model, name", CASES)
def test_a_layer_takes_as_much_in_deep_networks(model, name):
    work(WORK[name], MODELS[model](2))  # what is done once in a process is not counted
    for few, many in zip(*(work(WORK[name], MODELS[model](depth)) for depth in (FEW, MANY)), strict=True):
        assert 0 < many / MANY < 1.05 * few / FEW


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model, name", CASES)
def test_a_thousand_layers_need_no_recursion(model, name):
    network = MODELS[model](1000)
    assert sys.getrecursionlimit() // 2 < 1000  # a function that calls itself for each layer would fail
    WORK[name](network)


def test_work_for_each_pair_of_layers_is_noticed():
    def pairs(model):
        for one in model:
            for _ in model:
                one.extra_repr()

    (few, _), (many, _) = (work(pairs, chain(depth)) for depth in (FEW, MANY))
    assert many / MANY > 1.05 * few / FEW
