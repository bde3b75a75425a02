"""
Laplace approximation: a model that knows what it does not know
===============================================================

The generalized Gauss-Newton matrix at the minimum turns a trained network into a distribution over networks
(`MacKay, 1992 <https://doi.org/10.1162/neco.1992.4.3.448>`_). A plain network is sure of itself far away from all data;
its Laplace approximation is not.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_iris
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Sequential, Tanh

from backpack import backpack, extend
from backpack.extensions import BatchGrad, SqrtGGNExact

torch.manual_seed(0)
data = load_iris()
X, y = torch.tensor(data.data[:, 2:]), torch.tensor(data.target)  # length and width of petals
X = (X - X.mean(0)) / X.std(0)
model = extend(Sequential(Linear(2, 20), Tanh(), Linear(20, 3)).double())
lossfunc = extend(CrossEntropyLoss(reduction="sum"))
parameters = list(model.parameters())

# %%
# Train with a Gaussian prior on all parameters: the minimum is the mode of the posterior distribution.

PRECISION = 0.05
optimizer = torch.optim.LBFGS(parameters, max_iter=300, line_search_fn="strong_wolfe")


def objective() -> Tensor:
    optimizer.zero_grad()
    value = lossfunc(model(X), y) + PRECISION / 2 * sum(p.square().sum() for p in parameters)
    value.backward()
    return value


optimizer.step(objective)
print(f"accuracy {(model(X).argmax(1) == y).double().mean():.3f}")

# %%
# The precision of the posterior is the GGN of the summed loss plus that of the prior. The GGN is ``V V^T`` with the
# root that ``SqrtGGNExact`` gives: one column for each class and sample.

with backpack(SqrtGGNExact()):
    lossfunc(model(X), y).backward()
root = torch.cat([p.sqrt_ggn_exact.flatten(2) for p in parameters], 2).flatten(0, 1)  # [C * N, P]
precision = root.T @ root + PRECISION * torch.eye(root.shape[1])
covariance = torch.linalg.inv(precision)

# %%
# The network, linearized at the mode, has Gaussian outputs with the covariance ``J S J^T``
# (`Immer et al., 2021 <https://arxiv.org/abs/2008.08217>`_). Jacobians come from ``BatchGrad``, one pass an output. The
# softmax of a Gaussian is approximated by that of its mean, divided by ``sqrt(1 + pi / 8 variance)``.


def predict(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``[n, 3]``: those of the network, and those of its Laplace approximation."""
    output, rows = model(inputs), []
    for c in range(3):
        with backpack(BatchGrad(), retain_graph=True):
            output[:, c].sum().backward(retain_graph=True)
        rows.append(torch.cat([p.grad_batch.flatten(1) for p in parameters], 1))
    variance = torch.stack([torch.einsum("np,pq,nq->n", row, covariance, row) for row in rows], 1)
    output = output.detach()
    return output.softmax(1), (output / (1 + torch.pi / 8 * variance).sqrt()).softmax(1)


axis_points = torch.linspace(-5, 5, 50, dtype=torch.float64)
grid = torch.cartesian_prod(axis_points, axis_points)
plain, laplace = predict(grid)

figure, axes = plt.subplots(2, 1, figsize=(5, 7.2), sharey=True, layout="constrained")
for axis, probability, title in zip(axes, (plain, laplace), ("network", "Laplace approximation"), strict=True):
    confidence = probability.max(1).values.reshape(50, 50).T
    levels = torch.linspace(1 / 3, 1, 13).tolist()
    filled = axis.contourf(axis_points.numpy(), axis_points.numpy(), confidence.numpy(), levels, cmap="Blues")
    for c, name in enumerate(data.target_names):
        axis.plot(*X[y == c].T.numpy(), ".", label=name, color=("tab:orange", "tab:green", "tab:red")[c])
    axis.set(title=title, xlabel="length of petal (standardized)")
axes[0].set_ylabel("width of petal (standardized)")
axes[0].legend(loc="lower left")
figure.colorbar(filled, ax=axes, label="probability of the likeliest class", format="%.2f")
plt.show()

# %%
# The two agree where there are data, and not in the corners.

corner = (grid.abs() > 4).all(1)
for name, probability in (("network", plain), ("Laplace approximation", laplace)):
    print(f"{name}: mean confidence in the corners {probability[corner].max(1).values.mean():.2f}")
assert laplace[corner].max(1).values.mean() < plain[corner].max(1).values.mean()
