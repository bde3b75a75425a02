"""Second derivatives of single nodes of a recorded graph: what the Gauss-Newton matrix leaves out of the Hessian."""

from backpack.curvature.residuals.local import LocalHessian, Severed
from backpack.curvature.residuals.nodes import (
    WRONG_THIRD,
    base_name,
    is_batch_norm,
    is_bilinear,
    is_flat,
    is_fused_node,
    positions_of,
)
from backpack.curvature.residuals.residual import Blocks, Pairs, Residual, count_columns, residual_of

__all__ = [
    "WRONG_THIRD",
    "Blocks",
    "LocalHessian",
    "Pairs",
    "Residual",
    "Severed",
    "base_name",
    "count_columns",
    "is_batch_norm",
    "is_bilinear",
    "is_flat",
    "is_fused_node",
    "positions_of",
    "residual_of",
]
