"""
Which digits helped? Influence of training samples on a prediction
==================================================================

How would the loss of a test digit change if a training digit were left out? Influence functions
(`Koh & Liang, 2017 <https://arxiv.org/abs/1703.04730>`_) answer without training again: with the individual gradients
and the curvature of the training loss, ``g_test^T (G + damping)^-1 g_n``.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import AvgPool2d, CrossEntropyLoss, Flatten, Linear, Sequential

from backpack import backpack, extend
from backpack.extensions import BatchGrad, SqrtGGNExact
from backpack.utils.examples import load_one_batch_mnist

torch.manual_seed(0)
X, y = load_one_batch_mnist(batch_size=800)
X, y, X_test, y_test = X[:500], y[:500], X[500:], y[500:]
DECAY = 0.1
lossfunc = extend(CrossEntropyLoss())


def train(X: Tensor, y: Tensor, decay: float = DECAY) -> Sequential:
    """The minimum of the mean loss with weight decay, of 500 samples or those that are left of them."""
    torch.manual_seed(0)
    model = extend(Sequential(AvgPool2d(3, ceil_mode=True), Flatten(), Linear(100, 10)).double())
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-10
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = lossfunc(model(X), y) * len(X) / 500
        value = value + decay / 2 * sum(p.square().sum() for p in model.parameters())
        value.backward()
        return value

    optimizer.step(objective)
    return model


X, X_test = X.double(), X_test.double()
model = train(X, y)

# %%
# Individual gradients of all training digits, and a root of the GGN.

loss = lossfunc(model(X), y)
with backpack(BatchGrad(), SqrtGGNExact()):
    loss.backward()
grads = torch.cat([p.grad_batch.flatten(1) for p in model.parameters()], 1)
root = torch.cat([p.sqrt_ggn_exact.flatten(2) for p in model.parameters()], 2).flatten(0, 1)
curvature = root.T @ root + DECAY * torch.eye(root.shape[1])

# %%
# The test digit that the model gets most wrong, and the influence of each training digit on its loss.

with torch.no_grad():
    output = model(X_test)
n = torch.nn.functional.cross_entropy(output, y_test, reduction="none").argmax().item()
test_loss = lossfunc(model(X_test[n : n + 1]), y_test[n : n + 1])
test_grad = torch.cat([g.flatten() for g in torch.autograd.grad(test_loss, list(model.parameters()))])
influence = grads @ torch.linalg.solve(curvature, test_grad)  # what leaving out adds to the loss
order = influence.argsort(descending=True)

# %%
# Training again without one of them: the prediction holds.

for k in (order[0].item(), order[-1].item()):
    rest = torch.arange(len(X)) != k
    with torch.no_grad():
        change = lossfunc(train(X[rest], y[rest])(X_test[n : n + 1]), y_test[n : n + 1]) - test_loss
    print(f"a {y[k]} left out: predicted {influence[k]:+.4f}, trained again {change:+.4f}")
    assert abs(change - influence[k]) < 0.5 * abs(influence[k])

# %%
# Beside the test digit, the digits that helped most; below, those that misled most.

figure, axes = plt.subplot_mosaic(
    [["test", "test", "+0", "+1"], ["test", "test", "+2", "+3"], ["-0", "-1", "-2", "-3"]],
    figsize=(5, 4.4),
    layout="constrained",
)
axes["test"].imshow(X_test[n, 0].numpy(), cmap="gray_r")
axes["test"].set_title(f"a {y_test[n]}, read as {output[n].argmax()}")
for k in range(4):
    for name, sample in ((f"+{k}", order[k]), (f"-{k}", order[-1 - k])):
        axes[name].imshow(X[sample, 0].numpy(), cmap="gray_r")
        axes[name].set_title(f"{y[sample]}: {influence[sample]:+.2f}", fontsize=9)
for axis in axes.values():
    axis.set_axis_off()
plt.show()
