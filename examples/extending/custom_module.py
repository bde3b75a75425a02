"""
Modules of your own
===================

BackPACK works with modules that it has never seen. This script defines a layer of
radial basis functions with learned centres and widths, and uses it without any
preparation. Then it shows how to tell an extension a better way to compute its result
for the layer.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor
from torch.nn import Linear, Module, MSELoss, Parameter, Sequential

from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact, Variance
from backpack.extensions.firstorder.base import FirstOrderModuleExtension


class Radial(Module):
    """``exp(-width * |x - centre|^2)`` for each centre."""

    def __init__(self, inputs: int, centres: int) -> None:
        super().__init__()
        self.centres = Parameter(torch.randn(centres, inputs))
        self.log_width = Parameter(torch.full((centres,), -2.0))

    def forward(self, x: Tensor) -> Tensor:
        distances = (x[:, None] - self.centres).square().sum(2)
        return (-self.log_width.exp() * distances).exp()


torch.manual_seed(0)
data = load_diabetes()
X = torch.tensor(data.data[:, 2:4])  # body mass index, blood pressure
y = torch.tensor(data.target)[:, None]
X, y = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
model = extend(Sequential(Radial(2, 8), Linear(8, 1)).double())
lossfunc = extend(MSELoss())

loss = lossfunc(model(X), y)
with backpack(BatchGrad(), Variance(), DiagGGNExact()):
    loss.backward()
for name, p in model.named_parameters():
    shapes = [list(v.shape) for v in (p.grad_batch, p.variance, p.diag_ggn_exact)]
    print(f"{name:12} {shapes[0]!s:13} {shapes[1]!s:8} {shapes[2]}")

# %%
# Plain autograd gives the same for one sample.

alone = lossfunc(model(X[:1]), y[:1]) / len(X)
for p, expected in zip(
    model.parameters(),
    torch.autograd.grad(alone, list(model.parameters())),
    strict=True,
):
    assert torch.allclose(p.grad_batch[0], expected)

# %%
# A rule of your own
# ------------------
#
# A rule replaces what an extension computes for one class of modules. It reads the
# module's inputs and output and the gradient ``g_out`` with respect to the output, and
# returns the result.


class RadialBatchGrad(FirstOrderModuleExtension):
    def __init__(self) -> None:
        super().__init__(params=["log_width"])

    def log_width(self, ext, module, g_inp, g_out, bpQuantities) -> Tensor:
        out = module.output
        return g_out[0] * out * out.log()  # the output is exp(-exp(log_width) d)


by_rule = BatchGrad()
by_rule.set_module_extension(Radial, RadialBatchGrad())
built_in = model[0].log_width.grad_batch
loss = lossfunc(model(X), y)
with backpack(by_rule):
    loss.backward()
assert torch.allclose(model[0].log_width.grad_batch, built_in)

# %%
# Training
# --------
#
# Each step is divided by the curvature. The colours of the picture show what the model
# predicts: the progression of diabetes within a year.

for _ in range(60):
    loss = lossfunc(model(X), y)
    model.zero_grad()
    with backpack(DiagGGNExact()):
        loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.2 * p.grad / (p.diag_ggn_exact + 1e-2)
print(f"mean squared error {loss.item():.3f} (1 for a constant)")
assert loss < 0.75

points = torch.linspace(-3, 4, 60, dtype=torch.float64)
with torch.no_grad():
    prediction = model(torch.cartesian_prod(points, points)).reshape(60, 60).T
figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
filled = axis.contourf(
    points.numpy(), points.numpy(), prediction.numpy(), 12, cmap="RdBu_r"
)
axis.plot(*X.T.numpy(), ".", color="black", markersize=2, label="patients")
axis.plot(*model[0].centres.detach().T.numpy(), "x", color="gold", label="centres")
axis.set(
    xlim=(-3, 4),
    ylim=(-3, 4),
    xlabel="body mass index",
    ylabel="blood pressure",
    title="(standardized)",
)
axis.legend()
figure.colorbar(filled, label="predicted progression")
plt.show()
