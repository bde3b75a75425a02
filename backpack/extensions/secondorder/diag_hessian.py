"""An import path of the original."""

from backpack.extensions.batch_diag_hessian import BatchDiagHessian as BatchDiagHessian
from backpack.extensions.diag_hessian import DiagHessian as DiagHessian
