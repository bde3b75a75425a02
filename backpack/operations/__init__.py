"""How PyTorch's functions use their parameters: one family of functions a file."""

from backpack.operations import arithmetic, attention, convolution, embedding, linear, normalization, recurrent
from backpack.operations.registry import EXPANDED, REPLACED, RULES, Operation, rule

__all__ = [
    "EXPANDED",
    "REPLACED",
    "RULES",
    "Operation",
    "arithmetic",
    "attention",
    "convolution",
    "embedding",
    "linear",
    "normalization",
    "recurrent",
    "rule",
]
