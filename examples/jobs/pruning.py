"""
Pruning by curvature
====================

Which weights can be removed? Optimal brain damage (`LeCun et al., 1989
<https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html>`_)
removes those whose removal changes the loss least. After training the gradient is
nearly zero, so that removing the weight ``w`` adds about ``1/2 * h * w ** 2`` to the
loss, where ``h`` is the curvature of the loss along ``w``. This script takes ``h`` from
the diagonal of the generalized Gauss-Newton matrix, and compares with removing the
smallest weights.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, ReLU, Sequential
from torch.utils.data import DataLoader, TensorDataset

from backpack import accumulate
from backpack.extensions import DiagGGNExact

data = load_digits()
X, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
lossfunc = CrossEntropyLoss()


def trained(train: Tensor) -> Sequential:
    model = Sequential(Linear(64, 64), ReLU(), Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(25):
        for batch in train[torch.randperm(len(train))].split(100):
            optimizer.zero_grad()
            lossfunc(model(X[batch]), y[batch]).backward()
            optimizer.step()
    return model


# %%
# The score of each weight
# ------------------------
#
# The curvature is that of the whole training set, computed batch by batch.


def scores(model: Sequential, train: Tensor) -> dict[str, list[Tensor]]:
    loader = DataLoader(TensorDataset(X[train], y[train]), batch_size=200)
    accumulate(model, lossfunc, loader, DiagGGNExact())
    weights = [p for p in model.parameters() if p.dim() == 2]
    return {
        "by curvature": [w.diag_ggn_exact * w.detach().square() / 2 for w in weights],
        "by size": [w.detach().abs() for w in weights],
        "at random": [torch.rand_like(w) for w in weights],
    }


# %%
# Removing weights
# ----------------
#
# The weights with the lowest scores become zero, whichever layer they are in. Biases
# stay.


@torch.no_grad()
def accuracy_without(
    model: Sequential, share: float, score: list[Tensor], test
) -> float:
    weights = [p for p in model.parameters() if p.dim() == 2]
    kept = [w.clone() for w in weights]
    flat = torch.cat([s.flatten() for s in score])
    threshold = flat.sort().values[round(share * (len(flat) - 1))]
    for w, s in zip(weights, score, strict=True):
        w[s < threshold] = 0
    accuracy = (model(X[test]).argmax(1) == y[test]).float().mean().item()
    for w, before in zip(weights, kept, strict=True):
        w.copy_(before)
    return accuracy


SHARES, SEEDS = torch.linspace(0, 0.98, 25).tolist(), range(5)
runs: dict[str, list[list[float]]] = {
    "by curvature": [],
    "by size": [],
    "at random": [],
}
for seed in SEEDS:
    torch.manual_seed(seed)
    train, test = torch.randperm(len(X)).split([1300, len(X) - 1300])
    model = trained(train)
    for name, score in scores(model, train).items():
        runs[name].append([accuracy_without(model, s, score, test) for s in SHARES])

# %%
# The mean over five networks, each with its own split into training and test data. The
# shaded range is from the worst network to the best.

figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
removed = [100 * share for share in SHARES]
for name, accuracies in runs.items():
    found = torch.tensor(accuracies)
    axis.plot(removed, found.mean(0), label=name)
    axis.fill_between(removed, found.amin(0), found.amax(0), alpha=0.2)
    share = next(s for s, a in zip(SHARES, found.mean(0), strict=True) if a < 0.9)
    print(
        f"{name:13} accuracy falls below 90 % with {share:.0%} of the weights removed"
    )
axis.set(xlabel="weights removed [%]", ylabel="test accuracy", ylim=(0, 1))
axis.legend()
plt.show()
