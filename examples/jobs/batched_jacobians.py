"""
Jacobians of all samples, and the neural tangent kernel
=======================================================

``BatchGrad`` needs no loss. It works for any scalar that is a sum over samples. If that
is the sum of one output over the batch, the individual gradients are one row of each
sample's Jacobian.
"""

import matplotlib.pyplot as plt
import torch
from torch.func import functional_call, jacrev, vmap
from torch.nn import Conv2d, Flatten, Linear, MaxPool2d, Sequential, Tanh

from backpack import backpack, extend
from backpack.extensions import BatchDotGrad, BatchGrad
from backpack.utils.examples import load_one_batch_mnist

torch.manual_seed(0)
X, y = load_one_batch_mnist(batch_size=60)
order = y.argsort()
X, y = X[order], y[order]
model = extend(
    Sequential(Conv2d(1, 6, 5, 2), Tanh(), MaxPool2d(2), Flatten(), Linear(216, 10))
)

# %%
# One backward pass for each output. ``retain_graph`` keeps the graph for the next one.

output = model(X)
rows: dict[str, list[torch.Tensor]] = {name: [] for name, _ in model.named_parameters()}
for c in range(10):
    with backpack(BatchGrad(), retain_graph=True):
        output[:, c].sum().backward(retain_graph=True)
    for name, p in model.named_parameters():
        rows[name].append(p.grad_batch)
jacobian = {name: torch.stack(row, 1) for name, row in rows.items()}  # [N, C, *p]

# %%
# ``torch.func`` computes the same Jacobians.

parameters = {name: p.detach() for name, p in model.named_parameters()}
expected = vmap(
    jacrev(lambda p, x: functional_call(model, p, (x[None],))[0]), (None, 0)
)(parameters, X)
for name in jacobian:
    print(f"{name:8} {list(jacobian[name].shape)}")
    assert torch.allclose(jacobian[name], expected[name], atol=1e-5)

# %%
# The neural tangent kernel (`Jacot et al., 2018 <https://arxiv.org/abs/1806.07572>`_)
# consists of dot products of Jacobians. ``BatchDotGrad`` computes them for all pairs of
# samples without storing the Jacobians. The sum over parameters is the kernel of one
# output, and the script averages over the outputs.

output, kernel = model(X), torch.zeros(len(X), len(X))
for c in range(10):
    with backpack(BatchDotGrad(), retain_graph=True):
        output[:, c].sum().backward(retain_graph=True)
    kernel += sum(p.batch_dot for p in model.parameters()) / 10
flat = torch.cat([j.flatten(2) for j in jacobian.values()], 2)
assert torch.allclose(kernel, torch.einsum("ncp,mcp->nm", flat, flat) / 10, rtol=1e-4)

figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
figure.colorbar(axis.imshow(kernel.numpy()), label="kernel")
starts = torch.searchsorted(y, torch.arange(10))
axis.set_xticks(starts, range(10))
axis.set_yticks(starts, range(10))
axis.set(
    xlabel="class of sample",
    ylabel="class of sample",
    title="Neural tangent kernel of 60 digits",
)
plt.show()
