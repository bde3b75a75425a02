"""Ground truth for data sets: one giant batch, by plain autograd in float64."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
from torch import nn

from backpack import extensions
from backpack.curvature.losses.base import Diagonal
from backpack.extensions import (
    EKFAC,
    HBP,
    KFAC,
    KFLR,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    GGNGram,
    SqrtGGNExact,
    SqrtGGNMC,
)

from . import close
from .autograd import individual_gradients, loss_hessian
from .first_order import OF_GRADIENTS, clipped, norms_of
from .second_order import hessian_blocks


def parameters_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def giant(model, lossfunc, X, y, divided, rows=None):
    """All quantities, from a loop over samples; ``divided``: what the mean over all samples divides by."""
    n = len(X)
    rows = list(range(n)) if rows is None else rows
    parameters = parameters_of(model)
    sums = copy.deepcopy(lossfunc)
    sums.reduction = "sum"
    terms = [sums(model(X[k : k + 1]), y[k : k + 1]) / divided for k in range(n)]
    individual = dict(zip(parameters, individual_gradients(terms, parameters.values()), strict=True))
    everything = sums(model(X), y) / divided
    roots = {name: [] for name in parameters}  # of each sample [c, *p], with the Hessian's symmetric root
    for k in range(n):
        out = model(X[k : k + 1])
        values, vectors = torch.linalg.eigh(loss_hessian(lambda o: sums(o, y[k : k + 1]) / divided, out))  # noqa: B023
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        for name, J in zip(parameters, individual_gradients(out.flatten(), parameters.values()), strict=True):
            roots[name].append(torch.einsum("dc,d...->c...", root, J))
    roots = {name: torch.stack(found, 1) for name, found in roots.items()}
    inputs = {"0": X[rows], "2": model[:2](X[rows]).detach()}
    return {
        "inputs": inputs,
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


WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def all_extensions(bound, rows=None):
    return [
        *(getattr(extensions, name)(rows) for name in OF_GRADIENTS),
        ClippedGrad(bound, rows),
        DiagGGNExact(rows),
        BatchDiagGGNExact(rows),
        SqrtGGNExact(rows),
        GGNGram(rows),
        KFLR(rows),
    ]


SIGNS = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)


@contextmanager
def fixed_draws():
    """Of losses whose entries do not interact: these signs in the place of random ones."""
    before = Diagonal.sampled
    Diagonal.sampled = lambda self: SIGNS * self.scale
    try:
        yield
    finally:
        Diagonal.sampled = before


def other_extensions(rows=None, whole=True):
    """Those that ``all_extensions`` leaves out, sampled ones with ``fixed_draws``; ``whole``: of unsharded models."""
    empirical = KFAC(fisher="empirical", subsampling=rows), EKFAC(fisher="empirical", subsampling=rows)
    empirical[0].savefield, empirical[1].savefield = "kfac_empirical", "ekfac_empirical"
    exact = EKFAC(fisher="exact", subsampling=rows)
    exact.savefield = "ekfac_exact"
    return [
        DiagGGNMC(3, rows),
        BatchDiagGGNMC(3, rows),
        SqrtGGNMC(3, rows),
        KFAC(3, rows),
        HBP("ggn", "sampling", "sqrt", "E[J^T E(H) J]", subsampling=rows),
        *empirical,
        exact,
        EKFAC(3, rows),
        *([DiagHessian(rows), BatchDiagHessian(rows)] if whole else []),
    ]


def check_others(found, truth, model, divided):
    """All extensions of ``other_extensions``, for a loss that divides by ``divided``."""
    for name, parameter in parameters_of(model).items():
        v = torch.einsum("c,cn...->n...", SIGNS, truth["roots"][name])
        assert close(found["diag_ggn_mc"][name], v.square().sum(0)), name
        assert close(found["diag_ggn_mc_batch"][name], v.square()), name
        assert close(found["sqrt_ggn_mc"][name], v[None].expand(3, *v.shape) / 3**0.5), name
        layer = name.split(".")[0]
        x = truth["inputs"][layer]
        signed = torch.einsum("c,cn...->n...", SIGNS, truth["roots"][layer + ".bias"])
        grads = truth["individual"][layer + ".bias"] * divided**0.5  # each term enters with the weight 1 / divided
        exact, a = truth["roots"][layer + ".bias"].flatten(0, 1), x.T @ x / len(x)
        for field, b in {"kfac": signed, "hbp": signed, "kfac_empirical": grads}.items():
            expected = [b.T @ b, a][: parameter.dim()]
            for factor, expected_factor in zip(found[field][name], expected, strict=True):
                assert close(factor, expected_factor), (field, name)
        check_eigen(found["ekfac"][name], [signed.T @ signed, a][: parameter.dim()], v)
        check_eigen(
            found["ekfac_exact"][name], [exact.T @ exact, a][: parameter.dim()], truth["roots"][name].flatten(0, 1)
        )
        own = truth["individual"][name] * divided**0.5
        check_eigen(found["ekfac_empirical"][name], [grads.T @ grads, a][: parameter.dim()], own)


def check_eigen(eigen, factors, columns):
    """Eigenbases of these factors, and the sums of squares of the columns ``[v, *p]`` in them."""
    for place, (basis, factor) in enumerate(zip(eigen.bases, factors, strict=True), start=1):
        assert close(basis.T @ basis, torch.eye(len(factor), dtype=factor.dtype))
        turned = basis.T @ factor @ basis
        assert close(turned, torch.diag(turned.diagonal()), factor.abs().max())
        columns = torch.tensordot(columns, basis, ([1], [0]))  # the next axis comes first, this one last
        assert place < len(factors) or close(eigen.eigenvalues, columns.square().sum(0))


def check_hessians(found, diagonals):
    """Against those of ``hessian_diagonals``."""
    for name, h in diagonals.items():
        assert close(found["diag_h_batch"][name], h, h.abs().max()), name
        assert close(found["diag_h"][name], h.sum(0), h.abs().max()), name


def hessian_diagonals(model, lossfunc, X, y, divided, rows=None):
    """Of each sample's term of the loss, ``[n, *p]``."""
    sums, parameters, found = copy.deepcopy(lossfunc), parameters_of(model), []
    sums.reduction = "sum"
    for k in range(len(X)) if rows is None else [k % len(X) for k in rows]:
        blocks = hessian_blocks(model, lambda k=k: sums(model(X[k : k + 1]), y[k : k + 1]) / divided)
        found.append([H.diagonal().reshape(p.shape) for H, p in zip(blocks, parameters.values(), strict=True)])
    return {name: torch.stack(own) for name, own in zip(parameters, zip(*found, strict=True), strict=True)}


