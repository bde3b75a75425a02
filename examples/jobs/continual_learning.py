"""
Continual learning: remember an old task by its Fisher information
===================================================================

A network that is trained on a new task forgets the old one. Elastic weight
consolidation (`Kirkpatrick et al., 2017 <https://arxiv.org/abs/1612.00796>`_) holds
each weight back as strongly as it mattered for the old task. It adds a penalty to the
loss,

    ``strength / 2 * sum(fisher * (weight - old_weight) ** 2)``,

where ``fisher`` is the diagonal of the Fisher information on the old task's data. For
softmax and cross entropy, that is the diagonal of the generalized Gauss-Newton matrix,
``DiagGGNExact``.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Module, ReLU, Sequential
from torch.utils.data import DataLoader, TensorDataset

from backpack import accumulate
from backpack.extensions import DiagGGNExact

# %%
# Two tasks
# ---------
#
# The old task is to read digits. The new one is to read them with all pixels in another
# order, the same for all images.

torch.manual_seed(0)
data = load_digits()
X, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
order, pixels = torch.randperm(len(X)), torch.randperm(64)
train, test = order[:1200], order[1200:]
old_task, new_task = X, X[:, pixels]
lossfunc = CrossEntropyLoss()


def train_on(inputs: Tensor, model: Module, epochs: int, penalty=None) -> None:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(100):
            optimizer.zero_grad()
            loss = lossfunc(model(inputs[batch]), y[batch])
            if penalty is not None:
                loss = loss + penalty(model)
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: Module, inputs: Tensor) -> float:
    return (model(inputs[test]).argmax(1) == y[test]).float().mean().item()


model = Sequential(Linear(64, 100), ReLU(), Linear(100, 10))
train_on(old_task, model, epochs=20)
old = {name: p.detach().clone() for name, p in model.named_parameters()}
before = accuracy(model, old_task)

# %%
# The Fisher information
# ----------------------
#
# One pass over the old data. Its result is all that the new task needs of them. The
# loss is a mean over samples, and so is the diagonal.

loader = DataLoader(TensorDataset(old_task[train], y[train]), batch_size=200)
fisher = accumulate(model, lossfunc, loader, DiagGGNExact())["diag_ggn_exact"]

# %%
# The new task
# ------------
#
# For comparison, the same penalty with equal importance for all weights. Its mean
# importance is that of the Fisher information, so that strengths can be compared. Each
# penalty is tried with several strengths, since each trades memory for learning.

mean = sum(f.sum() for f in fisher.values()) / sum(f.numel() for f in fisher.values())
importances = {
    "Fisher information": fisher,
    "equal importance": {name: torch.full_like(f, mean) for name, f in fisher.items()},
}


def after_new_task(
    importance: dict[str, Tensor], strength: float
) -> tuple[float, float]:
    """Test accuracies on the new and on the old task."""

    def penalty(model: Module) -> Tensor:
        terms = [
            (importance[name] * (p - old[name]).square()).sum()
            for name, p in model.named_parameters()
            if name in importance  # a new head has none
        ]
        return strength / 2 * torch.stack(terms).sum()

    model.load_state_dict(old)
    train_on(new_task, model, 15, penalty if strength else None)
    return accuracy(model, new_task), accuracy(model, old_task)


STRENGTHS = (3.0, 10.0, 30.0, 100.0, 300.0)
forgetful = after_new_task(fisher, 0.0)
found = {
    name: [after_new_task(importance, strength) for strength in STRENGTHS]
    for name, importance in importances.items()
}

print(f"{'':30} new task  old task")
print(f"{'before the new task':30} {'':8} {before:9.2f}")
print(f"{'without a penalty':30} {forgetful[0]:8.2f} {forgetful[1]:9.2f}")
for name, pairs in found.items():
    new, kept = max(pairs, key=sum)
    print(f"{name + ', best strength':30} {new:8.2f} {kept:9.2f}")

figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
for name, pairs in found.items():
    axis.plot(*zip(*pairs, strict=True), "o-", label=name)
axis.plot(*forgetful, "ks", label="no penalty")
axis.axhline(before, color="black", linestyle="--", label="before the new task")
axis.set(xlabel="accuracy on the new task", ylabel="accuracy on the old task")
axis.legend()
plt.show()

# %%
# Each line runs from a weak penalty to a strong one; best is the corner at the upper
# right. "Best strength" is the largest sum of both test accuracies: to report such
# numbers, choose the strength on data that are not used for the report.
