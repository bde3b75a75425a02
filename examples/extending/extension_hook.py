"""
Use results while the pass runs, then free them
===============================================

Individual gradients of a whole network may not fit into memory, and often you need only
a summary. BackPACK calls an ``extension_hook`` with each module as soon as its results
are there, while the backward pass is still running. The hook can summarize the results
and delete them, so that only those of one layer are stored at a time.
"""

import matplotlib.pyplot as plt
import torch
from torch.nn import CrossEntropyLoss, Flatten, Linear, Module, ReLU, Sequential

from backpack import backpack, extend
from backpack.extensions import BatchGrad
from backpack.utils.examples import load_one_batch_mnist

torch.manual_seed(0)
X, y = load_one_batch_mnist(batch_size=64)
X = torch.nn.functional.avg_pool2d(X, 2)  # 14 x 14
widths = [196, 196, 196, 196, 10]
layers = [
    layer
    for i, o in zip(widths, widths[1:], strict=False)
    for layer in (Linear(i, o), ReLU())
][:-1]
model = extend(Sequential(Flatten(), *layers))
lossfunc = extend(CrossEntropyLoss())

# %%
# The summary is the median of the individual gradients over the samples, which a few
# outliers cannot spoil. Any other function of the individual gradients would do.

medians, most, stored = {}, 0, 0


def summarize(module: Module) -> None:
    global most, stored
    stored = sum(
        p.grad_batch.nbytes for p in model.parameters() if hasattr(p, "grad_batch")
    )
    most = max(most, stored)
    for p in module.parameters(recurse=False):
        medians[p] = len(X) * p.grad_batch.median(0).values
        del p.grad_batch


loss = lossfunc(model(X), y)
with backpack(BatchGrad(), extension_hook=summarize):
    loss.backward()

everything = sum(len(X) * p.nbytes for p in model.parameters())
print(
    f"all individual gradients: {everything / 2**20:.1f} MiB, "
    f"most at one time: {most / 2**20:.1f} MiB"
)
assert most < everything and not any(
    hasattr(p, "grad_batch") for p in model.parameters()
)

# %%
# Median and mean disagree: most individual gradients are small, and a few large ones
# make up the mean.

figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
weight = model[-1].weight
axis.scatter(weight.grad.flatten(), medians[weight].flatten(), s=4, label="one weight")
axis.axline((0, 0), slope=1, color="black", linewidth=0.8, label="median = mean")
axis.set(xlabel="mean of the gradient over samples", ylabel="median over samples")
axis.locator_params(axis="x", nbins=5)
axis.set_title("The last layer")
axis.legend()
plt.show()
