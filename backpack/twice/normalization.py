"""Instance normalization as PyTorch's group normalization, in which each axis holds either samples or channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from backpack.twice.registry import REPLACED


def _instance_norm_by_groups(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """PyTorch joins samples and channels to one axis, in which the samples are hard to find."""
    if not use_input_stats or running_mean is not None:
        return NotImplemented
    return F.group_norm(input, input.shape[1], weight, bias, eps)


REPLACED[F.instance_norm] = _instance_norm_by_groups
