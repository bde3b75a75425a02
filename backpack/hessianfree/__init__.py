"""Products with Jacobians, Hessians, Gauss-Newton and Fisher matrices of any computation, all returned as tuples."""

from backpack.curvature.replacements import TwiceDifferentiable
from backpack.hessianfree.fvp import fisher_vector_product
from backpack.hessianfree.ggnvp import ggn_vector_product, ggn_vector_product_from_plist
from backpack.hessianfree.hvp import hessian_vector_product
from backpack.hessianfree.lop import L_op, transposed_jacobian_vector_product
from backpack.hessianfree.rop import R_op, jacobian_vector_product

__all__ = [
    "L_op",
    "R_op",
    "TwiceDifferentiable",
    "fisher_vector_product",
    "ggn_vector_product",
    "ggn_vector_product_from_plist",
    "hessian_vector_product",
    "jacobian_vector_product",
    "transposed_jacobian_vector_product",
]
