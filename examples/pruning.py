"""
Pruning by curvature
====================

Which weights can go? Optimal brain damage (`LeCun et al., 1989 <https://proceedings.neurips.cc/paper/1989/hash/
6c9882bbac1c7093bd25041881277658-Abstract.html>`_) removes those that the loss depends on least: by ``1/2 h w^2``, with
``h`` the diagonal of the curvature, instead of by size alone.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, ReLU, Sequential

from backpack import backpack, extend
from backpack.extensions import DiagGGNExact

torch.manual_seed(0)
data = load_digits()
X, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
order = torch.randperm(len(X))
train, test = order[:1300], order[1300:]
model, lossfunc = extend(Sequential(Linear(64, 64), ReLU(), Linear(64, 10))), extend(CrossEntropyLoss())
optimizer = torch.optim.Adam(model.parameters(), 0.01)
for _ in range(25):
    for batch in train[torch.randperm(len(train))].split(100):
        optimizer.zero_grad()
        lossfunc(model(X[batch]), y[batch]).backward()
        optimizer.step()

# %%
# The diagonal of the GGN, of the whole training set in one pass.

loss = lossfunc(model(X[train]), y[train])
with backpack(DiagGGNExact()):
    loss.backward()
weights = [p for p in model.parameters() if p.dim() == 2]
trained = [w.detach().clone() for w in weights]
scores = {
    "by curvature": [0.5 * p.diag_ggn_exact * p.detach() ** 2 for p in weights],
    "by size": [w.abs() for w in trained],
}

# %%
# Both remove the same share of the weights of all layers together.


def accuracy_without(share: float, score: list[Tensor]) -> float:
    flat = torch.cat([s.flatten() for s in score])
    threshold = flat.sort().values[int(share * (len(flat) - 1))]
    with torch.no_grad():
        for w, before, s in zip(weights, trained, score, strict=True):
            w.copy_(before * (s > threshold))
        return (model(X[test]).argmax(1) == y[test]).float().mean().item()


shares = torch.linspace(0, 0.98, 25).tolist()
figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
accuracies = {}
for name, score in scores.items():
    accuracies[name] = [accuracy_without(share, score) for share in shares]
    axis.plot([100 * share for share in shares], accuracies[name], label=name)
axis.set(xlabel="weights removed [%]", ylabel="test accuracy", ylim=(0, 1))
axis.legend()
plt.show()

# %%
for name, values in accuracies.items():
    print(f"{name:13} mean accuracy beyond 70 % removed: {sum(values[-7:]) / 7:.2f}")
assert sum(accuracies["by curvature"]) > sum(accuracies["by size"])
