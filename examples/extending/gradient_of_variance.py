"""
The gradient of the gradient variance
=====================================

With ``create_graph=True``, results are differentiable. This script adds the variance of
the individual gradients to the loss as a penalty, so that training prefers parameters
at which the samples agree.
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
X, y = (
    ((X - X.mean(0)) / X.std(0))[:256],
    torch.tensor(data.target, dtype=torch.float64)[:256, None],
)


def make_model() -> Sequential:
    torch.manual_seed(0)
    return extend(Sequential(Linear(30, 16), Tanh(), Linear(16, 1)).double())


lossfunc = extend(BCEWithLogitsLoss())


def loss_and_variance(model: Sequential) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the total variance of the gradients, both differentiable."""
    loss = lossfunc(model(X), y)
    with backpack(Variance()):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss, len(X) ** 2 * sum(p.variance.sum() for p in model.parameters())


# %%
# Compare the gradient of the variance with a difference quotient along a random
# direction.

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
# Training with and without the penalty: at the same loss, the variance is lower.

figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
for weight in (0.0, 0.05):
    model, history = make_model(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(60):
        loss, variance = loss_and_variance(model)
        history.append((loss.item(), variance.item()))
        optimizer.zero_grad()
        (loss + weight * variance).backward()
        optimizer.step()
    axis.plot(*zip(*history, strict=True), ".-", label=f"penalty {weight}")
    loss, variance = history[-1]
    print(f"penalty {weight}: loss {loss:.3f}, variance {variance:.3f}")
axis.set(xlabel="loss", ylabel="variance of the gradients", xscale="log", yscale="log")
axis.set_xticks([0.1, 0.2, 0.5], ["0.1", "0.2", "0.5"])
axis.set_yticks([0.5, 1, 2], ["0.5", "1", "2"])
axis.minorticks_off()
axis.legend()
plt.show()
