"""An import path of the original."""

from backpack.extensions.batch_diag_ggn import BatchDiagGGNExact, BatchDiagGGNMC
from backpack.extensions.diag_ggn import DiagGGNExact, DiagGGNMC

__all__ = ["BatchDiagGGNExact", "BatchDiagGGNMC", "DiagGGNExact", "DiagGGNMC"]
