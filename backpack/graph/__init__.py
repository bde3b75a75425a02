"""PyTorch's recorded graph: its traversal, and what is known of its nodes."""

from backpack.graph.nodes import LEAF, call, count_outputs, kind, shape_of, variable_of
from backpack.graph.saved import is_recomputed, saved, tensor_names
from backpack.graph.traversal import Graph, Incoming, read

__all__ = [
    "LEAF",
    "Graph",
    "Incoming",
    "call",
    "count_outputs",
    "is_recomputed",
    "kind",
    "read",
    "saved",
    "shape_of",
    "tensor_names",
    "variable_of",
]
