"""
The gradient of the gradient variance
=====================================

Results are differentiable with ``backward(create_graph=True)``. Here the variance of the individual gradients becomes a
penalty: training then prefers parameters at which samples agree.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_breast_cancer
from torch.nn import BCEWithLogitsLoss, Linear, Sequential, Tanh

from backpack import backpack, extend
from backpack.extensions import Variance

torch.manual_seed(0)
data = load_breast_cancer()
X = torch.tensor(data.data)
X, y = ((X - X.mean(0)) / X.std(0))[:256], torch.tensor(data.target, dtype=torch.float64)[:256, None]


def make_model() -> Sequential:
    torch.manual_seed(0)
    return extend(Sequential(Linear(30, 16), Tanh(), Linear(16, 1)).double())


lossfunc = extend(BCEWithLogitsLoss())


def loss_and_variance(model: Sequential) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the sum over all parameters of the gradients' variance, both differentiable."""
    loss = lossfunc(model(X), y)
    with backpack(Variance()):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss, len(X) ** 2 * sum(p.variance.sum() for p in model.parameters())


# %%
# The gradient of the variance, compared with a difference quotient along a random direction.

model = make_model()
_, variance = loss_and_variance(model)
grads = torch.autograd.grad(variance, list(model.parameters()))
direction = [torch.randn_like(p) for p in model.parameters()]
slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True)).item()


def variance_at(step: float) -> float:
    moved = make_model()
    with torch.no_grad():
        for p, d in zip(moved.parameters(), direction, strict=True):
            p += step * d
    return loss_and_variance(moved)[1].item()


quotient = (variance_at(1e-5) - variance_at(-1e-5)) / 2e-5
print(f"derivative {slope:.8f}, difference quotient {quotient:.8f}")
assert abs(slope - quotient) < 1e-6 * abs(slope)

# %%
# Training without and with the penalty: the variance falls faster, at almost the same loss.

figure, axes = plt.subplots(2, 1, figsize=(5, 5.4), layout="constrained")
for weight in (0.0, 0.05):
    model, history = make_model(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(60):
        loss, variance = loss_and_variance(model)
        history.append((loss.item(), variance.item()))
        optimizer.zero_grad()
        (loss + weight * variance).backward()
        optimizer.step()
    for axis, values in zip(axes, zip(*history, strict=True), strict=True):
        axis.plot(values, label=f"penalty {weight}")
axes[0].set(xlabel="step", ylabel="loss", ylim=(0, None))
axes[1].set(xlabel="step", ylabel="variance of gradients", ylim=(0, None))
axes[0].legend()
plt.show()
