"""
Gradient noise scale while training
===================================

How large should a batch be? About as large as the gradient noise scale: the variance of the individual gradients over
the squared norm of their mean (`McCandlish et al., 2018 <https://arxiv.org/abs/1812.06162>`_). It grows while training,
for samples that are understood agree less and less. Here it is estimated from the batches as they come,
at almost no cost.
"""

import matplotlib.pyplot as plt
import torch
from torch.nn import Conv2d, CrossEntropyLoss, Flatten, Linear, MaxPool2d, ReLU, Sequential

from backpack import backpack, extend
from backpack.extensions import Variance
from backpack.utils.examples import load_one_batch_mnist

torch.manual_seed(0)
X, y = load_one_batch_mnist(batch_size=1000)
layers = [Conv2d(1, 8, 5, 2), ReLU(), MaxPool2d(2), Flatten(), Linear(288, 32), ReLU(), Linear(32, 10)]
model, lossfunc = extend(Sequential(*layers)), extend(CrossEntropyLoss())
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)

# %%
# With N samples, ``variance`` is of gradients that carry 1/N, and divides by N: both estimates are made unbiased. They
# are averaged separately, for the mean of a ratio is not the ratio of means.

N = 50
history: list[tuple[float, float, float]] = []
for _ in range(8):
    for batch in torch.randperm(len(X)).split(N):
        optimizer.zero_grad()
        loss = lossfunc(model(X[batch]), y[batch])
        with backpack(Variance()):
            loss.backward()
        noise = N**2 * sum(p.variance.sum() for p in model.parameters()).item() * N / (N - 1)
        signal = sum(p.grad.square().sum() for p in model.parameters()).item() - noise / N
        history.append((loss.item(), noise, signal))
        optimizer.step()

loss, noise, signal = torch.tensor(history).T
kernel = torch.ones(20) / 20
noise, signal = (torch.nn.functional.conv1d(v[None, None], kernel[None, None])[0, 0] for v in (noise, signal))
scale = noise / signal.clamp(min=1e-4)

figure, axes = plt.subplots(2, 1, figsize=(5, 5.4), layout="constrained")
axes[0].plot(loss.numpy())
axes[0].set(xlabel="step", ylabel="loss of the batch")
axes[1].plot(range(19, len(loss)), scale.numpy(), label="gradient noise scale")
axes[1].axhline(N, color="black", linestyle="--", label="batch size")
axes[1].set(xlabel="step", ylabel="samples", yscale="log")
axes[1].legend()
plt.show()

# %%
print(f"noise scale at the start {scale[0]:.0f}, at the end {scale[-1]:.0f} samples")
assert scale[-1] > scale[0]
