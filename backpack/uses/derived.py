"""A parameter behind a tensor that is computed from parameters alone: a parametrization, a sum of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from backpack.uses.base import Individual
from backpack.uses.linear_map import LinearMap
from backpack.uses.lookup import Lookup
from backpack.uses.pullback import map_samples


@dataclass(eq=False)
class Derived(Individual):
    """Individual gradients of ``parameter``, pulled through the graph of ``tensor`` from those of ``tensor``."""

    inner: Individual
    tensor: Tensor
    parameter: Tensor

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.parameter.shape

    @property
    def size(self) -> tuple[int, int]:
        return self.inner.size

    def narrow(self, start: int, stop: int) -> Derived:
        return replace(self, inner=self.inner.narrow(start, stop))

    def scaled(self, factor: Tensor) -> Derived:
        return replace(self, inner=self.inner.scaled(factor))

    def _dense(self) -> Tensor:
        create = torch.is_grad_enabled()

        def pull(cotangent: Tensor) -> Tensor:
            found = torch.autograd.grad(self.tensor, self.parameter, cotangent, retain_graph=True, create_graph=create)
            return found[0]

        return map_samples(pull, self.inner.dense(), ())

    def maps(self) -> Sequence[LinearMap]:
        """Those of a transposed parameter, of some of its rows, and of rows looked up for all samples alike."""
        tensor, parameter = self.tensor, self.parameter
        if self._is_looked_up():
            return [self._lookup()]
        own = self.inner.maps()
        if tensor._base is not parameter or tensor.dim() < 2:
            return []
        if tensor.dim() == 2 and tensor.shape == parameter.shape[::-1] and tensor.stride() == parameter.stride()[::-1]:
            found = [a.transposed() for a in own]
            return [] if None in found else [a for a in found if a is not None]
        if tensor.shape[1:] != parameter.shape[1:] or tensor.stride() != parameter.stride():
            return []
        start = (tensor.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
        if any(a.inputs_first or a.matrix[0] != len(tensor) for a in own):
            return []
        return [Rows(a, range(start, start + len(tensor)), len(parameter)) for a in own]

    def _is_looked_up(self) -> bool:
        node: Any = self.tensor.grad_fn
        if node is None or node.name() != "EmbeddingBackward0" or node._saved_scale_grad_by_freq:
            return False
        return getattr(node.next_functions[0][0], "variable", None) is self.parameter

    def _lookup(self) -> Lookup:
        node: Any = self.tensor.grad_fn
        v, n = self.size
        index = node._saved_indices.reshape(1, -1).expand(n, -1)
        mask = index != node._saved_padding_idx  # -1: there is none
        grad = self.inner.dense().reshape(v, n, -1, self.shape[1])
        return Lookup(index, grad.masked_fill(~mask.unsqueeze(-1), 0), self.shape, mask)


@dataclass(eq=False)
class Rows(LinearMap):
    """Individual gradients of ``count`` rows, of which a map uses some, side by side."""

    inner: LinearMap
    rows: range
    count: int

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return torch.Size((self.count, *self.inner.shape[1:]))

    @property
    def size(self) -> tuple[int, int]:
        return self.inner.size

    @property
    def ranks(self) -> tuple[int, int]:  # type: ignore[override]
        return self.inner.ranks

    @property
    def matrix(self) -> tuple[int, int]:  # type: ignore[override]
        return self.count, self.inner.matrix[1]

    def narrow(self, start: int, stop: int) -> Rows:
        raise NotImplementedError("Only Kronecker factors are read of a map.")

    def scaled(self, factor: Tensor) -> Rows:
        raise NotImplementedError("Only Kronecker factors are read of a map.")

    def _dense(self) -> Tensor:
        dense = self.inner.dense()
        whole = dense.new_zeros(*self.size, *self.shape)
        whole[:, :, self.rows.start : self.rows.stop] = dense
        return whole

    def output_factor(self, approx: str | None) -> Tensor:
        inner = self.inner.output_factor(approx)
        whole = inner.new_zeros(self.count, self.count)
        whole[self.rows.start : self.rows.stop, self.rows.start : self.rows.stop] = inner
        return whole

    def input_factor(self, approx: str | None, scale: float = 1.0) -> Tensor:
        return self.inner.input_factor(approx, scale)

    def rotated(self, rows: Tensor, columns: Tensor) -> Individual:
        return self.inner.rotated(rows[self.rows.start : self.rows.stop], columns)
