"""Backward nodes that ``torch.vmap`` does not take for several cotangents at a time.

PyTorch loops inside of these nodes, with a warning; some are wrong or an error, so that whole pull-backs are looped.
The list is what a sweep over PyTorch's own operator database finds; ``tests/test_operators.py`` keeps it true. What
users' own functions do in their backward pass is not known: for them whole pull-backs are looped as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

WRONG = frozenset(
    {
        "AsStridedScatterBackward",
        "CdistBackward",
        "GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked_no_reduction_defaultBackward",
        "MaskedSelectBackward",
        "MaxUnpool2DBackward",
        "SparseMmReduceImplBackward",
        "SparseSampledAddmmBackward",
        "ToSparseBackward",
    }
)
"""Nodes for which the loop inside is not right, or not possible."""

LOOPED = WRONG | frozenset(
    {
        "BatchNormWithUpdateBackward",
        "CtcLossBackward",
        "CummaxBackward",
        "CumminBackward",
        "EmbeddingBagBackward",
        "FractionalMaxPool2DBackward",
        "FractionalMaxPool3DBackward",
        "LinalgHouseholderProductBackward",
        "MaskedScatterBackward",
        "MishBackward",
        "MkldnnRnnLayerBackward",
        "MultiMarginLossBackward",
        "MultilabelMarginLossBackward",
        "OrmqrBackward",
        "PdistBackward",
        "PutBackward",
        "RreluWithNoiseBackward",
        "ScaledDotProductFlashAttentionForCpuBackward",
        "SegmentReduceBackward",
        "SoftMarginLossBackward",
        "TakeBackward",
        "TrilinearBackward",
        "UnfoldBackward",
        "UpsampleNearestExact1DBackward",
        "UpsampleNearestExact2DBackward",
        "UpsampleNearestExact3DBackward",
    }
)

Instead = Mapping[GradientEdge, GradientEdge | None]
"""Edges that others take the place of; ``None``: the graph ends there."""


def _edges(starts: Iterable[GradientEdge], instead: Instead | None = None) -> Iterator[GradientEdge]:
    """All edges of a graph, from these on."""
    pending, visited, followed = list(starts), set(), set()
    while pending:
        edge = pending.pop()
        if instead and edge in instead:
            taken = instead[edge]
            if taken is None:
                continue
            edge = taken
        if edge not in visited:
            visited.add(edge)
            yield edge
            if edge.node not in followed:
                followed.add(edge.node)
                pending += [GradientEdge(node, number) for node, number in edge.node.next_functions if node is not None]


def nodes(starts: Iterable[GradientEdge], instead: Instead | None = None) -> list[Node]:
    """All nodes of a graph, from these edges on."""
    return list(dict.fromkeys(edge.node for edge in _edges(starts, instead)))


def _name(node: Node) -> str:
    return node.name().removesuffix("_copy").rstrip("0123456789")


def is_looped(node: Node) -> bool:
    """Whether a node is looped over by PyTorch, or has to be."""
    return _name(node) in LOOPED or isinstance(node, BackwardCFunction)


def must_loop(graph: Iterable[Node]) -> bool:
    """Whether pull-backs through one of the nodes of a graph are looped as a whole."""
    return any(_name(node) in WRONG or isinstance(node, BackwardCFunction) for node in graph)


def counts_backward_passes(edge: GradientEdge) -> bool:
    """Whether a graph is of ``DistributedDataParallel(static_graph=True)``, in its first backward pass.

    It would take the pull-back of seeds for that pass, and exchange gradients before they are there.
    """
    wrappers = [node.ddp_weakref() for node in nodes([edge]) if node.name() == "_DDPSinkBackward"]  # type: ignore[attr-defined]
    return any(ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued for ddp in wrappers)
