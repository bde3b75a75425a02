"""What ``fuzz.py`` compares with: individual gradients, Gauss-Newton matrices and Hessians by plain autograd.

Samples are masks at the inputs of the losses. A complex parameter is two real ones, side by side.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

RTOL = 1e-8
"""Of the largest true entry of a parameter's result."""

ZERO = 1e-4
"""Where that is smaller than this part of the largest of all parameters, terms cancelled: it is compared with this."""

ENTRIES = 4
"""How many entries of each parameter's Hessian diagonal are compared."""


def flat(tensor, lead=0):
    """``[*lead, real entries]``."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.flatten(lead)


def squares(tensor):
    return tensor.abs().square()


def by_entries(tensor, p):
    """``[..., real entries]`` as ``[..., *p]``, where both parts of a complex entry add up."""
    if p.is_complex():
        tensor = tensor.unflatten(-1, (-1, 2)).sum(-1)
    return tensor.unflatten(-1, p.shape or (1,)).reshape(*tensor.shape[:-1], *p.shape)


class Truth:
    """Of losses ``values[k](inputs[k])``; the rows of each input belong to ``owners[k]``, -1 for none."""

    def __init__(self, model, inputs, owners, values, n):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.transposed = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.ConvTranspose2d)}
        self.leaves = list(self.parameters.values())
        self.inputs, self.owners, self.values, self.n = inputs, owners, values, n
        self.points = [z.detach() for z in inputs]
        self.cotangents = []
        for z, value in zip(self.points, values, strict=True):
            z = z.requires_grad_(True)
            self.cotangents.append(torch.autograd.grad(value(z), z)[0])

    def _pull(self, inputs, cotangents, **options):
        """Gradients of all parameters, zeros where there are none."""
        pairs = [(z, g) for z, g in zip(inputs, cotangents, strict=True) if z.requires_grad]
        if not pairs:
            return [torch.zeros_like(p) for p in self.leaves]
        options = {"retain_graph": True, "allow_unused": True, **options}
        found = torch.autograd.grad([z for z, _ in pairs], self.leaves, [g for _, g in pairs], **options)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, self.leaves, strict=True)]

    @cached_property
    def grads(self):
        """``[n, *p]`` of each parameter."""
        rows = []
        for k in range(self.n):
            own = [g * (owner == k) for g, owner in zip(self.cotangents, self.owners, strict=True)]
            rows.append(self._pull(self.inputs, own))
        return self._by_name(rows)

    def _by_name(self, rows):
        return {name: torch.stack(own) for name, own in zip(self.parameters, zip(*rows, strict=True), strict=True)}

    @cached_property
    def ggn(self):
        """``[n, P, P]`` of each parameter."""
        found = dict.fromkeys(self.parameters, 0.0)
        for z, owner, value in zip(self.inputs, self.owners, self.values, strict=True):
            H = hessian(value, z.detach()).reshape(z.numel(), -1)
            owner = owner.flatten()
            assert not H[owner[:, None] != owner].any(), "the loss couples samples"
            units = torch.eye(z.numel(), dtype=z.dtype).reshape(-1, *z.shape)
            for name, J in self._by_name([self._pull([z], [unit]) for unit in units]).items():
                J = flat(J, 1)
                own = [owner == k for k in range(self.n)]
                found[name] = found[name] + torch.stack([J[k].T @ H[k][:, k] @ J[k] for k in own])
        return found

    def block(self, name, rows, count):
        """The GGN of some samples, in the order of ``count`` factors: of a transposed convolution, outputs first."""
        p, whole = self.parameters[name], self.ggn[name][rows].sum(0)
        if name not in self.transposed or count == 1:
            return whole
        order = torch.arange(p.numel()).reshape(p.shape).transpose(0, 1).flatten()
        return whole[order][:, order]

    def diagonals(self, name):
        """Of the GGN, ``[n, *p]``."""
        return by_entries(self.ggn[name].diagonal(dim1=1, dim2=2), self.parameters[name])

    @cached_property
    def terms(self):
        """Gradients of each sample's term of the loss, with their graphs: no other sample's inputs of losses vary."""
        found = []
        for k in range(self.n):
            own = [torch.where(o == k, z, z.detach()) for z, o in zip(self.inputs, self.owners, strict=True)]
            values = [value(z) for z, value in zip(own, self.values, strict=True) if z.requires_grad]
            ones = [torch.ones_like(value) for value in values]
            found.append(self._pull(values, ones, create_graph=True))
        return found

    def _second(self, grad, p, vector):
        found = None
        if grad.requires_grad:
            (found,) = torch.autograd.grad(grad, p, vector, retain_graph=True, allow_unused=True)
        return torch.zeros_like(p) if found is None else found

    def product(self, name, vector):
        """Of each sample's Hessian with a vector, ``[n, *p]``."""
        place = list(self.parameters).index(name)
        p = self.leaves[place]
        return torch.stack([self._second(term[place], p, vector) for term in self.terms])

    @cached_property
    def hessian_diagonals(self):
        """Of each real parameter: entries, and the diagonal of each sample's Hessian there, ``[n, entries]``."""
        found = {}
        for place, (name, p) in enumerate(self.parameters.items()):
            chosen = torch.randperm(p.numel())[:ENTRIES]
            rows = torch.zeros(self.n, len(chosen), dtype=p.dtype)
            for k, term in enumerate(self.terms):
                for column, entry in enumerate(chosen):
                    rows[k, column] = self._second(term[place].flatten()[entry], p, None).flatten()[entry]
            found[name] = chosen, rows
        return found


