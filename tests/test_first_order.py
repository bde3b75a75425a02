"""Individual gradients and what is made of them, against a loop over samples."""

import numpy as np
import pytest
import torch
from cases import CASES, build
from truth import OF_GRADIENTS, Problem, close, individual_gradients, plain_gradients

from backpack import backpack, extend, extensions
from backpack.extensions import ClippedGrad, Variance


def subsets(n: int) -> dict[str, tuple[object, list[int]]]:
    """How users write subsets, and the rows they mean."""
    everything = list(range(n))
    return {
        "all": (None, everything),
        "last": ([-1], [n - 1]),
        "reversed": (slice(None, None, -1), everything[::-1]),
        "duplicates": ([0, n - 1, 0], [0, n - 1, 0]),
        "mask": (torch.tensor([i % 2 == 0 for i in everything]), everything[::2]),
        "array": (np.array(everything[::-1]), everything[::-1]),
        "range": (range(0, n, 2), everything[::2]),
    }


def laws(problem: Problem, choose, scale: float, alone: bool = False) -> None:
    """Each quantity, each with its own subset, in one backward pass; ``alone``: that leaves out the gradient."""
    truth = individual_gradients(problem, scale)
    plain = plain_gradients(problem, scale)
    bound = 0.7 * float(torch.stack([t.flatten(1).square().sum(1) for t in truth.values()]).sum(0).sqrt().mean())
    names = [choose(k) for k in range(len(OF_GRADIENTS) + 1)]
    *chosen, (clipped, own) = [subsets(problem.n)[name] for name in names]
    computed = [getattr(extensions, ext)(subsampling=w) for ext, (w, _) in zip(OF_GRADIENTS, chosen, strict=True)]
    extend(problem.model)
    out = problem.output()
    loss = problem.value(out, scale)
    with backpack(*computed, ClippedGrad(bound, subsampling=clipped)):
        if alone:
            torch.autograd.grad(loss, out)
        else:
            loss.backward()
    norms = torch.stack([t[own].flatten(1).square().sum(1) for t in truth.values()]).sum(0).sqrt()
    floor = 1e-5 * max(t.abs().max() for t in truth.values())
    for name, parameter in problem.parameters().items():
        if name not in truth:
            assert parameter.grad is None and not hasattr(parameter, "grad_batch"), name
            continue
        if alone:
            assert parameter.grad is None, name
        else:
            assert torch.equal(parameter.grad.to_dense(), plain[name].to_dense()), name
        largest = max(truth[name].abs().max(), floor)  # some gradients are zero but for rounding
        for ext, (_, rows), (degree, true) in zip(computed, chosen, OF_GRADIENTS.values(), strict=True):
            found = getattr(parameter, ext.savefield)
            assert close(found, true(truth[name][rows]), largest**degree), (name, ext.savefield, names)
        true = torch.einsum("n,n...->...", (bound / norms).clamp(max=1), truth[name][own])
        assert close(parameter.grad_clipped, true, largest), (name, names)


@pytest.mark.parametrize("name", CASES)
def test_quantities_of_all_samples_follow_from_individual_gradients(name):
    laws(build(name), lambda k: "all", scale=1.0)


@pytest.mark.parametrize("name", CASES)
def test_each_extension_selects_its_own_samples(name):
    keys = list(subsets(3))[1:]
    laws(build(name), lambda k: keys[(k + sum(map(ord, name))) % len(keys)], scale=0.25)


@pytest.mark.parametrize("name", CASES)
def test_the_same_without_the_gradient(name):
    keys = list(subsets(3))
    laws(build(name), lambda k: keys[(k + len(name)) % len(keys)], scale=0.5, alone=True)


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
