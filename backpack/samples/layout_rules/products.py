"""Rules for products of matrices, convolutions and embeddings."""

from __future__ import annotations

from torch.autograd.graph import Node

from backpack.graph import kind
from backpack.samples.layout_rules.elementwise import broadcast
from backpack.samples.layout_rules.registry import Output, Unknown, rule
from backpack.samples.layouts import AnyLayout, Layout


@rule("Mm Bmm Addmm Baddbmm")
def matrix_product(out: Output) -> list[AnyLayout | None]:
    """``[*b, r, i] @ [*b, i, c]``, to which another input may be added."""
    layout, last = out.layout, 1 if kind(out.node) in ("Mm", "Addmm") else 2
    left = None if layout.occupies([last]) else layout
    right = None if layout.occupies([last - 1]) else layout
    if len(out.edges) == 2:
        return [left, right]
    if out.edges[0][0] is None or (layout.axes == [0] and len(out.input_shape(0)) < 2):  # the bias of a linear layer
        return [None, left, right]
    return [broadcast(out, 0), left, right]


@rule("GroupedMm")
def grouped_product(out: Output) -> list[AnyLayout | None]:
    """``[r, i] @ [e, i, o]``: each row is multiplied by one of the matrices."""
    if len(out.shape) != 2 or len(out.saved("mat2_sym_sizes")) != 3:
        raise Unknown
    return [out.unless_along([1])]


@rule("Mv")
def product_with_vector(out: Output) -> list[AnyLayout | None]:
    """``[r, i] @ [i]``: a row belongs to a sample, the vector to all."""
    return [out.layout.moved([0, None])]


def is_bilinear(node: Node) -> bool:
    """Whether a node is that of ``F.bilinear``, rather than of one of its derivatives."""
    saved = {"expand1": [1, 3], "expand2": [0], "expand3": [1, 2], "sumdim": [2, 3]}
    return all(list(getattr(node, f"_saved_{name}")) == axes for name, axes in saved.items())


@rule("Trilinear")
def trilinear(out: Output) -> list[AnyLayout | None]:
    """The first axis of the output is a sample's in the first and the last input, as ``bilinear`` has it."""
    layout = out.layout
    if layout.axes != [0] or not is_bilinear(out.node):
        raise Unknown
    return out.each(lambda k: None if k == 1 else layout.moved([0, *[None] * (len(out.input_shape(k)) - 1)]))


@rule("Convolution")
def convolution(out: Output) -> list[AnyLayout | None]:
    layout = out.layout
    if not layout.occupies(range(1, len(out.shape))):
        return [layout]
    if not isinstance(layout, Layout) or layout.axis != 1:
        raise Unknown
    # Samples are groups of channels.
    groups = out.saved("groups")
    outputs = out.shape[1] // groups
    inputs = out.saved("input").shape[1] // groups
    if layout.inner % outputs:
        raise Unknown
    inner = layout.inner // outputs
    weight = Layout(layout.n, 0, layout.outer, inner * (inputs if out.saved("transposed") else outputs))
    return [Layout(layout.n, 1, layout.outer, inner * inputs), weight, Layout(layout.n, 0, layout.outer, layout.inner)]


@rule("Embedding")
def embedding(out: Output) -> None:
    """A row of the table may be looked up by several samples."""


@rule("EmbeddingBag")
def embedding_bag(out: Output) -> None:
    if any(other is not None for other, _ in out.edges[1:]):
        raise Unknown
