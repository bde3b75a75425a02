"""Dot products of individual gradients, with each other or with given directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.batch_grad import BatchGrad
from backpack.extensions.merge_batches import BatchShare, Joined
from backpack.modules.parameters import name_of
from backpack.samples import Subset
from backpack.uses import Explicit, Individual
from backpack.uses.complex_numbers import as_real

Directions = Mapping[str, Tensor] | Mapping[Tensor, Tensor]
"""By parameter, or by its name: ``V`` tensors of its shape, ``[V, *p]``."""


class BatchDotGrad(BackpropExtension[Tensor]):
    """Dot products of the individual gradients, ``batch_dot`` of shape ``[N, N]`` or ``[N, V]``, per parameter.

    Of the gradients as ``BatchGrad`` scales them, and of their real and imaginary parts; the sum over all parameters is
    the dot product of whole gradients. Individual gradients are not stored.

    - By default, of all pairs: the diagonal is ``batch_l2``, and the sum over parameters is the Gram matrix of the
      gradients (the empirical neural tangent kernel of the loss). Over a data set, individual gradients of all samples
      are kept until the end.
    - ``against`` directions: column ``v`` has the dot products with direction ``v``. With the gradient of a
      validation loss as a direction, they are the first-order change of that loss by a step on each sample alone; with
      an inverse curvature times that gradient, the samples' influences (Koh & Liang, 2017, section 2).
    - ``against`` other samples of the batch: with the gradient of each of these (Wang et al., 2024, section 4). Over a
      data set, a first pass computes their gradients.

    Args:
        against: Directions, as a mapping of each parameter (or its name) to a tensor ``[V, *p]``; or the numbers of
            samples, in any form that ``subsampling`` takes; ``None``: the samples that ``subsampling`` selects.

    Raises:
        TypeError: ``against`` is none of these.
        ValueError: In the backward pass: there are no directions for a parameter, or they have another shape.
    """

    savefield = "batch_dot"
    unmerged = "the gradients of the samples in against are needed before. Over a data set, accumulate() computes them"

    def __init__(
        self, subsampling: Any = None, savefield: str | None = None, against: Directions | Any | None = None
    ) -> None:
        super().__init__(savefield, subsampling=subsampling)
        self.directions: Directions | None = None
        if isinstance(against, Mapping):
            self.directions = against
        elif against is not None:
            self.against = Subset(against)

    def check(self, parameters: Sequence[Tensor], samples: int) -> None:
        if self.directions is None:
            return
        counts: dict[int, str] = {}
        for parameter in parameters:
            name = name_of(parameter)
            found = self.direction(parameter, name)
            if found is None:
                raise ValueError(
                    f"BatchDotGrad: against has no directions for parameter {name} of shape {list(parameter.shape)}. "
                    f"Its keys are parameters or their names in the extended model; give zeros, or freeze the "
                    f"parameter with requires_grad_(False)."
                )
            if found.shape[1:] != parameter.shape or found.dim() == 0:
                raise ValueError(
                    f"BatchDotGrad: directions against parameter {name} of shape {list(parameter.shape)} must have "
                    f"shape {['V', *parameter.shape]}, with V directions along the first axis; they have "
                    f"{list(found.shape)}."
                )
            counts.setdefault(len(found), name)
        if len(counts) > 1:
            shown = " and ".join(f"{count} for {name}" for count, name in counts.items())
            raise ValueError(f"BatchDotGrad: there must be as many directions for all parameters; there are {shown}.")

    def direction(self, parameter: Tensor, name: str) -> Tensor | None:
        """The directions of a parameter, ``[V, *p]``; ``None``: there are none."""
        given: Any = self.directions
        found = given.get(name)
        return given.get(parameter) if found is None else found

    def compute(self, grads: Individual) -> Tensor:
        if self.directions is not None:
            found = self.direction(grads.parameter, name_of(grads.parameter))
            assert found is not None
            return grads.dots(Explicit(found.to(grads.parameter)[None]))[0, :, 0]
        other = grads if self.against is None else grads.others
        assert other is not None
        return grads.dots(other)[0, :, 0]

    def beforehand(self) -> BatchGrad | None:
        return None if self.against is None else BatchGrad(self.against.given, self.savefield)

    def given(self, found: dict[str, Any]) -> BatchDotGrad:
        return BatchDotGrad(self.subset.given, self.savefield, found)

    def on_batch(self, share: BatchShare) -> BackpropExtension:
        if self.directions is None and self.against is None:
            return BatchGrad(share.rows, self.savefield)
        part = self.with_subset(Subset(share.rows))
        part.batches = None if self.directions is None else Joined(1)
        return part

    @property
    def reads_all_rows(self) -> bool:
        return self.directions is None

    def of_whole(self, name: str, merged: Tensor) -> Tensor:
        if self.directions is not None:
            return merged
        flat = as_real(merged.flatten(1))
        return flat @ flat.T
