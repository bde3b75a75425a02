"""Rules for losses that are one node, where they are not reduced to a number, and for what takes their place."""

from __future__ import annotations

from backpack.samples.layout_rules.elementwise import broadcast
from backpack.samples.layout_rules.registry import Output, Unknown, rule
from backpack.samples.layouts import AnyLayout


@rule("NllLoss NllLoss2D")
def nll_loss(out: Output) -> list[AnyLayout | None]:
    """The input has one more axis, of classes, behind that of the samples."""
    if not out.shape:
        raise Unknown
    return [out.without_axes([1], len(out.shape) + 1)]


@rule("MseLoss L1Loss SmoothL1Loss HuberLoss BinaryCrossEntropy KlDiv")
def elementwise_loss(out: Output) -> list[AnyLayout | None]:
    if not out.shape:
        raise Unknown
    return out.each(lambda k: broadcast(out, k))


@rule("HeadInCodes")
def of_rows(out: Output) -> list[AnyLayout | None]:
    """The function of ``nodes/linear_cross_entropy.py`` from rows and a head to a matrix with as many rows."""
    return [out.layout.moved([0, None])]
