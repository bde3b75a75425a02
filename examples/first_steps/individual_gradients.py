"""
Individual gradients
====================

The gradient of a mini-batch is a sum of one gradient for each sample. These tell how
much the samples agree. ``BatchGrad`` stores them. ``BatchL2Grad`` computes only their
squared norms and ``BatchDotGrad`` only their dot products, which takes less time and
memory.
"""

import matplotlib.pyplot as plt
import torch
from torch.nn import CrossEntropyLoss, Flatten, Linear, ReLU, Sequential

from backpack import backpack, extend
from backpack.extensions import BatchDotGrad, BatchGrad, BatchL2Grad
from backpack.utils.examples import load_one_batch_mnist

torch.manual_seed(0)
X, y = load_one_batch_mnist(batch_size=100)
order = y.argsort()  # by class, for the picture
X, y = X[order], y[order]
model = extend(Sequential(Flatten(), Linear(784, 32), ReLU(), Linear(32, 10)))
lossfunc = extend(CrossEntropyLoss())

# %%
# Results are attributes of the parameters. The loss is a mean over 100 samples, so that
# each individual gradient carries the factor 1/100, and their sum is the gradient.

loss = lossfunc(model(X), y)
with backpack(BatchGrad(), BatchL2Grad(), BatchDotGrad()):
    loss.backward()

for name, p in model.named_parameters():
    print(
        f"{name:9} {list(p.shape)!s:10} grad_batch {list(p.grad_batch.shape)!s:15} "
        f"batch_dot {list(p.batch_dot.shape)}"
    )
    assert torch.allclose(p.grad_batch.sum(0), p.grad, atol=1e-6)
    assert torch.allclose(p.batch_dot.diagonal(), p.batch_l2, rtol=1e-4)

# %%
# The sum of the dot products over all parameters is that of the whole gradients.
# Divided by the norms, it is their cosine. The picture has the digits sorted by class:
# samples of one class pull in the same direction.

dots = sum(p.batch_dot for p in model.parameters())
norms = sum(p.batch_l2 for p in model.parameters()).sqrt()
cosines = dots / norms.outer(norms)

same = y[:, None] == y
off_diagonal = ~torch.eye(len(X), dtype=torch.bool)
print(
    f"mean cosine within a class {cosines[same & off_diagonal].mean():.2f}, "
    f"between classes {cosines[~same].mean():.2f}"
)

figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
image = axis.imshow(cosines.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
figure.colorbar(image, label="cosine")
starts = torch.searchsorted(y, torch.arange(10))
axis.set_xticks(starts, range(10))
axis.set_yticks(starts, range(10))
axis.set(
    xlabel="class of sample",
    ylabel="class of sample",
    title="Cosines of individual gradients",
)
plt.show()
