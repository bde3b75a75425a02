"""Second order: columns of the loss Hessian are pulled back to the parameters."""

from backpack.curvature import averaged_hessian as averaged_hessian  # these files register passes
from backpack.curvature import gauss_newton as gauss_newton
from backpack.curvature import hessian as hessian
from backpack.curvature import products as products
from backpack.curvature.compute_curvature import compute_curvature, may_rerun_model

__all__ = ["compute_curvature", "may_rerun_model"]