def bound_of(truth):
    return 0.7 * float(norms_of(truth["individual"]).mean())


def check(found, truth, bound, model):
    """All extensions of ``all_extensions``, against individual gradients and roots of one giant batch."""
    assert close(found.loss, truth["loss"])
    of_clipped = clipped(truth["individual"], bound)
    for name, parameter in parameters_of(model).items():
        g, v = truth["individual"][name], truth["roots"][name]
        assert close(found.grad[name], truth["grad"][name], g.abs().max())
        assert parameter.grad is None
        expected = {
            "grad_clipped": of_clipped[name],
            "diag_ggn_exact": v.square().sum((0, 1)),
            "diag_ggn_exact_batch": v.square().sum(0),
        }
        for field, value in expected.items():
            assert close(found[field][name], value, g.abs().max() if field == "grad_clipped" else 0), (name, field)
            assert getattr(parameter, field) is found[field][name]
        for extension, (degree, true) in OF_GRADIENTS.items():
            result = found[getattr(extensions, extension).savefield][name]
            assert close(result, true(g), g.abs().max() ** degree), (name, extension)
        s = found["sqrt_ggn_exact"][name]
        # Roots of one matrix differ by a rotation of each sample's columns, which a sample's own products do not see.
        for k in range(s.shape[1]):
            assert close(s[:, k].flatten(1).T @ s[:, k].flatten(1), v[:, k].flatten(1).T @ v[:, k].flatten(1), 1e-3)
        assert close(found["ggn_gram"][name], flat(s, 2) @ flat(s, 2).T)
        layer = name.split(".")[0]
        x, b = truth["inputs"][layer], truth["roots"][layer + ".bias"].flatten(0, 1)
        factors = [b.T @ b, x.T @ x / len(x)][: parameter.dim()]
        for factor, expected_factor in zip(found["kflr"][name], factors, strict=True):
            assert close(factor, expected_factor), name


def targets(kind, n=11):
    if kind == "mse":
        return torch.randn(n, 3, dtype=torch.float64)
    if kind == "bce":
        return torch.rand(n, 3, dtype=torch.float64).round()
    y = torch.arange(n) % 3
    if kind == "ignored":
        y[4:8] = -100  # a whole batch
        y[1] = -100
    return y


LOSSES = {
    "mean": (nn.CrossEntropyLoss(), lambda y: len(y)),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), lambda y: 1),
    "weighted": (nn.CrossEntropyLoss(weight=WEIGHT), lambda y: float(WEIGHT[y].sum())),
    "ignored": (
        nn.CrossEntropyLoss(weight=WEIGHT),
        lambda y: float(sum(WEIGHT[label] for label in y.tolist() if label != -100)),
    ),
    "mse": (nn.MSELoss(), lambda y: y.numel()),
    "bce": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), lambda y: y.numel()),
}
