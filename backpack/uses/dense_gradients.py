"""Individual gradients of ``W`` in ``z[n s o] = W[o i] x[n s i]``, in ``g`` independent groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeGuard

import torch
from torch import Tensor

from backpack.memory import at_a_time, empty, product
from backpack.uses.base import Individual, accumulate
from backpack.uses.complex_numbers import as_real, squared
from backpack.uses.dense_factors import DenseMap
from backpack.uses.elementwise import Explicit
from backpack.uses.linear_map import LinearMap
from backpack.uses.sample_sum import SampleSum
from backpack.uses.second_moments import gram_of_outputs, second_moment, squares_of_outputs

SMALL = 2**22
"""Multiplications up to which products of several seeds are joined, at the price of copies of their cotangents."""

MANY = 128
"""Positions from which on it takes much longer to form individual gradients than to write and read them."""


@dataclass(eq=False)
class Dense(Individual):
    """Individual gradients ``sum_s grad[v n g s o] x[n g s i]``; ``x`` are the inputs, conjugated where complex.

    Args:
        inputs: What ``unfold`` makes ``x[n g s i]`` of, when that is needed: tensors ``[n, ...]``.
        grad: The cotangents, ``[v, n, g, s, o]``.
        shape: Of the parameter.
        flipped: Whether the parameter's matrix is ``[g, i, o]`` instead of ``[g, o, i]``.
        unfold: ``None``: the only one of the ``inputs`` is ``x``.
        other: Makes the gradients whose Kronecker factors are wanted, where they are not wanted of these.
        moments: Takes the ``inputs`` and a factor to this multiple of the mean over ``g`` of
            ``sum_ns x[n g s i] x[n g s j]``, with an axis of size 1 in front. It is faster than from ``x``.
        gram: Takes the ``inputs`` to ``sum_i x[n g s i] x[n g t i]``, and gives its cost relative to that from ``x``.
            This and ``moments`` are for real numbers.
        direct: Takes the ``inputs`` and the cotangents ``[n, g, s, o]`` of one seed to the individual gradients. It is
            faster, and not for ``flipped`` matrices.
        summed: Takes the ``inputs`` and the cotangents ``[n, g, s, o]`` to the sum of the individual gradients, for
            real numbers.
    """

    inputs: tuple[Tensor, ...]
    grad: Tensor
    shape: torch.Size
    flipped: bool = False
    unfold: Callable[..., Tensor] | None = None
    other: Callable[[], Dense] | None = None
    moments: Callable[..., Tensor] | None = None
    gram: tuple[Callable[..., Tensor], Callable[[], float]] | None = None
    direct: Callable[..., Tensor] | None = None
    summed: Callable[..., Tensor] | None = None

    @cached_property
    def x(self) -> Tensor:
        """The inputs of the linear map, ``[n, g, s, i]``."""
        return self.inputs[0] if self.unfold is None else self.unfold(*self.inputs)

    @property
    def device(self) -> torch.device:
        return self.grad.device

    @property
    def _scratch(self) -> int:
        return at_a_time("scratch", self.device)

    @property
    def size(self) -> tuple[int, int]:
        return self.grad.shape[0], self.grad.shape[1]

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """The sizes of the axes ``v n g s o i``."""
        v, n, g, s, o = self.grad.shape
        return v, n, g, s, o, self.x.shape[3] if self.unfold is None else self.shape.numel() // max(1, g * o)

    @property
    def is_complex(self) -> bool:
        return self.grad.is_complex()

    @property
    def is_small(self) -> bool:
        v, n, _, s, _ = self.grad.shape
        entries = self.grad.numel() + sum(tensor.numel() for tensor in self.inputs)
        return v * n * self.shape.numel() <= entries * (2.5 if s >= MANY else 1)

    def _narrow(self, start: int, stop: int) -> Dense:
        part = self._with(tuple([tensor[start:stop] for tensor in self.inputs]), self.grad[:, start:stop], self.unfold)
        if "x" in vars(self):
            vars(part)["x"] = self.x[start:stop]
        return part

    def _with(self, inputs: tuple[Tensor, ...], grad: Tensor, unfold: Callable[..., Tensor] | None = None) -> Dense:
        """The same with other inputs and cotangents; faster than ``replace``."""
        more = (self.other, self.moments, self.gram, self.direct, self.summed)
        return type(self)(inputs, grad, self.shape, self.flipped, unfold, *more)

    def scaled(self, factor: Tensor) -> Dense:
        first, *others = self.inputs
        if len(self.grad) == 1 and first.numel() > self.grad.numel():
            return replace(self, grad=self.grad * factor[:, None, None, None])
        return replace(self, inputs=(first * factor.reshape(-1, *[1] * (first.dim() - 1)), *others))

    def _directly(self) -> Tensor | None:
        """Individual gradients of one seed, where ``direct`` gives them."""
        if self.direct is None or self.unfold is None or len(self.grad) > 1:
            return None
        return self.direct(*self.inputs, self.grad[0])

    def _dense(self) -> Tensor:
        v, n, g, s, o, i = self.sizes
        found = self._directly()
        if found is not None:
            found = found.reshape(1, n, *self.shape)
            return found if self.room is None else self.room.copy_(found)
        if torch.is_grad_enabled():
            left, right = (self.x, self.grad) if self.flipped else (self.grad, self.x)
            return (left.transpose(-1, -2) @ right).reshape(v, n, *self.shape)
        room = empty((v, n, *self.shape), self.grad) if self.room is None else self.room
        result = room.view(v, n, g, *((i, o) if self.flipped else (o, i)))
        step = max(1, n if "x" in vars(self) or self.unfold is None else 4 * self._scratch // max(1, g * s * i))
        for start in range(0, n, step):
            part = self if step >= n else self.narrow(start, start + step)
            for seed, out in zip(part.grad, result[:, start : start + step], strict=True):
                left, right = (part.x, seed) if self.flipped else (seed, part.x)
                if s == 1:
                    torch.mul(left[..., 0, :, None], right[..., 0, None, :], out=out)
                else:
                    torch.matmul(left.transpose(2, 3), right, out=out)
        return room

    def _matrices(self) -> Tensor:
        """All seeds in one product per sample and group, ``[n, g, i, v o]``; in this order it is faster."""
        v, n, g, s, o, i = self.sizes
        found = self._directly()
        if found is not None:
            return found.reshape(n, g, o, i).transpose(2, 3)
        right = self.grad[0] if v == 1 else self.grad.permute(1, 2, 3, 0, 4).reshape(n, g, s, v * o)
        return product(torch.matmul, self.x.transpose(2, 3), right, (n, g, i, v * o))

    def _sum(self) -> Tensor:
        """The sum over seeds and samples: one product, or several if few samples can be unfolded at a time."""
        v, n, g, s, o, i = self.sizes
        grad = _over_seeds(self.grad)
        if self.summed is not None and self.unfold is not None and not (self.is_complex or torch.is_grad_enabled()):
            return self.summed(*self.inputs, grad).reshape(self.shape)
        is_at_hand = "x" in vars(self) or n * g * s * i <= sum(tensor.numel() for tensor in self.inputs)
        step = n if is_at_hand else max(1, 4 * self._scratch // max(1, g * s * i))
        terms: list[Tensor] = []
        for start in range(0, n, step):
            x = self.x if step >= n else self.narrow(start, start + step).x
            left, right = (x, grad[start : start + step]) if self.flipped else (grad[start : start + step], x)
            order = (1, 2, 0, 3) if left.stride(2) > left.stride(0) else (1, 0, 2, 3)  # that in memory: no copies
            left, right = (rows.permute(order).flatten(1, 2) for rows in (left, right))
            if g == 1:
                accumulate(terms, product(torch.mm, left[0].T, right[0], (left.shape[2], right.shape[2]))[None])
            else:
                accumulate(terms, product(torch.bmm, left.mT, right, (g, left.shape[2], right.shape[2])))
        return self._to_parameter(terms[0].mT if self.flipped else terms[0])

    @property
    def _is_plain(self) -> bool:
        """Whether squares are to be taken of one seed, without weights, and no gradient is tracked."""
        return len(self.grad) == 1 and self.weights is None and not torch.is_grad_enabled()

    def _to_parameter(self, matrix: Tensor) -> Tensor:
        """``[..., g, o, i]`` to ``[..., *p]``."""
        matrix = matrix.transpose(-1, -2) if self.flipped else matrix
        return matrix.reshape(*matrix.shape[:-3], *self.shape)

    def closed(self, name: str, swept: bool = False) -> Tensor | None:
        v, n, g, s, o, i = self.sizes
        if name == "norms" and s > 1 and not swept and s * (v * o + self._gram_share * i) < v * o * i:
            return self.sample_dots(self)
        if name == "total" and s > 1 and not swept:
            return self._sum()
        if s > 1:
            return None
        if name == "norms":
            if g == 1:
                own = self.share(("norms", o), lambda: squared(self.grad).sum((2, 3, 4)))
                return own * squared(self.x).sum((1, 2, 3))
            return (squared(self.grad).sum((3, 4)) * squared(self.x).sum((2, 3))).sum(2)
        x, grad = self.x, self.grad
        if name == "total":
            grad = _over_seeds(grad)
        elif self.weights is None:
            x, grad = squared(x), squares_of_outputs(self, grad.flatten(2)).reshape(grad.shape[1:])
        else:
            x, grad = squared(x), torch.einsum("vngso,vn->ngso", squared(grad), self.weights)
        if name == "sample_squares":
            return self._to_parameter(product(torch.matmul, grad.transpose(2, 3), x, (n, g, o, i)))
        if g == 1:
            return self._to_parameter(product(torch.mm, grad.reshape(n, o).T, x.reshape(n, i), (o, i))[None])
        left, right = grad[:, :, 0].permute(1, 2, 0), x[:, :, 0].transpose(0, 1)
        return self._to_parameter(product(torch.matmul, left, right, (g, o, i)))

    def chunks(self) -> Iterator[Dense]:
        if "dense" in self._known:
            yield self
            return
        v, n, g, s, o, i = self.sizes
        step, cores = max(1, self._scratch // max(1, g * i * max(o, s))), torch.get_num_threads()
        step -= step % cores if step > cores else 0
        for start in range(0, n, step):
            yield self.narrow(start, min(start + step, n))

    def _seeds(self) -> Iterator[Dense]:
        """Pieces of one seed each, or of a few where a product of theirs is too small to be worth a call."""
        v, n, g, s, o, i = self.sizes
        step = max(1, SMALL // max(1, n * g * s * o * i))
        if step >= v:
            yield self
            return
        for start in range(0, v, step):
            part = self._with((self.x,), self.grad[start : start + step])
            if self.weights is not None:
                part.weights = self.weights[start : start + step]
            yield part

    def _sweep(self, names: list[str]) -> dict[str, Tensor]:
        if "dense" in self._known or self.is_complex:
            return super()._sweep(names)
        o = self.grad.shape[4]
        summed = {name: SampleSum() for name in names if name in ("total", "sum_squares")}
        pieces: dict[str, list[Tensor]] = {name: [] for name in names if name not in summed}
        for samples in self.chunks():
            own: dict[str, list[Tensor]] = {name: [] for name in pieces}
            for part in samples._seeds():
                matrices = part._matrices()
                if own.get("sample_squares") and names == ["sample_squares"] and part._is_plain:
                    own["sample_squares"][0].addcmul_(matrices, matrices)
                    continue
                if "total" in summed:
                    summed["total"].add(matrices.unflatten(3, (-1, o)))
                if not pieces and part.weights is None:
                    if "sum_squares" in summed:
                        summed["sum_squares"].add(matrices.unflatten(3, (-1, o)), squared=True)
                    continue
                if names != ["total"]:
                    matrices = matrices.square() if torch.is_grad_enabled() else matrices.square_()
                if "norms" in own:
                    own["norms"].append(matrices.unflatten(3, (-1, o)).sum((1, 2, 4)).T)
                if part.weights is not None:
                    matrices = (matrices.unflatten(3, (-1, o)) * part.weights.T[:, None, None, :, None]).flatten(3)
                if "sum_squares" in summed:
                    summed["sum_squares"].add(matrices.unflatten(3, (-1, o)))
                if "sample_squares" in own:
                    squares = matrices if part._is_plain else matrices.unflatten(3, (-1, o)).sum(3)
                    accumulate(own["sample_squares"], squares)
            for name, parts in own.items():
                pieces[name].append(torch.cat(parts))
        found = {}
        for name, total in summed.items():
            found[name] = self._to_parameter(total.result().transpose(1, 2))
        for name, parts in pieces.items():
            whole = torch.cat(parts, int(name == "norms"))
            found[name] = whole if name == "norms" else self._to_parameter(whole.transpose(2, 3))
        return found

    def _matches(self, other: Individual) -> TypeGuard[Dense]:
        """Whether the matrices of both, ``[g, o, i]``, are the same entries of the parameter."""
        if type(other) is not type(self) or not isinstance(other, Dense):
            return False
        return self.flipped == other.flipped and self.grad.shape[2] == other.grad.shape[2]

    def sample_dots(self, other: Individual) -> Tensor:
        if not self._matches(other):
            return super().sample_dots(other)
        v, n, g, s, o, i = self.sizes
        step = max(1, self._scratch // (g * s * max(i, other.grad.shape[3] * (1 + v))))
        share, pieces = self._gram_share if other is self else 1, []
        for start in range(0, n, step):
            a = self.narrow(start, start + step)
            b = a if other is self else other.narrow(start, start + step)
            inputs = a.gram[0](*a.inputs) if a.gram and share < 1 else a.x.conj() @ b.x.transpose(2, 3)
            total = self._dots_of_products(inputs, a.grad.conj(), b.grad)
            pieces.append(torch.real(total))
        return torch.cat(pieces, 1)

    def _dots_of_products(self, inputs: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The sum of ``inputs[n g s t] left[v n g s o] right[v n g t o]``, ``[v, n]``, by products with few results."""
        positions, outputs = right.shape[3:]
        tracked = torch.is_grad_enabled()
        if positions < outputs:
            found = product(torch.matmul, left, right.mT, (*left.shape[:4], positions))
            other = inputs
        elif left.stride(4) == 1:
            found, other = product(torch.matmul, inputs, right, left.shape), left
        else:  # as convolutions have them
            left = left.mT
            found, other = product(torch.matmul, right.mT, inputs.mT, left.shape), left
        return (found * other if tracked else found.mul_(other)).sum((2, 3, 4))

    def _dots_of_outer_products(self, other: Explicit) -> Tensor:
        """``dots`` with stored matrices, for one position: these multiply the inputs."""
        v, n, g, s, o, i = self.sizes
        matrices = other.value.reshape(*other.size, g, *((i, o) if self.flipped else (o, i)))
        matrices = matrices.mT if self.flipped else matrices
        images = torch.einsum("wmgoi,ngi->nwmgo", matrices, self.x[:, :, 0])
        return torch.einsum("nwmgo,vngo->vnwm", images, self.grad[:, :, :, 0])

    @property
    def _gram_share(self) -> float:
        """The cost of dot products of inputs at the positions of a sample, relative to dot products of ``x``."""
        return 1 if self.gram is None or self.unfold is None else self.gram[1]()

    def dots(self, other: Individual) -> Tensor:
        v, n, g, s, o, i = self.sizes
        if not self._matches(other):
            if isinstance(other, Explicit) and s == 1 and not self.is_complex:
                return self._dots_of_outer_products(other)
            return super().dots(other)
        w, m, _, t, _ = other.grad.shape
        if s == t == g == 1 and other is self:
            inputs = self.x[:, 0, 0]
            return torch.real(gram_of_outputs(self, self.grad[:, :, 0, 0]) * (inputs @ inputs.mH)[None, :, None])
        if s == t == 1:
            inputs = torch.einsum("ngi,mgi->nmg", self.x[:, :, 0], other.x[:, :, 0].conj())
            outputs = torch.einsum("vngo,wmgo->vnwmg", self.grad[..., 0, :], other.grad[..., 0, :].conj())
            return torch.real((outputs * inputs[None, :, None]).sum(4))
        if n * m * s * t * (v * w * o + i) < (v * n + w * m) * s * o * i:
            inputs = torch.einsum("ngsi,mgti->nmgst", self.x, other.x.conj())
            outputs = torch.einsum("vngso,wmgto->vwnmgst", self.grad, other.grad.conj())
            return torch.real((outputs * inputs).sum((4, 5, 6)).permute(0, 2, 1, 3))
        step = max(1, 2 * self._scratch // max(1, (v * n if other is self else v * n + w * m) * g * i))
        terms: list[Tensor] = []
        for start in range(0, o, step):  # a few rows of all samples' matrices at a time
            left = self._rows(start, start + step)
            products = second_moment(left.T) if other is self else left @ other._rows(start, start + step).T
            accumulate(terms, products)
        return terms[0].reshape(n, v, m, w).permute(1, 0, 3, 2)

    def projected(self, rows: Tensor | None, columns: Tensor | None, sizes: tuple[int, int]) -> Tensor:
        v, n, g, s, o, i = self.sizes
        if self.is_complex or type(self) is not Dense or sizes != ((g * i, o) if self.flipped else (g * o, i)):
            return super().projected(rows, columns, sizes)
        pieces = []
        for piece in self.chunks():
            left, right = (piece.x, piece.grad) if self.flipped else (piece.grad, piece.x)
            right = right if columns is None else right @ columns
            if rows is not None:  # groups are summed, as positions are
                left = (left @ rows.unflatten(0, (g, -1))).flatten(-3, -2)
                pieces.append(left.mT @ right.flatten(-3, -2))
            else:
                pieces.append((left.mT @ right).flatten(2, 3))
        return torch.cat(pieces, 1)

    def maps(self) -> Sequence[LinearMap]:
        grads = self
        if self.other is not None:
            grads = self.other()
            grads.shared, grads.filled = self.shared, self.filled
        return [DenseMap(grads)]

    @property
    def groups_of_inputs(self) -> bool:
        """Whether groups are blocks of the rows or columns that are inputs, rather than of those that are outputs."""
        return self.flipped

    def _rows(self, start: int, stop: int) -> Tensor:
        """Rows of all samples' and seeds' matrices, ``[n v, ...]``, real."""
        grad = self.grad[..., start:stop].permute(1, 2, 0, 4, 3).flatten(2, 3)
        found = product(torch.matmul, grad, self.x, (*grad.shape[:3], self.x.shape[3]))
        return as_real(found.unflatten(2, (len(self.grad), -1)).transpose(1, 2).flatten(2).flatten(0, 1))


class SummedGroups(Dense):
    """The same with the matrix ``[o, g i]``: groups of inputs whose outputs are summed."""

    groups_of_inputs = True

    def _dense(self) -> Tensor:
        v, n, g, s, o = self.grad.shape
        blocks = replace(self, shape=torch.Size((g, o, self.x.shape[3])))
        return self._to_parameter(Dense._dense(blocks))

    def _to_parameter(self, matrix: Tensor) -> Tensor:
        return matrix.transpose(-3, -2).reshape(*matrix.shape[:-3], *self.shape)


def _over_seeds(grad: Tensor) -> Tensor:
    """The sum over the first axis; of one seed, itself."""
    return grad[0] if grad.shape[0] == 1 else grad.sum(0)
