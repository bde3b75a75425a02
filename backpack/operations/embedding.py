"""Embeddings and bags of embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack.operations.registry import Operation, rule
from backpack.uses import LookupUse


@rule(F.embedding)
def embedding(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Operation | None:
    problem = _refused(max_norm, scale_grad_by_freq)
    if problem:
        return Operation((0,), [], problem)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    return Operation(tuple(range(input.dim())), [(weight, LookupUse(input, padding_idx))])


@rule(F.embedding_bag)
def embedding_bag(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Operation | None:
    problem = _refused(max_norm, scale_grad_by_freq)
    if mode == "max":
        problem = "takes the maximum of a bag; use mode 'sum' or 'mean'"
    if problem:
        return Operation((0,), [], problem)
    grouped: tuple[Tensor, ...] = ()
    if input.dim() == 1:
        assert offsets is not None
        grouped = input, offsets
        input, inside, per_sample_weights = _padded(input, offsets, include_last_offset, per_sample_weights)
    else:
        inside = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        inside = inside & (input != padding_idx % len(weight))
    factor = inside.to(out.dtype)
    if mode == "mean":
        factor = factor / factor.sum(1, keepdim=True).clamp(min=1)
    if per_sample_weights is not None:
        factor = factor * per_sample_weights.detach()
    return Operation((0,), [(weight, LookupUse(input, weight=factor, bag=True))], grouped=grouped)


def _refused(max_norm: float | None, scale_grad_by_freq: bool) -> str | None:
    if max_norm is not None:
        return "renormalizes its table in place (max_norm), so that what is looked up is no function of the weight"
    if scale_grad_by_freq:
        return "scales its gradient by the frequencies in the batch (scale_grad_by_freq), which mixes samples"
    return None


def _padded(
    input: Tensor, offsets: Tensor, include_last: bool, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bags of different lengths, ``[bags, longest]``; which entries are real; their weights."""
    ends = offsets[1:] if include_last else torch.cat([offsets[1:], offsets.new_tensor([len(input)])])
    starts = offsets[:-1] if include_last else offsets
    lengths = ends - starts
    place = torch.arange(int(lengths.max()), device=input.device)
    inside = place < lengths[:, None]
    source = (starts[:, None] + place).clamp(max=len(input) - 1)
    return input[source].masked_fill(~inside, 0), inside, None if weights is None else weights[source]
