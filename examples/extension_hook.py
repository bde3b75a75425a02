"""
Use results while the pass runs, then free them
===============================================

Individual gradients of a whole network may not fit into memory, and often only a summary is needed. An
``extension_hook`` is called with each module once its results are there, while the backward pass is still under way: it
reads them and deletes them, so that never more than one layer's are stored.
"""

import matplotlib.pyplot as plt
import torch
from torch.nn import CrossEntropyLoss, Flatten, Linear, Module, ReLU, Sequential

from backpack import backpack, extend
from backpack.extensions import BatchGrad
from backpack.utils.examples import load_one_batch_mnist

torch.manual_seed(0)
X, y = load_one_batch_mnist(batch_size=64)
widths = [784, 64, 64, 64, 10]
layers = [layer for i, o in zip(widths, widths[1:], strict=False) for layer in (Linear(i, o), ReLU())][:-1]
model = extend(Sequential(Flatten(), *layers))
lossfunc = extend(CrossEntropyLoss())

# %%
# The summary: for each parameter, the median over samples of the individual gradients, an estimate of the gradient that
# a few outliers cannot spoil. (No reduction that the package has; any function of all gradients will do.)

medians, most, stored = {}, 0, 0


def summarize(module: Module) -> None:
    global most, stored
    stored = sum(p.grad_batch.nbytes for p in model.parameters() if hasattr(p, "grad_batch"))
    most = max(most, stored)
    for p in module.parameters(recurse=False):
        medians[p] = len(X) * p.grad_batch.median(0).values
        del p.grad_batch


loss = lossfunc(model(X), y)
with backpack(BatchGrad(), extension_hook=summarize):
    loss.backward()

everything = sum(len(X) * p.nbytes for p in model.parameters())
print(f"all individual gradients: {everything / 2**20:.1f} MiB, most at one time: {most / 2**20:.1f} MiB")
assert most < everything and not any(hasattr(p, "grad_batch") for p in model.parameters())

# %%
# The hook was called in the order of the backward pass: the last layer first. Median and mean disagree: most
# individual gradients are small, a few large ones make the sum.

figure, axes = plt.subplots(2, 1, figsize=(5, 5.8), layout="constrained")
for axis, layer in zip(axes, (model[-1], model[-3]), strict=True):
    axis.scatter(layer.weight.grad.flatten(), medians[layer.weight].flatten(), s=4)
    axis.axline((0, 0), slope=1, color="black", linewidth=0.8)
    axis.set(xlabel="mean over samples", ylabel="median over samples", title=f"weight {list(layer.weight.shape)}")
plt.show()
