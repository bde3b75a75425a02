"""PyTorch's recorded graph: its traversal, and what is known of its nodes."""

from backpack.graph.nodes import LEAF, VIEWS, call, count_outputs, is_complex, kind, shape_of, signed, variable_of
from backpack.graph.saved import forget_recomputed, is_recomputed, kept, regions, saved, tensor_names
from backpack.graph.saved_parameters import copy_saved_parameters
from backpack.graph.traversal import Edge, Graph, Incoming, edge_of, read

__all__ = [
    "LEAF",
    "VIEWS",
    "Edge",
    "Graph",
    "Incoming",
    "call",
    "copy_saved_parameters",
    "count_outputs",
    "edge_of",
    "forget_recomputed",
    "is_complex",
    "is_recomputed",
    "kept",
    "kind",
    "read",
    "regions",
    "saved",
    "shape_of",
    "signed",
    "tensor_names",
    "variable_of",
]
