"""Selection of samples from a tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backpack.samples import Subset


def subsample(tensor: Tensor, dim: int = 0, subsampling: Any = None) -> Tensor:
    """The selected samples of a tensor, which lie along axis ``dim``; all of them without ``subsampling``.

    Args:
        tensor: The tensor with the samples.
        dim: The axis of the samples.
        subsampling: As extensions take it: integers, a boolean mask, a slice or a range.

    Returns:
        A tensor with ``len(subsampling)`` entries along ``dim``, in the order given; ``tensor`` itself if all are.

    Raises:
        IndexError: An entry is out of range, or a mask has another length than ``dim``.
        TypeError: ``subsampling`` holds something else than numbers of samples.
        ValueError: No sample is selected.
    """
    rows = Subset(subsampling).rows(tensor.shape[dim], tensor.device)
    return tensor if rows is None else tensor.index_select(dim, rows)
