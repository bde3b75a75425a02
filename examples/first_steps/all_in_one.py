"""
All in one
==========

Every extension in one script. Pass those that you want to ``backpack(...)``, call
``backward()``, and read the results from the parameters.
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
    GaussNewtonStep,
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
    """Run one forward and one backward pass, and print the shapes of the results."""
    loss = lossfunc(model(X), y)
    with backpack(*extensions):
        loss.backward()
    for extension in extensions:
        for name, p in model.named_parameters():
            value = getattr(p, extension.savefield)
            if isinstance(value, list | Eigen):
                what = [
                    list(factor.shape)
                    for factor in (value if isinstance(value, list) else value.bases)
                ]
            else:
                what = "a function" if callable(value) else list(value.shape)
            kind, field = type(extension).__name__, extension.savefield
            print(f"{kind:18} {name:9} .{field:20} {what}")


# %%
# First order
# -----------
#
# Individual gradients, their squared norms, dot products, sum of squares and variance,
# and the sum of the clipped gradients. Extensions in one pass share their computations.

show(
    BatchGrad(),
    BatchL2Grad(),
    BatchDotGrad(),
    SumGradSquared(),
    Variance(),
    ClippedGrad(max_norm=0.1),
)

# %%
# Second order
# ------------
#
# The generalized Gauss-Newton matrix (GGN): its diagonal, the diagonal of each sample's
# term, a square root of it, and the root's Gram matrix. ``Exact`` needs one column for
# each output of the model, ``MC`` only as many as you ask for. Then a damped step.

show(DiagGGNExact(), BatchDiagGGNExact(), SqrtGGNExact(), GGNGram())
show(GaussNewtonStep(damping=0.1))
show(DiagGGNMC(mc_samples=2), BatchDiagGGNMC(mc_samples=2), SqrtGGNMC(mc_samples=2))

# %%
# The diagonal of the Hessian, which for this linear model is that of the GGN. Then
# Kronecker factors. Last, functions that multiply with a parameter's block of the
# Hessian, of the GGN, and of the Hessian without its negative curvature.

show(DiagHessian(), BatchDiagHessian(), DiagHessianMC())
show(
    KFAC(mc_samples=2),
    KFLR(),
    KFRA(),
    HBP("ggn", "exact", "sqrt", "E[J^T E(H) J]"),
    EKFAC(),
)
show(HMP(), GGNMP(), PCHMP())

# %%
# Both orders in one pass
# -----------------------
#
# Each extension may have its own samples.

show(BatchGrad(subsampling=[0, -1]), DiagGGNExact(subsampling=range(8)), Variance())

# %%
# A few relations between them
# ----------------------------
#
# Each pass overwrites the results of the one before, while ``p.grad`` is accumulated as
# always in PyTorch.

model.zero_grad()
loss = lossfunc(model(X), y)
with backpack(
    BatchGrad(),
    BatchL2Grad(),
    SumGradSquared(),
    BatchDiagGGNExact(),
    DiagGGNExact(),
    SqrtGGNExact(),
):
    loss.backward()
for p in model.parameters():
    assert torch.allclose(p.grad_batch.sum(0), p.grad, atol=1e-6)
    assert torch.allclose(
        p.grad_batch.flatten(1).square().sum(1), p.batch_l2, rtol=1e-4
    )
    assert torch.allclose(p.grad_batch.square().sum(0), p.sum_grad_squared, atol=1e-6)
    assert torch.allclose(p.diag_ggn_exact_batch.sum(0), p.diag_ggn_exact, atol=1e-6)
    assert torch.allclose(
        p.sqrt_ggn_exact.square().sum((0, 1)), p.diag_ggn_exact, atol=1e-6
    )
