"""Results of each extension against individual gradients, Gauss-Newton matrices and Hessians by plain autograd."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn
from truths import second_order
from truths.autograd import individual_gradients
from truths.options import CASES
from truths.second_order import flat

RTOL = 1e-8
"""Of the largest true entry of a parameter's result."""

ZERO = 1e-3
"""Where that is smaller than this part of the largest of all parameters, terms cancelled: it is compared with this."""

SMALLEST = 1e-7
"""At which results are compared that are zero but for rounding: those of terms of about one, that cancel."""

ENTRIES = 4
"""How many entries of each parameter's Hessian diagonal are compared."""


def squares(tensor):
    return tensor.abs().square()


class Truth(second_order.Truth):
    """And some entries of Hessians."""

    @cached_property
    def entries(self):
        """Of each real parameter: entries, and the diagonal of each sample's Hessian there, ``[n, entries]``."""
        places = {name: torch.randperm(p.numel())[:ENTRIES] for name, p in self.parameters.items()}
        return {name: (chosen, self.entries_of_the_hessian(name, chosen)) for name, chosen in places.items()}

    @cached_property
    def system(self):
        """The whole GGN of each sample, ``[n, P, P]``, and the sample's gradient, ``[n, P]``, for all parameters."""
        grads = torch.cat([flat(g, 1) for g in self.grads.values()], 1)
        whole = grads.new_zeros(self.n, grads.shape[1], grads.shape[1])
        for z, owner, H in zip(self.inputs, map(torch.flatten, self.owners), self.loss_hessians, strict=True):
            if z.requires_grad:
                J = torch.cat([flat(J, 1) for J in individual_gradients(z.flatten(), self.leaves)], 1)
                for n, own in enumerate([owner == n for n in range(self.n)]):
                    whole[n] += J[own].T @ H[own][:, own] @ J[own]
        return whole, grads

    def step(self, name, rows, damping):
        """That of a parameter; all have one."""
        key = (tuple(rows.tolist()), damping)
        if key not in self.steps:
            ggn, grad = (own[rows].sum(0) for own in self.system)
            step = -torch.linalg.solve(ggn + damping * torch.eye(len(grad), dtype=grad.dtype), grad)
            sizes = [flat(p).numel() for p in self.parameters.values()]
            self.steps[key] = dict(zip(self.parameters, step.split(sizes), strict=True))
        return self.steps[key][name]

    @cached_property
    def steps(self):
        return {}

    @cached_property
    def transposed(self):
        return {f"{name}.weight" for name, m in self.model.named_modules() if isinstance(m, nn.ConvTranspose2d)}

    def block(self, name, rows, count):
        """The GGN of some samples, in the order of ``count`` factors: of a transposed convolution, outputs first."""
        p, whole = self.parameters[name], self.ggn[name][rows].sum(0)
        if name not in self.transposed or count == 1:
            return whole
        order = torch.arange(p.numel()).reshape(p.shape).transpose(0, 1).flatten()
        return whole[order][:, order]


OF_OPTIONS = {name.replace(" ", "_"): case for name, case in CASES.items()}
"""By the field that a case's results are stored in."""


class Comparison:
    """Results of one extension, parameter by parameter."""

    def __init__(self, what):
        self.what, self.rows = what, []

    def add(self, name, found, true, size=0.0):
        """``size``: of terms that may cancel in the truth."""
        found, true = found.detach(), true.detach()
        assert found.shape == true.shape, (self.what, name, list(found.shape), list(true.shape))
        assert found.dtype == true.dtype, (self.what, name, found.dtype, true.dtype)
        if true.numel() and true.isfinite().all():  # PyTorch has no second derivative of ``angle`` at zero
            assert found.isfinite().all(), (self.what, name, "not finite")
            own = max(float(true.abs().max()), float(size))
            self.rows.append((name, float((found - true).abs().max()), own))

    def finish(self):
        most = max((own for _, _, own in self.rows), default=0.0)
        for name, error, own in self.rows:
            scale = max(own, ZERO * most, SMALLEST)
            assert error <= RTOL * scale, f"{self.what} of {name} is off by {error:.1e} of {own:.1e} (all: {most:.1e})"


