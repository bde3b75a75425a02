"""How PyTorch's functions use their parameters: one family of functions a file."""

from backpack.operations import arithmetic, convolution, embedding, linear, normalization, recurrent
from backpack.operations.registry import EXPANDED, RULES, Operation, rule

__all__ = [
    "EXPANDED",
    "RULES",
    "Operation",
    "arithmetic",
    "convolution",
    "embedding",
    "linear",
    "normalization",
    "recurrent",
    "rule",
]
