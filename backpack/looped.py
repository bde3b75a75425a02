"""Backward nodes through which seeds are pulled one by one.

For these, ``torch.vmap`` of the backward pass is wrong or an error (marked so), or a slow loop inside of PyTorch that
warns. The list is what a sweep over PyTorch's own operator database finds; ``tests/test_operators.py`` keeps it true.
What users' own functions do in their backward pass is not known: for them seeds are looped as well.
"""

from __future__ import annotations

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


def must_loop(edge: GradientEdge) -> bool:
    """Whether a graph holds such a node."""
    pending: list[Node | None] = [edge.node]
    visited = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in visited:
            if isinstance(node, BackwardCFunction):
                return True
            if node.name().removesuffix("_copy").rstrip("0123456789") in LOOPED:
                return True
            visited.add(node)
            pending += [following for following, _ in node.next_functions]
    return False
