"""Import paths of the original that scripts use: quantities of second order."""

from backpack.extensions.batch_diag_ggn import BatchDiagGGNExact as BatchDiagGGNExact
from backpack.extensions.batch_diag_ggn import BatchDiagGGNMC as BatchDiagGGNMC
from backpack.extensions.batch_diag_hessian import BatchDiagHessian as BatchDiagHessian
from backpack.extensions.diag_ggn import DiagGGNExact as DiagGGNExact
from backpack.extensions.diag_ggn import DiagGGNMC as DiagGGNMC
from backpack.extensions.diag_hessian import DiagHessian as DiagHessian
from backpack.extensions.diag_hessian import DiagHessianMC as DiagHessianMC
from backpack.extensions.hbp import HBP as HBP
from backpack.extensions.kfac import KFAC as KFAC
from backpack.extensions.kflr import KFLR as KFLR
from backpack.extensions.kfra import KFRA as KFRA
from backpack.extensions.matrix_products import GGNMP as GGNMP
from backpack.extensions.matrix_products import HMP as HMP
from backpack.extensions.matrix_products import PCHMP as PCHMP
from backpack.extensions.sqrt_ggn import SqrtGGNExact as SqrtGGNExact
from backpack.extensions.sqrt_ggn import SqrtGGNMC as SqrtGGNMC
