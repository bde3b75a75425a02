"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from backpack.nodes.registry import Place, form, is_complex
from backpack.operations.convolution import Convolution, transposed_use
from backpack.uses import DenseUse, ElementwiseUse, Use


@form("Convolution")
def convolution(place: Place) -> Use | None:
    if place.layout.axes != [0]:
        return None
    if place.k == 2:
        return ElementwiseUse(tuple(place.out[1] if axis == 1 else 1 for axis in range(len(place.out))))
    if place.k != 1:
        return None
    input = place.saved("input")
    if is_complex(input):
        return None
    stride, padding, dilation = (tuple(place.saved(name)) for name in ("stride", "padding", "dilation"))
    groups = place.saved("groups")
    if place.saved("transposed"):
        return transposed_use(place.out, input, place.shape, stride, padding, groups, dilation)
    own = Convolution.of(tuple(input.shape), tuple(place.shape), place.out, stride, padding, dilation, groups)
    return DenseUse(
        (input,),
        own.columns,
        own.channels,
        moments=own.moments,
        gram=(own.gram, own.share),
        direct=own.individual if own.is_small_depthwise else None,
    )
