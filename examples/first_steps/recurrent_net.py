"""
Recurrent nets: which digits are hard?
======================================

An LSTM reads handwritten digits row by row. After training, the samples with large
gradients are those that the model has not understood. ``BatchL2Grad`` computes the
norms of all samples' gradients without storing the gradients.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import LSTM, CrossEntropyLoss, Linear, Module

from backpack import backpack, extend
from backpack.extensions import BatchL2Grad
from backpack.utils.examples import load_one_batch_mnist


class Reader(Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = LSTM(28, 32, batch_first=True), Linear(32, 10)

    def forward(self, rows: Tensor) -> Tensor:
        return self.out(self.lstm(rows)[0][:, -1])


torch.manual_seed(0)
X, y = load_one_batch_mnist(batch_size=500)
model, lossfunc = extend(Reader()), extend(CrossEntropyLoss())
optimizer = torch.optim.Adam(model.parameters(), 0.01)
for epoch in range(12):
    for batch in torch.randperm(len(X)).split(50):
        optimizer.zero_grad()
        loss = lossfunc(model(X[batch, 0]), y[batch])
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

# %%
# The squared norm of a sample's whole gradient is the sum over all parameters.

output = model(X[:, 0])
loss = lossfunc(output, y)
with backpack(BatchL2Grad()):
    loss.backward()
norms = len(X) * sum(p.batch_l2 for p in model.parameters()).sqrt()

alone = lossfunc(model(X[7:8, 0]), y[7:8])
grads = torch.autograd.grad(alone, list(model.parameters()))
assert torch.allclose(
    torch.cat([g.flatten() for g in grads]).norm(), norms[7], rtol=1e-3
)

# %%
# These are the digits with the largest gradients. Each title says what the digit is and
# what the model reads.

order = norms.argsort(descending=True)
wrong = output.argmax(1) != y
print(
    f"{wrong[order[:6]].sum()} of the 6 digits with the largest gradients are misread, "
    f"{wrong.sum()} of all {len(X)}"
)
figure, axes = plt.subplots(2, 3, figsize=(5, 3.6), layout="constrained")
for axis, n in zip(axes.flat, order[:6].tolist(), strict=True):
    axis.imshow(X[n, 0].numpy(), cmap="gray_r")
    axis.set_title(f"{y[n]}, read as {output[n].argmax()}")
    axis.set_axis_off()
plt.show()
