"""What a kind of node, its shapes and the numbers that it saved prove about the samples in its inputs.

A rule is given where the samples lie in the output of a function, and says where they lie in each input: an input's
entry belongs to a sample if its cotangent comes from entries of that sample alone. Nothing is computed. Nodes without
a rule are left to the coded pass (``coded_pass.py``).
"""

from backpack.samples.layout_rules import axes, elementwise, indexing, layers, losses, products  # noqa: F401 (their rules)
from backpack.samples.layout_rules.elementwise import broadcast_from
from backpack.samples.layout_rules.products import is_bilinear
from backpack.samples.layout_rules.registry import RULES, Unknown, input_layouts, sum_rows, summed_edge

__all__ = ["RULES", "Unknown", "broadcast_from", "input_layouts", "is_bilinear", "sum_rows", "summed_edge"]
