"""Import paths of the original that scripts use: quantities of second order."""

from backpack.extensions.batch_diag_ggn import BatchDiagGGNExact, BatchDiagGGNMC
from backpack.extensions.batch_diag_hessian import BatchDiagHessian
from backpack.extensions.diag_ggn import DiagGGNExact, DiagGGNMC
from backpack.extensions.diag_hessian import DiagHessian, DiagHessianMC
from backpack.extensions.hbp import HBP
from backpack.extensions.kfac import KFAC
from backpack.extensions.kflr import KFLR
from backpack.extensions.kfra import KFRA
from backpack.extensions.matrix_products import GGNMP, HMP, PCHMP
from backpack.extensions.sqrt_ggn import SqrtGGNExact, SqrtGGNMC

__all__ = [
    "BatchDiagGGNExact",
    "BatchDiagGGNMC",
    "BatchDiagHessian",
    "DiagGGNExact",
    "DiagGGNMC",
    "DiagHessian",
    "DiagHessianMC",
    "GGNMP",
    "HBP",
    "HMP",
    "KFAC",
    "KFLR",
    "KFRA",
    "PCHMP",
    "SqrtGGNExact",
    "SqrtGGNMC",
]
