"""
Training with Kronecker factors
===============================

An autoencoder of real digits, trained with steps that Kronecker factors precondition, and with plain ones. Both take
momentum steps on the same batches, with the best learning rate of a few. Compared are the steps, and the seconds, until
the mean squared error of all digits is below a target.
"""

from time import perf_counter

import matplotlib.pyplot as plt
import torch
from torch import nn

from backpack import backpack, disable, extend
from backpack.extensions import KFAC
from backpack.utils.examples import load_one_batch_mnist
from backpack.utils.kroneckers import apply_kfac_mat_prod, inv_kfacs, pi_damping

SIZES = (196, 100, 50, 12, 50, 100, 196)
BATCH, STEPS, EVERY, TARGET = 250, 1000, 10, 0.017
DAMPING, MEMORY, MOMENTUM, LENGTH = 1e-3, 0.9, 0.9, 0.03

images, _ = load_one_batch_mnist(1000, shuffle=False)
pixels = nn.functional.avg_pool2d(images * 0.3081 + 0.1307, 2).flatten(1)  # 14 x 14, from 0 to 1


class Kronecker:
    """Preconditions gradients with the damped inverses of averaged factors."""

    def __init__(self):
        self.factors, self.inverses = {}, {}

    def update(self, parameters):
        for p in parameters:
            old = self.factors.get(p, p.kfac)
            self.factors[p] = [MEMORY * a + (1 - MEMORY) * b for a, b in zip(old, p.kfac, strict=True)]
            self.inverses[p] = inv_kfacs(self.factors[p], pi_damping(self.factors[p], DAMPING))

    def __call__(self, p):
        return apply_kfac_mat_prod(self.inverses[p], p.grad.flatten()).reshape(p.shape)


def train(rate, kronecker):
    """Steps and seconds until the target is reached, infinitely many where it is not; the errors on the way."""
    torch.manual_seed(0)
    layers = [layer for a, b in zip(SIZES, SIZES[1:], strict=False) for layer in (nn.Linear(a, b), nn.Tanh())]
    model, lossfunc = extend(nn.Sequential(*layers[:-1])), extend(nn.MSELoss())
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM)
    precondition = Kronecker()
    seconds, errors = 0.0, []
    for number in range(STEPS):
        start = perf_counter()
        X = pixels[torch.randperm(len(pixels))[:BATCH]]
        optimizer.zero_grad()
        if kronecker and number % EVERY == 0:
            loss = lossfunc(model(X), X)
            with backpack(KFAC()):
                loss.backward()
            precondition.update(parameters)
        else:
            with disable():
                lossfunc(model(X), X).backward()
        if kronecker:
            steps = [precondition(p) for p in parameters]
            # The step's length in the metric of the curvature is bounded, since far away the curvature is another one.
            length = rate * sum((p.grad * step).sum() for p, step in zip(parameters, steps, strict=True)).sqrt().item()
            for p, step in zip(parameters, steps, strict=True):
                p.grad = step * min(1.0, LENGTH / length)
        optimizer.step()
        seconds += perf_counter() - start
        if number % 5 == 4:
            with torch.no_grad():
                error = lossfunc(model(pixels), pixels).item()
            errors.append(error)
            if error < TARGET:
                return number + 1, seconds, errors
            if not error < 1:
                break
    return float("inf"), float("inf"), errors


# %%
# Of the learning rates 3, 6 and 8, and of 0.05, 0.1 and 0.2, these need the fewest steps.

steps, seconds, plain = train(6.0, kronecker=False)
fewer, less, preconditioned = train(0.05, kronecker=True)
print(f"plain:          {steps:4} steps, {seconds:5.2f} s (inf: not within {STEPS} steps)")
print(f"preconditioned: {fewer:4} steps, {less:5.2f} s")
print(f"Fewer steps with Kronecker factors? {fewer < steps}")

figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
for label, errors in (("plain", plain), ("preconditioned", preconditioned)):
    axis.plot(range(5, 5 * len(errors) + 5, 5), errors, label=label)
axis.axhline(TARGET, color="black", linestyle="--", linewidth=0.8, label="target")
axis.set(xlabel="step", ylabel="mean squared error of all digits", yscale="log")
axis.legend()
plt.show()
