"""Forward passes that can be differentiated twice: fused functions are replaced by others that compute the same."""

from backpack.twice import attention, normalization, recurrent
from backpack.twice.mode import TwiceDifferentiable

__all__ = ["TwiceDifferentiable", "attention", "normalization", "recurrent"]
