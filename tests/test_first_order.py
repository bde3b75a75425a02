"""Individual gradients and what is made of them, against a loop over samples."""

import pytest
import torch
from models.layers import CASES, build
from truths import close
from truths.first_order import check_first_order, subsets

from backpack import backpack, extend
from backpack.extensions import Variance


@pytest.mark.parametrize("name", CASES)
def test_quantities_of_all_samples_follow_from_individual_gradients(name):
    check_first_order(build(name), lambda k: "all", scale=1.0)


@pytest.mark.parametrize("name", CASES)
def test_each_extension_selects_its_own_samples(name):
    keys = list(subsets(3))[1:]
    check_first_order(build(name), lambda k: keys[(k + sum(map(ord, name))) % len(keys)], scale=0.25)


@pytest.mark.parametrize("name", CASES)
def test_the_same_without_the_gradient(name):
    keys = list(subsets(3))
    check_first_order(build(name), lambda k: keys[(k + len(name)) % len(keys)], scale=0.5, alone=True)


def test_individual_gradients_are_differentiable():
    torch.manual_seed(0)
    model = extend(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double())
    X = torch.randn(5, 3, dtype=torch.float64)
    parameters = list(model.parameters())
    with backpack(Variance()):
        grads = torch.autograd.grad(model(X).square().sum(), parameters, create_graph=True)
    found = torch.autograd.grad(sum(p.variance.sum() for p in parameters), parameters)
    samples = [torch.autograd.grad(model(x[None]).square().sum(), parameters, create_graph=True) for x in X]
    stacked = [torch.stack(g) for g in zip(*samples, strict=True)]
    truth = torch.autograd.grad(sum((g.square().mean(0) - g.mean(0).square()).sum() for g in stacked), parameters)
    assert all(close(f, t) for f, t in zip(found, truth, strict=True))
    assert all(close(g, s.sum(0)) for g, s in zip(grads, stacked, strict=True))
