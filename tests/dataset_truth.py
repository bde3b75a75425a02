"""Ground truth for data sets: one giant batch, by plain autograd in float64."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.func import functional_call, jacrev


def parameters_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def giant(model, lossfunc, X, y, divided, rows=None):
    """All quantities, from a loop over samples; ``divided``: what the mean over all samples divides by."""
    n = len(X)
    rows = list(range(n)) if rows is None else rows
    parameters = parameters_of(model)
    sums = copy.deepcopy(lossfunc)
    sums.reduction = "sum"
    individual = {name: [] for name in parameters}
    for k in range(n):
        loss = sums(model(X[k : k + 1]), y[k : k + 1]) / divided
        for name, grad in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            individual[name].append(grad)
    individual = {name: torch.stack(grads) for name, grads in individual.items()}
    everything = sums(model(X), y) / divided
    roots = {name: [] for name in parameters}  # of each sample [c, *p], with the Hessian's symmetric root
    for k in range(n):
        out = model(X[k : k + 1]).detach()
        hessian = torch.autograd.functional.hessian(lambda o: sums(o, y[k : k + 1]) / divided, out)  # noqa: B023
        values, vectors = torch.linalg.eigh(hessian.reshape(out.numel(), out.numel()))
        root = vectors * values.clamp(min=0).sqrt()
        jacobian = jacrev(lambda p: functional_call(model, p, (X[k : k + 1],)).flatten())(  # noqa: B023
            {name: p.detach() for name, p in parameters.items()}
        )
        for name in parameters:
            roots[name].append(torch.einsum("dc,d...->c...", root, jacobian[name]))
    roots = {name: torch.stack(found, 1) for name, found in roots.items()}
    return {
        "loss": everything.detach(),
        "grad": {name: g.sum(0) for name, g in individual.items()},
        "individual": {name: g[rows] for name, g in individual.items()},
        "roots": {name: v[:, rows] for name, v in roots.items()},
    }


def flat(tensor, axes):
    return tensor.flatten(0, axes - 1).flatten(1)


def problem(lossfunc=None, n=11):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    X = torch.randn(n, 4, dtype=torch.float64)
    y = torch.arange(n) % 3
    return model, lossfunc or nn.CrossEntropyLoss(), X, y
