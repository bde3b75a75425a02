"""Instance normalization as PyTorch's group normalization, that of tensors in the usual memory format, and of weights.

In instance normalization, PyTorch joins samples and channels to one axis. Of group normalization of tensors with the
channels last, derivatives by the weight alone end the process (PyTorch 2.13). The second derivatives of weight
normalization take the norms for constants there, and are wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.curvature.replacements.twice_differentiable import REPLACED, WRONG


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
    return F.group_norm(input.contiguous(), input.shape[1], weight, bias, eps)


def _contiguous_group_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.group_norm(input.contiguous(), *args, **kwargs)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


REPLACED[torch._weight_norm] = _weight_norm
WRONG.add(torch._weight_norm)
REPLACED[F.group_norm] = _contiguous_group_norm
REPLACED[F.instance_norm] = _instance_norm_by_groups
