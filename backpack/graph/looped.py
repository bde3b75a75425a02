"""Backward nodes through which seeds are pulled one by one.

For these, ``torch.vmap`` of the backward pass is wrong or an error (marked so), or a slow loop inside of PyTorch that
warns. The list is what a sweep over PyTorch's own operator database finds; ``tests/test_operators.py`` keeps it true.
What users' own functions do in their backward pass is not known: for them seeds are looped as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

LOOPED = frozenset(
    {
        "AsStridedScatterBackward",  # wrong
        "BatchNormWithUpdateBackward",
        "CdistBackward",  # wrong
        "CtcLossBackward",
        "CummaxBackward",
        "CumminBackward",
        "EmbeddingBagBackward",
        "FractionalMaxPool2DBackward",
        "FractionalMaxPool3DBackward",
        "GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked_no_reduction_defaultBackward",  # an error
        "LinalgHouseholderProductBackward",
        "MaskedScatterBackward",
        "MaskedSelectBackward",  # an error
        "MaxUnpool2DBackward",  # an error
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
        "SparseMmReduceImplBackward",
        "SparseSampledAddmmBackward",  # an error
        "TakeBackward",
        "ToSparseBackward",
        "TrilinearBackward",
        "UnfoldBackward",
        "UpsampleNearestExact1DBackward",
        "UpsampleNearestExact2DBackward",
        "UpsampleNearestExact3DBackward",
    }
)


Instead = Mapping[GradientEdge, GradientEdge | None]
"""Edges that others take the place of; ``None``: the graph ends there."""


def edges_from(edge: GradientEdge, instead: Instead | None = None) -> Iterator[GradientEdge]:
    """All edges of a graph, from this one on."""
    pending, visited, followed = [edge], set(), set()
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


def nodes(edge: GradientEdge, instead: Instead | None = None) -> list[Node]:
    """All nodes of a graph."""
    return list(dict.fromkeys(edge.node for edge in edges_from(edge, instead)))


def must_loop(graph: Iterable[Node]) -> bool:
    """Whether one of the nodes of a graph is such."""
    for node in graph:
        if node.name().removesuffix("_copy").rstrip("0123456789") in LOOPED or isinstance(node, BackwardCFunction):
            return True
    return False


def counts_backward_passes(edge: GradientEdge) -> bool:
    """Whether a graph is of ``DistributedDataParallel(static_graph=True)``, in its first backward pass.

    It would take the pull-back of seeds for that pass, and exchange gradients before they are there.
    """
    wrappers = [node.ddp_weakref() for node in nodes(edge) if node.name() == "_DDPSinkBackward"]  # type: ignore[attr-defined]
    return any(ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued for ddp in wrappers)
