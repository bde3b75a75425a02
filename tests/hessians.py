"""The explicit Hessian by plain autograd, sample by sample."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def block(gradient, parameter):
    """Of one parameter, ``[P, P]``, from the gradient with its graph."""
    rows = []
    for entry in gradient.flatten():
        found = None
        if entry.requires_grad:
            (found,) = torch.autograd.grad(entry, parameter, retain_graph=True, allow_unused=True)
        rows.append((torch.zeros_like(parameter) if found is None else found).flatten())
    return torch.stack(rows)


def blocks(model, loss):
    """Of each parameter, for a function that computes the loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        value = loss()
    grads = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    return [
        torch.zeros(p.numel(), p.numel(), dtype=p.dtype) if g is None else block(g, p)
        for g, p in zip(grads, parameters, strict=True)
    ]


def sample_diagonals(model, X, lossfunc, y):
    """For a loss that averages over samples: per parameter the samples' Hessian diagonals, ``[n, *p]``."""
    rows = []
    for n in range(len(X)):
        found = blocks(model, lambda n=n: lossfunc(model(X[n : n + 1]), y[n : n + 1]) / len(X))
        rows.append([h.diagonal() for h in found])
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [torch.stack(d).reshape(-1, *p.shape) for d, p in zip(zip(*rows, strict=True), parameters, strict=True)]


def sample_entries(losses, parameters, most=4):
    """Of each parameter a few entries of the diagonal of the Hessian of each loss, and where: ``[n, k]``, ``[k]``.

    ``losses``: a function for each sample that computes its term of the loss.
    """
    places = [torch.randperm(p.numel())[:most] for p in parameters]
    found = [[] for _ in parameters]
    for loss in losses:
        with sdpa_kernel(SDPBackend.MATH):
            value = loss()
        grads = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
        for p, g, where, rows in zip(parameters, grads, places, found, strict=True):
            rows.append(torch.zeros(len(where), dtype=p.dtype))
            for k, place in enumerate(where):
                if g is not None and g.requires_grad:
                    entry = g.flatten()[place]
                    (second,) = torch.autograd.grad(entry, p, retain_graph=True, allow_unused=True)
                    if second is not None:
                        rows[-1][k] = second.flatten()[place]
    return [torch.stack(rows) for rows in found], places
