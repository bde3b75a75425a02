"""Which nodes are linear in an input, and which parameters enter a graph linearly."""

from __future__ import annotations

from torch.autograd.graph import GradientEdge, Node

from backpack.backward.collector import Prepared
from backpack.backward.plan import PlannedUse
from backpack.curvature.masked_entries import keep_apart
from backpack.curvature.residual_graph import zero_outputs
from backpack.curvature.residuals.local import LocalHessian
from backpack.curvature.residuals.nodes import is_flat
from backpack.curvature.spliced_graph import SplicedGraph
from backpack.graph import Graph, is_complex

NORMALIZATIONS = ("NativeLayerNorm", "NativeGroupNorm", "NativeBatchNorm", "CudnnBatchNorm", "FusedRmsNorm")
"""How the names of nodes begin that are linear in their parameters, which are all but the first input."""

LINEAR = ("Trilinear", "Embedding", "AccumulateGrad")
"""How the names of nodes begin that are linear in each input."""


def is_linear(node: Node, k: int) -> bool:
    """Whether a node's output is linear in its input ``k`` alone."""
    following, number = node.next_functions[k]
    assert following is not None
    if is_flat(node, 1) or node.name().startswith(LINEAR) or (k and node.name().startswith(NORMALIZATIONS)):
        return True
    try:
        return LocalHessian(node, [GradientEdge(following, number)], zero_outputs(node)).is_zero()
    except RuntimeError:
        return False


def inputs_of(node: Node, graph: Graph) -> list[int]:
    """The numbers of a node's edges that lead on."""
    return [k for k, (other, _) in enumerate(graph.edges[node]) if other is not None]


def linear_leaves(spliced: SplicedGraph, prepared: Prepared) -> set[Node]:
    """The nodes of parameters that enter the graph once, linearly, and by samples.

    Parameters below complex functions that are not linear, or below functions that couple samples in second order, are
    left out.
    """
    plan, graph = prepared.plan, prepared.graph
    found: set[Node] = set()
    left_out = _below(keep_apart(spliced, prepared) | _curved_complex(prepared), graph)
    for node, uses in plan.uses.items():
        for planned in uses if node not in left_out else ():
            if not is_linear(node, planned.k):
                continue
            leaves = [planned.leaf] if planned.leaf is not None else _behind_linear(planned, prepared)
            found.update(leaf for leaf in leaves if plan.expected.get(leaf) == 1)
    return found


def _behind_linear(planned: PlannedUse, prepared: Prepared) -> list[Node]:
    """The parameters behind an edge on whom what it leads to depends linearly, in one way."""
    assert planned.entry is not None
    plan, (entry, _), graph = prepared.plan, planned.entry, prepared.graph
    users = sum(other.entry is not None and other.entry[0] is entry for uses in plan.uses.values() for other in uses)
    if entry in plan.mixed or planned.sent is not None or users > 1:
        return []
    found: list[Node] = []
    for leaf in plan.entries[entry]:
        node = entry
        while node is not leaf:
            leading = inputs_of(node, graph)
            if len(leading) != 1 or not is_linear(node, leading[0]):
                break
            node = graph.edges[node][leading[0]][0]
        else:
            found.append(leaf)
    return found


def _curved_complex(prepared: Prepared) -> set[Node]:
    """Nodes of complex numbers that are not linear: their second derivatives are of two real parts each."""
    return {
        node
        for node in prepared.owners.sends
        if is_complex(node) and not is_flat(node, sum(other is not None for other, _ in node.next_functions))
    }


def _below(nodes: set[Node], graph: Graph) -> set[Node]:
    """All nodes below some of a graph."""
    return set(graph.behind(other for node in nodes for other, _ in graph.inputs_of(node)))
