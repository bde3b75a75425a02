"""The quantities that a backward pass can compute."""

from backpack.extensions.batch_diag_ggn import BatchDiagGGNExact, BatchDiagGGNMC
from backpack.extensions.batch_diag_hessian import BatchDiagHessian
from backpack.extensions.batch_dot_grad import BatchDotGrad
from backpack.extensions.batch_grad import BatchGrad
from backpack.extensions.batch_l2_grad import BatchL2Grad
from backpack.extensions.clipped_grad import ClippedGrad
from backpack.extensions.diag_ggn import DiagGGNExact, DiagGGNMC
from backpack.extensions.diag_hessian import DiagHessian, DiagHessianMC
from backpack.extensions.ekfac import EKFAC
from backpack.extensions.gauss_newton_step import GaussNewtonStep
from backpack.extensions.ggn_gram import GGNGram
from backpack.extensions.hbp import HBP
from backpack.extensions.kfac import KFAC
from backpack.extensions.kflr import KFLR
from backpack.extensions.kfra import KFRA
from backpack.extensions.matrix_products import GGNMP, HMP, PCHMP
from backpack.extensions.projected_grad import ProjectedGrad
from backpack.extensions.sqrt_ggn import SqrtGGNExact, SqrtGGNMC
from backpack.extensions.sum_grad_squared import SumGradSquared
from backpack.extensions.variance import Variance
from backpack.extensions.weighted_grad import WeightedGrad

__all__ = [
    "BatchDiagGGNExact",
    "BatchDiagGGNMC",
    "BatchDiagHessian",
    "BatchDotGrad",
    "BatchGrad",
    "BatchL2Grad",
    "ClippedGrad",
    "DiagGGNExact",
    "DiagGGNMC",
    "DiagHessian",
    "DiagHessianMC",
    "GGNGram",
    "GaussNewtonStep",
    "GGNMP",
    "EKFAC",
    "HBP",
    "HMP",
    "KFAC",
    "KFLR",
    "KFRA",
    "PCHMP",
    "ProjectedGrad",
    "SqrtGGNExact",
    "SqrtGGNMC",
    "SumGradSquared",
    "Variance",
    "WeightedGrad",
]


def __dir__() -> list[str]:
    return list(__all__)
