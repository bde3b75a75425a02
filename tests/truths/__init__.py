"""What results are compared with: plain autograd, explicit Jacobians and Hessians.

Nothing here uses the package that is tested, but for the extensions whose results are looked at.
"""

from __future__ import annotations

from torch import Tensor


def close(found: Tensor, truth: Tensor, size: Tensor | float = 0.0, rtol: float = 1e-10) -> bool:
    """Equal up to rounding, measured by the largest entry of the truth (or ``size``, where terms cancel)."""
    found, truth = found.detach(), truth.detach()
    scale = max(float(truth.abs().max()), float(size), 1e-12) if truth.numel() else 1.0
    return found.shape == truth.shape and bool((found - truth).abs().max() <= rtol * scale if truth.numel() else True)
