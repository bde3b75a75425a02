"""Linear maps and, unfolded, convolutions in a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from backpack.samples import Rows
from backpack.uses.complex_numbers import conjugated
from backpack.uses.dense_gradients import Dense, SummedGroups
from backpack.uses.use import SamplewiseUse


@dataclass(eq=False)
class DenseUse(SamplewiseUse):
    """A linear map of what ``unfold`` makes of the recorded ``inputs``.

    ``unfold``, linear in each of the inputs, takes them as ``[n, ...]`` to ``[n, g, s, i]``. ``fold`` takes a cotangent
    ``[v, n, ...]`` to ``[v, n, g, s, o]``. ``other`` is another such pair, from which Kronecker factors are computed if
    it is given. ``moments``, ``gram``, ``direct`` and ``summed`` are those of ``Dense``. ``apply`` takes a matrix to
    the output, as PyTorch computes it. A shift in the same call is along the outputs ``o``.
    """

    inputs: tuple[Tensor, ...]
    unfold: Callable[..., Tensor]
    fold: Callable[[Tensor], Tensor]
    flipped: bool = False
    other: tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]] | None = None
    moments: Callable[..., Tensor] | None = None
    gram: tuple[Callable[..., Tensor], Callable[[], float]] | None = None
    direct: Callable[..., Tensor] | None = None
    summed: Callable[..., Tensor] | None = None
    apply: Callable[[Tensor], Tensor] | None = None

    def bind(self, grad: Tensor, rows: Rows, shape: torch.Size) -> Dense:
        inputs = tuple([conjugated(rows.take(tensor).to(grad.dtype)) for tensor in self.inputs])
        other: Callable[[], Dense] | None = None
        if self.other is not None:
            unfold, fold = self.other

            def other() -> Dense:
                x, g = unfold(*inputs), fold(grad)
                cls = Dense if x.shape[1] == 1 else SummedGroups
                return cls((x,), g, torch.Size((g.shape[4], x.shape[1] * x.shape[3])))

        fast = grad.dtype == torch.float32 and grad.device.type == "cpu" and not torch.is_grad_enabled()
        more = (other, self.moments, self.gram, self.direct if fast else None, self.summed)
        return Dense(inputs, self.fold(grad), shape, self.flipped, self.unfold, *more)

    def forward(self) -> Callable[[Tensor, torch.Size], Tensor] | None:
        apply = self.apply
        return None if apply is None else lambda matrix, shape: apply(matrix).reshape(shape)