def compare(extension, rows, truth, results, reached):
    """``results``: by name of the parameter; ``reached``: those that have a gradient."""
    field = extension.savefield
    comparison = Comparison(f"{type(extension).__name__}({extension.get_subsampling()})")
    for name, p in truth.parameters.items():
        if name in results and field in OF_OPTIONS:
            case, own = OF_OPTIONS[field], truth.grads[name][rows]
            true = case.true(truth.grads, extension.get_subsampling(), rows.tolist())
            comparison.add(name, results[name], true(name, own), own.abs().max() ** case.degree)
        elif name in results:
            VALUES[field](comparison, truth, name, p, rows, results[name], extension)
        else:
            assert name not in reached or not truth.grads[name].any(), f"{field} of {name} is missing"
    comparison.finish()


def value(f):
    """A check of results ``f(individual gradients)``."""
    return lambda c, truth, name, p, rows, found, ext: c.add(name, found, f(truth.grads[name][rows]))


def variance(c, truth, name, p, rows, found, ext):
    own = truth.grads[name][rows]
    c.add(name, found, squares(own - own.mean(0)).mean(0), squares(own).max())


def clipped(c, truth, name, p, rows, found, ext):
    norms = sum(squares(g[rows]).flatten(1).sum(1) for g in truth.grads.values()).sqrt()
    own = truth.grads[name][rows]
    factor = (ext.max_norm / norms).clamp(max=1).to(own.dtype)
    c.add(name, found, torch.einsum("n,n...->...", factor, own), own.abs().max())


def root(c, truth, name, p, rows, found, ext):
    columns = flat(found, 2)
    assert found.shape[1:] == (len(rows), *p.shape)
    c.add(name, torch.einsum("cnp,cnq->npq", columns, columns), truth.ggn[name][rows])


def gram(c, truth, name, p, rows, found, ext):
    """By its eigenvalues, which are those of the matrix, and zeros."""
    values = [torch.linalg.eigvalsh(m).flip(0) for m in (found, truth.ggn[name][rows].sum(0))]
    most = max(map(len, values))
    c.add(name, *(torch.cat([own, own.new_zeros(most - len(own))]) for own in values))


def factors(c, truth, name, p, rows, found, ext):
    """A single one is the block."""
    if len(found) == 1 and not p.is_complex():
        c.add(name, found[0], truth.block(name, rows, 1))


def eigenvalues(c, truth, name, p, rows, found, ext):
    """Of the block, along the bases."""
    if not p.is_complex() and all(basis.dim() == 2 for basis in found.bases):
        basis = found.bases[0].contiguous()
        for other in found.bases[1:]:
            basis = torch.kron(basis, other.contiguous())
        block = truth.block(name, rows, len(found.bases))
        c.add(name, found.eigenvalues.flatten(), (basis.T @ block @ basis).diagonal(), block.abs().max())


def diagonal(c, truth, name, p, rows, found, ext):
    entries, true = truth.entries[name]
    c.add(name, found.flatten()[entries], true[rows].sum(0), true.abs().max())


def diagonals(c, truth, name, p, rows, found, ext):
    entries, true = truth.entries[name]
    c.add(name, found.flatten(1)[:, entries], true[rows], true.abs().max())


def step(c, truth, name, p, rows, found, ext):
    true = truth.step(name, rows, ext.damping)
    c.add(name, flat(found).flatten(), true, truth.grads[name][rows].abs().max() / ext.damping)


def hessian_product(c, truth, name, p, rows, found, ext):
    vector = torch.randn_like(p)
    own = truth.hessian_times(name, vector)
    c.add(name, found(vector), own[rows].sum(0), own.abs().max())


def ggn_product(c, truth, name, p, rows, found, ext):
    vectors = torch.randn(2, *p.shape, dtype=p.dtype)
    product = flat(vectors, 1) @ truth.ggn[name][rows].sum(0)
    c.add(name, flat(found(vectors), 1), product)


VALUES = {
    "grad_batch": value(lambda g: g),
    "batch_l2": value(lambda g: squares(g).flatten(1).sum(1)),
    "batch_dot": value(lambda g: flat(g, 1) @ flat(g, 1).T),
    "sum_grad_squared": value(lambda g: squares(g).sum(0)),
    "variance": variance,
    "grad_clipped": clipped,
    "diag_ggn_exact": lambda c, t, name, p, rows, found, ext: c.add(name, found, t.diag_ggn[name][rows].sum(0)),
    "diag_ggn_exact_batch": lambda c, t, name, p, rows, found, ext: c.add(name, found, t.diag_ggn[name][rows]),
    "sqrt_ggn_exact": root,
    "ggn_gram": gram,
    "ggnmp": ggn_product,
    "gauss_newton_step": step,
    "kflr": factors,
    "ekfac": eigenvalues,
    "diag_h": diagonal,
    "diag_h_batch": diagonals,
    "hmp": hessian_product,
}
