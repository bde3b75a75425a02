"""
Residual nets
=============

A residual network as you would write it in PyTorch: skip connections are sums in
``forward``, activations are functions, and one of them works in place. Nothing has to
be rewritten for BackPACK.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Conv2d, CrossEntropyLoss, GroupNorm, Linear, Module, Sequential

from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact
from backpack.utils.examples import load_one_batch_mnist

# %%
# The model
# ---------
#
# It normalizes over groups of channels. Batch normalization would work too, but while
# it trains, each sample changes the outputs of all others, and individual gradients
# cost one backward pass for each sample.


class Block(Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = (
            Conv2d(channels, out, 3, stride, 1, bias=False),
            GroupNorm(2, out),
        )
        self.conv2, self.norm2 = (
            Conv2d(out, out, 3, 1, 1, bias=False),
            GroupNorm(2, out),
        )
        self.skip = Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(h)) + self.skip(x))


class ResNet(Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Conv2d(1, 8, 5, 2, 2)
        self.blocks = Sequential(Block(8, 8, 1), Block(8, 16, 2), Block(16, 16, 1))
        self.last = Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(F.relu(self.first(x))).mean((2, 3)))


torch.manual_seed(0)
X, y = load_one_batch_mnist(batch_size=32)
model, lossfunc = extend(ResNet()), extend(CrossEntropyLoss())
loss = lossfunc(model(X), y)
with backpack(BatchGrad(), DiagGGNExact()):
    loss.backward()

# %%
# For comparison, sample 5 alone by plain autograd:

alone = F.cross_entropy(model(X[5:6]), y[5:6]) / len(X)
for p, expected in zip(
    model.parameters(),
    torch.autograd.grad(alone, list(model.parameters())),
    strict=True,
):
    assert torch.allclose(p.grad_batch[5], expected, atol=1e-6)

# %%
# The curvature of each layer at the start of training, as the mean of the GGN's
# diagonal.

names = [name for name, p in model.named_parameters() if p.dim() > 1]
for name, p in model.named_parameters():
    if p.dim() == 4:
        print(f"{name:22} grad_batch {list(p.grad_batch.shape)}")
curvature = [p.diag_ggn_exact.mean().item() for p in model.parameters() if p.dim() > 1]
figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
axis.barh(names, curvature)
axis.invert_yaxis()
axis.set(xscale="log", xlabel="mean of the GGN's diagonal")
plt.show()
