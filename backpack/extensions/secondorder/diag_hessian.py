"""An import path of the original."""

from backpack.extensions.batch_diag_hessian import BatchDiagHessian
from backpack.extensions.diag_hessian import DiagHessian

__all__ = ["BatchDiagHessian", "DiagHessian"]
