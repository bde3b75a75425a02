"""
Differential privacy: DP-SGD
============================

DP-SGD (`Abadi et al., 2016 <https://arxiv.org/abs/1607.00133>`_) bounds what one sample can do to the model: each
individual gradient is clipped, and noise is added to their sum. ``ClippedGrad`` gives the clipped sum without storing
a single individual gradient.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch.nn import CrossEntropyLoss, Flatten, Linear, Sequential

from backpack import backpack, extend
from backpack.extensions import BatchGrad, ClippedGrad
from backpack.utils.examples import load_one_batch_mnist

torch.manual_seed(0)
X, y = load_one_batch_mnist(batch_size=1000)
X, y, X_test, y_test = X[:800], y[:800], X[800:], y[800:]
lossfunc = extend(CrossEntropyLoss())

# %%
# The norm is over all parameters. With a loss that averages over N samples, each gradient carries 1/N; a bound on the
# gradient of a sample's own loss is divided by N accordingly. The gradient itself is not needed: to differentiate the
# loss by the model's output only leaves it out.

BOUND, STEPS, RATE = 1.0, 30, 2.0


def model_trained_with(noise: float) -> tuple[Sequential, float]:
    """A model and its accuracy on the test digits."""
    torch.manual_seed(1)
    model = extend(Sequential(Flatten(), Linear(784, 10)))
    for _ in range(STEPS):
        output = model(X)
        loss = lossfunc(output, y)
        with backpack(ClippedGrad(max_norm=BOUND / len(X))):
            torch.autograd.grad(loss, output)
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * (p.grad_clipped + noise * BOUND / len(X) * torch.randn_like(p))
    with torch.no_grad():
        return model, (model(X_test).argmax(1) == y_test).float().mean().item()


# %%
# All 800 samples take part in each step, so that the privacy is that of ``STEPS`` Gaussian mechanisms: their zero-
# concentrated privacy is ``rho = STEPS / (2 noise^2)``, which implies (epsilon, delta)-privacy
# (`Bun & Steinke, 2016 <https://arxiv.org/abs/1605.02065>`_, propositions 1.6 and 1.3).


def epsilon(noise: float, delta: float = 1e-5) -> float:
    rho = STEPS / (2 * noise**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


noises = [2.0, 5.0, 10.0, 20.0, 50.0, 100.0]
model, without_noise = model_trained_with(0.0)
accuracies = [model_trained_with(noise)[1] for noise in noises]
for noise, accuracy in zip(noises, accuracies, strict=True):
    print(f"noise {noise:5.0f}: epsilon {epsilon(noise):6.2f}, accuracy {accuracy:.2f}")

figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
axis.plot([epsilon(noise) for noise in noises], accuracies, "o-", label="DP-SGD")
axis.axhline(without_noise, color="black", linestyle="--", label="clipped, without noise")
axis.set(xscale="log", xlabel="epsilon (delta = 1e-5): less is more private", ylabel="test accuracy", ylim=(0, 1))
axis.legend()
plt.show()

# %%
# What ``ClippedGrad`` computes, in the plain way, for which all individual gradients have to be stored:

loss = lossfunc(model(X), y)
with backpack(BatchGrad(), ClippedGrad(max_norm=BOUND / len(X))):
    loss.backward()
norms = sum(p.grad_batch.flatten(1).square().sum(1) for p in model.parameters()).sqrt()
factor = (BOUND / len(X) / norms).clamp(max=1)
for p in model.parameters():
    assert torch.allclose(p.grad_clipped, torch.einsum("n,n...->...", factor, p.grad_batch), atol=1e-6)
print(f"{(factor < 1).float().mean():.0%} of the gradients were clipped.")
