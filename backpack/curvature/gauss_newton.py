"""Damped Gauss-Newton steps, solved for in the space of the columns of the loss Hessian's root.

With ``S`` this root, ``J`` the Jacobian of the losses' inputs, and ``V = J^T S``, the GGN is ``V V^T``. The gradient
``u`` in the losses' inputs is ``S r`` and a ``rest``, which is zero wherever the Hessian is regular, so that

    (V V^T + d I)^-1 J^T u = J^T (S (V^T V + d I)^-1 (r - V^T J^T rest / d) + rest / d).

``V^T V`` and ``V^T J^T rest`` are read off the individual gradients of the columns of ``S`` and of ``rest``, which is
one column more. No second derivative of the model is needed.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from backpack.backward.arrivals import Contributions
from backpack.curvature.loss_term import PASSES, Term
from backpack.curvature.seeds import SeedPass
from backpack.graph import variable_of
from backpack.graph.users_hooks import undisturbed
from backpack.modules.thread_state import muted
from backpack.samples import Subset

ROUNDING = 8.0
"""How many roundings of the gradient in a loss's input, a random walk over its entries, its ``rest`` may consist of."""


class Divided:
    """The gradient ``u`` of a loss in its input, ``[n, d]``, as ``S r + rest``, in ``float64``.

    ``columns`` are those of ``S``, ``[v, n, d]``; ``r`` is ``[n, v]``.
    """

    def __init__(self, columns: Tensor, u: Tensor) -> None:
        self.columns, root = columns, columns.double().permute(1, 2, 0)
        if bool(root.isfinite().all() & u.isfinite().all()):
            self._divide(root, u.double(), torch.finfo(u.dtype).eps)
        else:  # steps are not a number, as the gradient is
            self.r, self.rest = u.new_full(root.shape[::2], torch.nan).double(), torch.zeros_like(u).double()
        self.has_rest = bool(self.rest.any())

    def _divide(self, root: Tensor, u: Tensor, eps: float) -> None:
        left, values, right = torch.linalg.svd(root, full_matrices=False)
        # Smaller ones are known to no digit: what belongs to these directions is left for the rest.
        kept = values > max(1, *root.shape[1:]) * eps * values[:, :1]
        inner = torch.where(kept, (left.mT @ u.unsqueeze(2)).squeeze(2) / values.where(kept, 1), 0)
        self.r = (right.mT @ inner.unsqueeze(2)).squeeze(2)
        rest = u - (root @ self.r.unsqueeze(2)).squeeze(2)
        rounding = ROUNDING * eps * u.shape[1] ** 0.5 * u.norm(dim=1, keepdim=True)
        self.rest = rest.where(rest.norm(dim=1, keepdim=True) > rounding, 0)


class StepPass(SeedPass):
    """Computes the system from all columns, solves it for each damping, and pulls each solution back.

    ``gram``: the sum over parameters of the dot products of what was pulled back, ``[v, r, v, r]`` in ``float64``.
    """

    gram: Tensor | None = None

    def run(self) -> None:
        """Store the steps.

        Raises:
            RuntimeError: Results would have to be differentiable, or an extension has rules of users.
        """
        self.refuse_rules()
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{self._name}: its steps cannot be differentiated, as create_graph=True asks for. Leave it out."
            )
        given = self.subset.rows(self.n, self.device)
        if given is not None and self._select(given):
            self.subset = Subset()
        chosen = torch.arange(self.n, device=self.device) if given is None else given
        try:
            self._together_or_not(lambda: self._pull_all(given))
            if self.gram is not None:
                self._store_steps(chosen)
        finally:
            self._clear()

    def _pull_all(self, rows: Tensor | None) -> None:
        self.gram = None  # of an attempt that failed
        super()._pull_all(rows)

    @cached_property
    def divided(self) -> list[Divided]:
        """The gradient in the input of each loss."""
        return [Divided(term.root.exact(0, term.root.columns), term.wide_grad()) for term in self.terms]

    @cached_property
    def counts(self) -> list[int]:
        return [len(own.columns) + own.has_rest for own in self.divided]

    def _columns_of(self, term: Term, start: int, stop: int) -> Tensor:
        own = self.divided[self.terms.index(term)]
        rest = own.rest[None].to(own.columns.dtype) if own.has_rest else own.columns[:0]
        return torch.cat([own.columns, rest])[start:stop]

    def compute(self, contributions: Contributions) -> None:
        """Add the dot products of a parameter's gradients."""
        grads = contributions.individual(self.subset)
        dots = grads.dots(grads)
        self.gram = dots.to(torch.float64, copy=True) if self.gram is None else self.gram.add_(dots)

    def _store_steps(self, chosen: Tensor) -> None:
        parameters = [variable_of(leaf) for leaf in self.prepared.plan.expected]
        for extension in self.extensions:
            cotangents = self._solved(chosen, extension.damping)
            with muted(), undisturbed(parameters):
                found = self.spliced.grad(self.spliced.starts, parameters, cotangents)
            for parameter, grad in zip(parameters, found, strict=True):
                if grad is not None:
                    self.block.store(parameter, extension.savefield, grad.to_dense().neg())
        for parameter in parameters if self.last else ():
            self.finished.add(id(parameter))
            self.block.owners_done(parameter, self.finished)

    def _solved(self, chosen: Tensor, damping: float) -> list[Tensor]:
        """The cotangents at the losses' inputs whose pull-back is the step, but for its sign."""
        assert self.gram is not None
        is_rest = [
            k == len(own.columns) for own, count in zip(self.divided, self.counts, strict=True) for k in range(count)
        ]
        rest = torch.tensor(is_rest, dtype=torch.bool, device=self.device)
        gram = self.gram[: self.columns, :, : self.columns]  # without columns, a zero was pulled back
        system = gram[~rest][:, :, ~rest]
        size = system.shape[:2]
        right = torch.cat([own.r.T for own in self.divided])[:, chosen]
        right = right - gram[~rest][:, :, rest].sum((2, 3)) / damping
        coefficients = _damped_solve(system.flatten(2).flatten(0, 1), right.flatten(), damping).reshape(size)
        cotangents, begin = [], 0
        for term, own in zip(self.terms, self.divided, strict=True):
            end = begin + len(own.columns)
            columns = own.columns[:, chosen].double()
            seed = torch.einsum("vn,vnd->nd", coefficients[begin:end], columns) + own.rest[chosen] / damping
            whole = seed.new_zeros(own.rest.shape)
            # A sample that was selected twice is twice in a graph of the selected samples alone.
            whole = whole.index_copy(0, chosen, seed) if self.selected else whole.index_add(0, chosen, seed)
            cotangents.append(term.placed(whole[None], chosen if self.selected else None, self.selected)[0])
            begin = end
        return cotangents


def _damped_solve(matrix: Tensor, right: Tensor, damping: float) -> Tensor:
    """Solve with a positive semidefinite matrix, ``damping`` added to its diagonal."""
    if not bool(matrix.isfinite().all()):
        return torch.full_like(right, torch.nan)
    damped = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    root, info = torch.linalg.cholesky_ex(damped)
    if not bool(info):
        return torch.cholesky_solve(right[:, None], root)[:, 0]
    values, basis = torch.linalg.eigh(matrix)  # negative ones are rounding
    solution: Tensor = basis @ ((basis.mT @ right) / (values.clamp(min=0) + damping))
    return solution


PASSES["step"] = StepPass
