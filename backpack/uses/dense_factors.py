"""Kronecker factors of the matrix of a linear map, from its inputs and cotangents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backpack.uses.linear_map import LinearMap
from backpack.uses.second_moments import diagonal_blocks, in_basis, moment_of_outputs, second_moment

if TYPE_CHECKING:
    from backpack.uses.dense_gradients import Dense


@dataclass(eq=False)
class DenseMap(LinearMap):
    """A linear map in ``g`` groups, with these gradients of its matrix.

    The factor that the groups divide is block-diagonal; the other one is the mean over them.
    """

    grads: Dense

    @property
    def inputs_first(self) -> bool:  # type: ignore[override]
        return self.grads.flipped

    def _ordered(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Numbers that belong to the outputs and to the inputs, in the order of the matrix."""
        return (inputs, outputs) if self.grads.flipped else (outputs, inputs)

    @property
    def matrix(self) -> tuple[int, int]:  # type: ignore[override]
        groups, outputs = self.grads.grad.shape[2], self.grads.grad.shape[4]
        outputs *= 1 if self.grads.groups_of_inputs else groups
        return self._ordered(outputs, self.grads.shape.numel() // outputs)

    @property
    def blocks(self) -> tuple[int, int]:  # type: ignore[override]
        groups = self.grads.grad.shape[2]
        return self._ordered(1, groups) if self.grads.groups_of_inputs else self._ordered(groups, 1)

    @property
    def ranks(self) -> tuple[int, int]:  # type: ignore[override]
        v, n, g, s, o = self.grads.grad.shape
        return self._ordered(v * n * g * s, n * g * s)

    def output_factor(self, approx: str | None) -> Tensor:
        g, s = self.grads.grad.shape[2:4]
        grad = self.grads.grad.flatten(0, 1)
        if approx == "expand" and s > 1:
            return self._output_factor(_moments(grad))
        if g == 1:
            return moment_of_outputs(self.grads, grad.shape[3], lambda: grad.sum((1, 2)) if s > 1 else grad[:, 0, 0])
        return self._output_factor(_moments(grad.sum(2, keepdim=True) if s > 1 else grad))

    def output_blocks(self, moment: Tensor) -> Tensor:
        groups = self.grads.grad.shape[2]
        return moment if groups == 1 else self._output_factor(diagonal_blocks(moment, groups))

    def _output_factor(self, moments: Tensor) -> Tensor:
        return _of_groups(moments, divided=not self.grads.groups_of_inputs)

    def input_factor(self, approx: str | None, scale: float = 1.0) -> Tensor:
        grads = self.grads
        n, s = grads.grad.shape[1], grads.grad.shape[3]
        scale /= n * s if approx == "expand" else n
        if approx is not None and grads.filled is not None:
            filled = grads.filled.clamp(min=0.5 / s)[:, None, None, None]
            reduced = approx == "reduce"
            moments = _moments(grads.x.mean(2, keepdim=True) / filled if reduced else grads.x / filled.sqrt(), scale)
        elif approx == "reduce" and s > 1:
            moments = _moments(grads.x.mean(2, keepdim=True), scale)
        elif grads.unfold is None or grads.moments is None:
            moments = _moments(grads.x, scale)
        else:
            moments = grads.moments(*grads.inputs, scale)
        return _of_groups(moments, divided=grads.groups_of_inputs)

    def rotated(self, rows: Tensor, columns: Tensor) -> Dense:
        grads, groups = self.grads, self.grads.grad.shape[2]
        outputs, inputs = (columns, rows) if grads.flipped else (rows, columns)
        if grads.groups_of_inputs:
            inputs = diagonal_blocks(inputs, groups)
        else:
            outputs = diagonal_blocks(outputs, groups)
        shape = torch.Size((rows.shape[1], columns.shape[1]))
        if grads.grad.shape[2:4] == (1, 1):
            grad = in_basis(grads, grads.grad[:, :, 0, 0], outputs)[:, :, None, None]
        else:
            grad = grads.grad @ outputs.conj()
        x = grads.x @ inputs.conj()
        return replace(grads, inputs=(x,), grad=grad, shape=shape, unfold=None, other=None)

    def ungrouped(self) -> DenseMap:
        """The groups as further positions, with cotangents that are zero in the outputs of other groups."""
        v, n, g, s, o = self.grads.grad.shape
        own = torch.eye(g, dtype=self.grads.grad.dtype, device=self.grads.grad.device)[:, None, :, None]
        grad = (self.grads.grad.unsqueeze(4) * own).reshape(v, n, 1, g * s, g * o)
        x = self.grads.x.reshape(n, 1, g * s, -1)
        return DenseMap(replace(self.grads, inputs=(x,), grad=grad, unfold=None))

    def transposed(self) -> DenseMap | None:
        grads = self.grads
        groups, outputs = grads.grad.shape[2], grads.grad.shape[4]
        lead, matrix = grads.shape[:-2], self._ordered(outputs, grads.shape.numel() // (groups * outputs))
        if lead.numel() != groups or grads.shape != (*lead, *matrix):
            return None
        return DenseMap(replace(grads, flipped=not grads.flipped, shape=torch.Size((*lead, *matrix[::-1]))))


def _of_groups(moments: Tensor, divided: bool) -> Tensor:
    """The factor of all groups, of the moments of each: block-diagonal if they divide it, else their mean."""
    if len(moments) == 1:
        return moments[0]
    return torch.block_diag(*moments) if divided else moments.mean(0)


def _moments(rows: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * sum_ns rows[n g s a] conj(rows[n g s b])``, ``[g, a, b]``."""
    if rows.shape[1] == 1:
        return second_moment(rows.reshape(-1, rows.shape[3]), scale)[None]
    return second_moment(rows.transpose(0, 1).flatten(1, 2), scale)
