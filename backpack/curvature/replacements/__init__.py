"""Forward passes that can be differentiated twice: fused functions are replaced by others that compute the same."""

from backpack.curvature.replacements import attention, normalization, recurrent
from backpack.curvature.replacements.twice_differentiable import RightTwice, TwiceDifferentiable

__all__ = ["RightTwice", "TwiceDifferentiable", "attention", "normalization", "recurrent"]
