"""``z[n s o] = W[o i] x[n s i]``, in ``g`` independent groups: linear maps and, unfolded, convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backpack.memory import product
from backpack.samples import Rows
from backpack.uses.base import SCRATCH, Individual, Use, accumulate


@dataclass(eq=False)
class Dense(Individual):
    """Individual gradients ``sum_s grad[v n g s o] x[n g s i]``.

    ``x`` is ``[n, g, s, i]``, ``grad`` is ``[v, n, g, s, o]``; ``flipped`` says that the parameter's matrix is
    ``[g, i, o]`` instead of ``[g, o, i]``.
    """

    x: Tensor
    grad: Tensor
    shape: torch.Size
    flipped: bool = False

    @property
    def size(self) -> tuple[int, int]:
        return self.grad.shape[0], self.grad.shape[1]

    def narrow(self, start: int, stop: int) -> Dense:
        return replace(self, x=self.x[start:stop], grad=self.grad[:, start:stop])

    def scaled(self, factor: Tensor) -> Dense:
        return replace(self, grad=self.grad * factor[:, None, None, None])

    def _dense(self) -> Tensor:
        v, n, g, s, o = self.grad.shape
        i = self.x.shape[3]
        matrix = (n, g, i, o) if self.flipped else (n, g, o, i)
        if s == 1:
            left, right = self.grad[..., 0, :], self.x[:, :, 0]
            left, right = (right, left) if self.flipped else (left, right)
            result = product(torch.mul, left[..., None], right[..., None, :], (v, *matrix))
        elif v == 1 and self.flipped:
            result = product(torch.matmul, self.x.transpose(2, 3), self.grad[0], matrix)
        elif v == 1:
            result = product(torch.matmul, self.grad[0].transpose(2, 3), self.x, matrix)
        else:
            result = self._matrices().unflatten(2, (v, o)).permute(2, 0, 1, 3, 4)
            result = result.transpose(3, 4) if self.flipped else result
        return result.reshape(v, n, *self.shape)

    def _matrices(self) -> Tensor:
        """All seeds in one product per sample and group, ``[n, g, v o, i]``."""
        v, n, g, s, o = self.grad.shape
        left = self.grad[0] if v == 1 else self.grad.permute(1, 2, 3, 0, 4).reshape(n, g, s, v * o)
        return left.transpose(2, 3) @ self.x

    def _to_parameter(self, matrix: Tensor) -> Tensor:
        """``[..., g, o, i]`` to ``[..., *p]``."""
        matrix = matrix.transpose(-1, -2) if self.flipped else matrix
        return matrix.reshape(*matrix.shape[:-3], *self.shape)

    def closed(self, name: str) -> Tensor | None:
        v, n, g, s, o = self.grad.shape
        i = self.x.shape[3]
        if name == "norms" and s > 1 and s * (v * o + i) < v * o * i:
            return self.sample_dots(self)
        if s > 1:
            return None
        if name == "norms":
            return (self.grad.square().sum((3, 4)) * self.x.square().sum((2, 3))).sum(2)
        x, grad = self.x, self.grad
        if name == "total":
            grad = grad.sum(0)
        else:
            x, grad = x.square(), grad.square().sum(0)
        if name == "sample_squares":
            return self._to_parameter(grad.transpose(2, 3) @ x)
        return self._to_parameter(grad[:, :, 0].permute(1, 2, 0) @ x[:, :, 0].transpose(0, 1))

    def _sweep(self, names: list[str]) -> dict[str, Tensor]:
        if "dense" in self._known:
            return super()._sweep(names)
        v, o = self.grad.shape[0], self.grad.shape[4]
        collected: dict[str, list[Tensor]] = {name: [] for name in names}
        for piece in self.chunks():
            matrices = piece._matrices()  # type: ignore[attr-defined]
            if "total" in collected:
                accumulate(collected["total"], matrices.sum(0))
            if names != ["total"]:
                matrices = matrices.square() if torch.is_grad_enabled() else matrices.square_()
            if "sum_squares" in collected:
                accumulate(collected["sum_squares"], matrices.sum(0))
            if "sample_squares" in collected:
                collected["sample_squares"].append(matrices.unflatten(2, (v, o)).sum(2))
            if "norms" in collected:
                collected["norms"].append(matrices.unflatten(2, (v, o)).sum((1, 3, 4)))
        found = {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in collected.items()}
        for name in names:
            if name in ("total", "sum_squares"):
                found[name] = found[name].unflatten(1, (v, o)).sum(1)
            found[name] = found[name].T if name == "norms" else self._to_parameter(found[name])
        return found

    def sample_dots(self, other: Individual) -> Tensor:
        if not isinstance(other, Dense) or self.flipped != other.flipped:
            return super().sample_dots(other)
        step = max(1, SCRATCH // (self.x.shape[1] * self.x.shape[2] * other.x.shape[2] * (1 + self.size[0])))
        pieces = []
        for start in range(0, self.size[1], step):
            a, b = self.narrow(start, start + step), other.narrow(start, start + step)
            inputs = a.x @ b.x.transpose(2, 3)
            outputs = a.grad @ b.grad.transpose(3, 4)
            pieces.append((outputs * inputs).sum((2, 3, 4)))
        return torch.cat(pieces, 1)

    def dots(self, other: Individual) -> Tensor:
        if not isinstance(other, Dense) or self.flipped != other.flipped:
            return super().dots(other)
        v, n, g, s, o = self.grad.shape
        w, m, _, t, _ = other.grad.shape
        if s == t == 1:
            inputs = torch.einsum("ngi,mgi->nmg", self.x[:, :, 0], other.x[:, :, 0])
            outputs = torch.einsum("vngo,wmgo->vnwmg", self.grad[..., 0, :], other.grad[..., 0, :])
            return (outputs * inputs[None, :, None]).sum(4)
        i = self.x.shape[3]
        if n * m * s * t * (v * w * o + i) < (v * n + w * m) * s * o * i:
            inputs = torch.einsum("ngsi,mgti->nmgst", self.x, other.x)
            outputs = torch.einsum("vngso,wmgto->vwnmgst", self.grad, other.grad)
            return (outputs * inputs).sum((4, 5, 6)).permute(0, 2, 1, 3)
        step = max(1, SCRATCH // max(1, (v * n + w * m) * g * i))
        terms: list[Tensor] = []
        for start in range(0, o, step):  # a few rows of all samples' matrices at a time
            left = self._rows(start, start + step)
            right = left if other is self else other._rows(start, start + step)
            accumulate(terms, left @ right.T)
        return terms[0].reshape(n, v, m, w).permute(1, 0, 3, 2)

    def _rows(self, start: int, stop: int) -> Tensor:
        """Rows of all samples' and seeds' matrices, ``[n v, ...]``."""
        part = replace(self, grad=self.grad[..., start:stop])
        matrices = part._matrices().unflatten(2, (self.grad.shape[0], -1))
        return matrices.transpose(1, 2).reshape(self.grad.shape[0] * self.grad.shape[1], -1)


@dataclass(eq=False)
class DenseUse(Use):
    """A linear map of what ``unfold`` makes of the recorded ``inputs``.

    ``unfold`` takes the inputs as ``[n, ...]`` to ``[n, g, s, i]``, ``fold`` a cotangent ``[v, n, ...]`` to
    ``[v, n, g, s, o]``.
    """

    inputs: tuple[Tensor, ...]
    unfold: Callable[..., Tensor]
    fold: Callable[[Tensor], Tensor]
    flipped: bool = False

    def recorded(self) -> tuple[Tensor, ...]:
        return self.inputs

    def bind(self, grad: Tensor, rows: Rows, shape: torch.Size) -> Dense:
        x = self.unfold(*(rows.take(tensor).to(grad.dtype) for tensor in self.inputs))
        return Dense(x, self.fold(grad), shape, self.flipped)
