"""The numbers that users give to samples: which sample each leading entry of the model's output belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from backpack.samples.layouts import AnyLayout, found_layout


class SampleIds:
    """Numbers of samples, ``-1`` for entries of none.

    Entries of no sample form one more sample, the last, which no subset selects.

    Args:
        given: An integer tensor of the shape of the output's leading axes, or such a tensor and the number of samples.

    Raises:
        TypeError: It is neither.
        ValueError: A number is smaller than -1 or too large, or there is no sample.
    """

    def __init__(self, given: Any) -> None:
        ids, count = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        ids = torch.as_tensor(ids).detach().cpu()
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() == 0:
            raise TypeError(
                f"sample_ids must be an integer tensor, with one number for each leading entry of the model's output; "
                f"got a tensor of {ids.dtype} and shape {list(ids.shape)}."
            )
        if count is not None and (isinstance(count, bool) or not hasattr(count, "__index__")):
            raise TypeError(f"sample_ids=(ids, count) takes the number of samples as an integer, got {count!r}.")
        ids = ids.to(torch.int64)
        largest, smallest = (int(ids.max()), int(ids.min())) if ids.numel() else (-1, 0)
        self.count = largest + 1 if count is None else int(count)
        if smallest < -1:
            raise ValueError(f"sample_ids holds {smallest}: samples are numbered from 0, and -1 stands for none.")
        if largest >= self.count:
            raise ValueError(f"sample_ids holds {largest}, but there are {self.count} samples, numbered from 0.")
        if self.count < 1:
            raise ValueError("sample_ids gives no entry to a sample.")
        self.shape = tuple(ids.shape)
        self.leaves_out = smallest < 0
        """Whether there are entries of no sample."""
        self.n = self.count + self.leaves_out
        """How many samples there are, together with the one that all entries of no sample form."""
        self.numbers = ids
        self._ids = ids.where(ids >= 0, self.count)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether there is a number for each leading entry of a tensor; its first axis may be several, flattened."""
        return self._of(shape) is not None

    def layout(self, shape: Sequence[int]) -> AnyLayout:
        """The layout of a tensor that the numbers fit."""
        ids = self._of(shape)
        assert ids is not None
        return found_layout(self.n, ids.reshape(*ids.shape, *[1] * (len(shape) - ids.dim())), exactly=True)

    def _of(self, shape: Sequence[int]) -> Tensor | None:
        if tuple(shape[: len(self.shape)]) == self.shape:
            return self._ids
        return self._ids.flatten() if shape and shape[0] == prod(self.shape) else None