def twice_differentiable():
    """The other kernels of attention have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


class Comparison:
    """Results of one extension, parameter by parameter."""

    def __init__(self, what):
        self.what, self.rows = what, []

    def add(self, name, found, true, size=0.0):
        """``size``: of terms that may cancel in the truth."""
        found, true = found.detach(), true.detach()
        assert found.shape == true.shape, (self.what, name, list(found.shape), list(true.shape))
        assert found.dtype == true.dtype, (self.what, name, found.dtype, true.dtype)
        if true.numel():
            assert found.isfinite().all(), (self.what, name, "not finite")
            own = max(float(true.abs().max()), float(size))
            self.rows.append((name, float((found - true).abs().max()), own))

    def finish(self):
        most = max((own for _, _, own in self.rows), default=0.0)
        for name, error, own in self.rows:
            scale = max(own, ZERO * most)
            assert error <= RTOL * scale, f"{self.what} of {name} is off by {error:.1e} of {own:.1e} (all: {most:.1e})"


def compare(extension, rows, truth, results, reached):
    """``results``: by name of the parameter; ``reached``: those that have a gradient."""
    field = extension.savefield
    comparison = Comparison(f"{type(extension).__name__}({extension.get_subsampling()})")
    for name, p in truth.parameters.items():
        if name in results:
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
    entries, true = truth.hessian_diagonals[name]
    c.add(name, found.flatten()[entries], true[rows].sum(0), true.abs().max())


def diagonals(c, truth, name, p, rows, found, ext):
    entries, true = truth.hessian_diagonals[name]
    c.add(name, found.flatten(1)[:, entries], true[rows], true.abs().max())


def hessian_product(c, truth, name, p, rows, found, ext):
    vector = torch.randn_like(p)
    own = truth.product(name, vector)
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
    "diag_ggn_exact": lambda c, t, name, p, rows, found, ext: c.add(name, found, t.diagonals(name)[rows].sum(0)),
    "diag_ggn_exact_batch": lambda c, t, name, p, rows, found, ext: c.add(name, found, t.diagonals(name)[rows]),
    "sqrt_ggn_exact": root,
    "ggn_gram": gram,
    "ggnmp": ggn_product,
    "kflr": factors,
    "ekfac": eigenvalues,
    "diag_h": diagonal,
    "diag_h_batch": diagonals,
    "hmp": hessian_product,
}
