"""What all extensions have in common."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from backpack.extensions.merging import Joined, Merging
from backpack.samples import Subset
from backpack.uses import Individual


class BackpropExtension:
    """A quantity that a backward pass inside ``backpack(...)`` stores on each parameter.

    Args:
        savefield: Name of the attribute that receives the result (default: that of the class).
        subsampling: The samples that contribute, as integers (negative ones count from the end), a boolean mask, a
            slice or a range; ``None``: all. The result is what it would be if only these samples contributed to the
            loss, with the normalization of the full batch unchanged.

    Raises:
        TypeError: ``subsampling`` holds something else.
        ValueError: ``subsampling`` is empty or not one-dimensional.
    """

    savefield: str = ""
    seeds: str | None = None
    """``None``: of first order. Otherwise which columns of the loss Hessian's root are pulled back."""
    needs_all_parameters = False
    reads: tuple[str, ...] = ()
    """The reductions of ``Individual`` that ``compute`` reads: those of all extensions are computed together."""
    batches: Merging | Joined | None = None
    """How results of batches become that of a data set; ``None``: they can't."""
    fixes_scale = False
    """Whether what is computed of a batch depends on the scale of the whole data set's loss."""

    def __init__(self, savefield: str | None = None, subsampling: Any = None) -> None:
        if savefield is not None:
            self.savefield = savefield
        self.subset = Subset(subsampling)

    def get_subsampling(self) -> Any:
        """The samples that contribute, as they were given; ``None`` for all."""
        return self.subset.given

    def on_batch(self, rows: list[int] | None, factor: float) -> BackpropExtension:
        """What to compute of one batch of a data set, whose results are merged as its ``batches`` says.

        Args:
            rows: The samples of the batch that contribute.
            factor: With which the batch's loss enters that of the data set.
        """
        part = copy.copy(self)
        part.subset = Subset(rows)
        return part

    def of_whole(self, merged: Any) -> Any:
        """The result for a data set, from what its batches' results were merged to."""
        return merged

    def compute(self, grads: Individual) -> Any:
        """The result for one parameter, from its individual gradients."""
        raise NotImplementedError(f"{type(self).__name__} does not define compute().")

    def measure(self, grads: Individual) -> Tensor:
        """What of one parameter the results of all depend on (where ``needs_all_parameters``)."""
        raise NotImplementedError(f"{type(self).__name__} does not define measure().")

    def combine(self, measures: list[Tensor]) -> Tensor:
        """What the result of each parameter needs to know of all."""
        raise NotImplementedError(f"{type(self).__name__} does not define combine().")

    def compute_jointly(self, grads: Individual, joint: Tensor) -> Any:
        """The result for one parameter, given what ``combine`` returned."""
        raise NotImplementedError(f"{type(self).__name__} does not define compute_jointly().")
