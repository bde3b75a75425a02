"""Embeddings, and bags of them."""

from __future__ import annotations

import torch
from torch import Tensor

from backpack.graph import signed
from backpack.nodes.registry import Place, form
from backpack.uses import LookupUse, Use


@form("Embedding")
def embedding(place: Place) -> Use | None:
    if place.saved("scale_grad_by_freq") or place.layout.occupies([len(place.out) - 1]):
        return None
    padding = place.saved("padding_idx")
    return LookupUse(place.saved("indices"), signed(padding) if signed(padding) >= 0 else None)


@form("EmbeddingBag")
def embedding_bag(place: Place) -> Use | None:
    mode = place.saved("mode")
    if place.k != 0 or mode not in (0, 1) or place.saved("scale_grad_by_freq") or place.layout.axes != [0]:
        return None
    weights = place.saved("per_sample_weights")
    index, inside, weights = _padded(place.saved("indices"), place.saved("offsets")[: place.out[0]], weights)
    padding = signed(place.saved("padding_idx"))
    if padding >= 0:
        inside = inside & (index != padding)
    factor = inside.to(torch.float64)
    if mode == 1:
        factor = factor / factor.sum(1, keepdim=True).clamp(min=1)
    if weights is not None:
        factor = factor * weights.detach()
    dtype = place.node._input_metadata[0].dtype
    return LookupUse(index, weight=factor.to(dtype), bag=True)


def _padded(indices: Tensor, offsets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bags of different lengths, padded to ``[bags, longest]``; which entries are no padding; their weights."""
    ends = torch.cat([offsets[1:], offsets.new_tensor([len(indices)])])
    lengths = ends - offsets
    place = torch.arange(max(1, int(lengths.max())), device=indices.device)
    inside = place < lengths[:, None]
    source = (offsets[:, None] + place).clamp(max=len(indices) - 1)
    return indices[source].masked_fill(~inside, 0), inside, None if weights is None else weights[source]
