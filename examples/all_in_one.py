"""
All in one
==========

Every extension in one script: pass what is wanted to ``backpack(...)``, run ``backward()``, and read results from the
parameters.
"""

import torch
from torch.nn import CrossEntropyLoss, Flatten, Linear, Module, Sequential

from backpack import backpack, extend
from backpack.extensions import (
    EKFAC,
    GGNMP,
    HBP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    DiagHessianMC,
    GGNGram,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.utils.examples import load_one_batch_mnist
from backpack.utils.kroneckers import Eigen

torch.manual_seed(0)
X, y = load_one_batch_mnist(batch_size=32)
model: Module = extend(Sequential(Flatten(), Linear(784, 10)))
lossfunc = extend(CrossEntropyLoss())


def show(*extensions: BackpropExtension) -> None:
    """One forward and backward pass, and what the extensions left on the parameters."""
    loss = lossfunc(model(X), y)
    with backpack(*extensions):
        loss.backward()
    for extension in extensions:
        for name, p in model.named_parameters():
            value = getattr(p, extension.savefield)
            if isinstance(value, list | Eigen):
                what = [list(factor.shape) for factor in (value if isinstance(value, list) else value.bases)]
            else:
                what = "a function" if callable(value) else list(value.shape)
            print(f"{type(extension).__name__:18} {name:9} .{extension.savefield:20} {what}")


# %%
# First order
# -----------
#
# Of the individual gradients: themselves, their squared norms, dot products, second moment, variance, and the sum of
# them with each clipped to a norm. Results of one pass share what they have in common.

show(BatchGrad(), BatchL2Grad(), BatchDotGrad(), SumGradSquared(), Variance(), ClippedGrad(max_norm=0.1))

# %%
# Second order
# ------------
#
# Of the generalized Gauss-Newton matrix (GGN): its diagonal, that of each sample's term, a root of it, and the root's
# Gram matrix. ``Exact`` pulls back a column for each output of the model, ``MC`` as many as are sampled.

show(DiagGGNExact(), BatchDiagGGNExact(), SqrtGGNExact(), GGNGram())
show(DiagGGNMC(mc_samples=2), BatchDiagGGNMC(mc_samples=2), SqrtGGNMC(mc_samples=2))

# %%
# The diagonal of the Hessian, which for this linear model is that of the GGN; Kronecker factors; and functions that
# multiply with a parameter's block of the Hessian, the GGN, and the Hessian without its negative curvature.

show(DiagHessian(), BatchDiagHessian(), DiagHessianMC())
show(KFAC(mc_samples=2), KFLR(), KFRA(), HBP("ggn", "exact", "sqrt", "E[J^T E(H) J]"), EKFAC())
show(HMP(), GGNMP(), PCHMP())

# %%
# Both at once, each on samples of its own
# ----------------------------------------

show(BatchGrad(subsampling=[0, -1]), DiagGGNExact(subsampling=range(8)), Variance())

# %%
# A few relations between them
# ----------------------------
#
# Each pass overwrites the results of the one before; ``p.grad`` is accumulated, as always.

model.zero_grad()
loss = lossfunc(model(X), y)
with backpack(BatchGrad(), BatchL2Grad(), SumGradSquared(), BatchDiagGGNExact(), DiagGGNExact(), SqrtGGNExact()):
    loss.backward()
for p in model.parameters():
    assert torch.allclose(p.grad_batch.sum(0), p.grad, atol=1e-6)
    assert torch.allclose(p.grad_batch.flatten(1).square().sum(1), p.batch_l2, rtol=1e-4)
    assert torch.allclose(p.grad_batch.square().sum(0), p.sum_grad_squared, atol=1e-6)
    assert torch.allclose(p.diag_ggn_exact_batch.sum(0), p.diag_ggn_exact, atol=1e-6)
    assert torch.allclose(p.sqrt_ggn_exact.square().sum((0, 1)), p.diag_ggn_exact, atol=1e-6)
