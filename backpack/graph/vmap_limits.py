"""Backward nodes that ``torch.vmap`` does not take for several cotangents at a time.

PyTorch loops inside of these nodes, with a warning. For some of them the loop fails or is wrong, so that whole
pull-backs are looped; so they are for users' own functions, since nothing is known of their backward pass. The lists
are what a sweep over PyTorch's own operator database finds; ``tests/test_vmap_limits.py`` keeps them true.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from backpack.graph.nodes import kind

_WRONG = """
AsStridedScatter Cdist GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked_no_reduction_default
MaskedSelect MaxUnpool2D SparseMmReduceImpl SparseSampledAddmm ToSparse
"""
WRONG = frozenset(_WRONG.split())
"""Kinds of nodes for which the loop inside is not right, or not possible."""

_LOOPED = """
BatchNormWithUpdate CtcLoss Cummax Cummin EmbeddingBag FractionalMaxPool2D FractionalMaxPool3D
LinalgHouseholderProduct MaskedScatter Mish MkldnnRnnLayer MultiMarginLoss MultilabelMarginLoss Ormqr Pdist Put
RreluWithNoise ScaledDotProductFlashAttentionForCpu SegmentReduce SoftMarginLoss Take Trilinear Unfold
UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D
"""
LOOPED = WRONG | frozenset(_LOOPED.split())

Instead = Mapping[GradientEdge, GradientEdge | None]
"""Edges that others take the place of; ``None``: the graph ends there."""


def nodes(starts: Iterable[GradientEdge], instead: Instead | None = None) -> list[Node]:
    """All nodes of a graph, from these edges on."""
    instead, pending = instead or {}, list(starts)
    found: dict[Node, None] = {}
    while pending:
        edge = pending.pop()
        taken = instead.get(edge, edge)
        if taken is not None and taken.node not in found:
            found[taken.node] = None
            pending += [GradientEdge(node, number) for node, number in taken.node.next_functions if node is not None]
    return list(found)


def is_looped(node: Node) -> bool:
    """Whether a node is looped over by PyTorch, or has to be."""
    return kind(node) in LOOPED or _is_custom(node)


def must_loop(graph: Iterable[Node]) -> bool:
    """Whether pull-backs through one of the nodes of a graph are looped as a whole."""
    return any(kind(node) in WRONG or _is_custom(node) for node in graph)


def _is_custom(node: Node) -> bool:
    """Whether a node is of a custom function that does not say that its ``backward`` is for ``torch.vmap`` as well."""
    return isinstance(node, BackwardCFunction) and not getattr(node._forward_cls, "takes_several", False)


def counts_backward_passes(edge: GradientEdge) -> bool:
    """Whether a graph is that of ``DistributedDataParallel(static_graph=True)`` in its first backward pass.

    That wrapper would take the pull-back of seeds for its first pass, and exchange gradients before they are there.
    """
    wrappers = [node.ddp_weakref() for node in nodes([edge]) if node.name() == "_DDPSinkBackward"]  # type: ignore[attr-defined]
    return any(ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued for ddp in wrappers)
