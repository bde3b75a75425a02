"""
Laplace approximation: a classifier that knows what it does not know
====================================================================

A trained network is often sure of itself where it is wrong. The Laplace approximation
(`MacKay, 1992 <https://doi.org/10.1162/neco.1992.4.3.448>`_) turns it into a Gaussian
distribution over networks: the mean is the trained network, the precision is the
generalized Gauss-Newton matrix (GGN) plus the precision of the prior. With Kronecker
factors, this matrix has a size that can be inverted
(`Ritter et al., 2018 <https://openreview.net/forum?id=Skdvd2xAZ>`_). Predictions come
from the network linearized at its mean
(`Immer et al., 2021 <https://arxiv.org/abs/2008.08400>`_).

The script reads digits, then digits that are turned more and more.
"""

import math

import matplotlib.pyplot as plt
import torch
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Module, Sequential, Tanh
from torch.utils.data import DataLoader, TensorDataset

from backpack import accumulate, backpack
from backpack.extensions import KFLR, BatchGrad
from backpack.utils.kroneckers import Eigen, eigh_kfacs

torch.manual_seed(0)
data = load_digits()
X, y = torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
train, test = torch.randperm(len(X)).split([1200, len(X) - 1200])
loader = DataLoader(TensorDataset(X[train], y[train]), batch_size=200)

# The log-likelihood is a sum over samples, and so is its curvature. (For regression
# with noise of variance s2, it is MSELoss(reduction="sum") divided by 2 * s2: divide
# the first factor of each parameter by 2 * s2.)
lossfunc = CrossEntropyLoss(reduction="sum")


# %%
# Train
# -----
#
# With a Gaussian prior on all parameters, the minimum of this objective is the mode of
# the posterior distribution.


def trained(precision: float) -> Module:
    torch.manual_seed(0)
    model = Sequential(Linear(64, 40), Tanh(), Linear(40, 10))
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=100, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        squares = sum(p.square().sum() for p in model.parameters())
        value = lossfunc(model(X[train]), y[train]) + precision / 2 * squares
        value.backward()
        return value

    optimizer.step(objective)
    return model


# %%
# The posterior's precision
# -------------------------
#
# ``accumulate`` computes the Kronecker factors of the whole data set, batch by batch.
# ``KFLR`` gives those of the exact GGN. In the eigenbasis of their product, the prior's
# precision is added exactly: it is the ``damping`` of ``Eigen``.


def curvature(model: Module) -> tuple[dict[str, Eigen], float]:
    """The GGN's blocks, one a parameter, and the loss of the data set."""
    found = accumulate(model, lossfunc, loader, KFLR(), progress=False)
    return {
        name: eigh_kfacs(kfacs) for name, kfacs in found["kflr"].items()
    }, found.loss


# %%
# The prior's precision
# ---------------------
#
# The marginal likelihood says how probable the training data are under a prior. It
# chooses the precision without any validation data
# (`Immer et al., 2021 <https://arxiv.org/abs/2104.04975>`_).


def log_marginal_likelihood(model, blocks, loss, precision: float) -> float:
    parameters = list(model.parameters())
    size = sum(p.numel() for p in parameters)
    squares = sum(p.detach().square().sum() for p in parameters)
    log_prior = size / 2 * math.log(precision) - precision / 2 * squares
    log_determinant = sum(block.logdet(precision) for block in blocks.values())
    return (-loss + log_prior - log_determinant / 2).item()


@torch.no_grad()
def test_loss(probabilities: Tensor, labels: Tensor) -> float:
    return -probabilities.gather(1, labels[:, None]).log().mean().item()


candidates = {}
for precision in (0.1, 0.3, 1.0, 3.0, 10.0):
    model = trained(precision)
    blocks, loss = curvature(model)
    evidence = log_marginal_likelihood(model, blocks, loss, precision)
    candidates[evidence] = (precision, model, blocks)
    plain = test_loss(model(X[test]).softmax(1), y[test])
    print(
        f"{precision:5.2f}: log marginal likelihood {evidence:7.1f}, "
        f"test loss {plain:.3f}"
    )
precision, model, blocks = candidates[max(candidates)]
print(f"Chosen precision of the prior: {precision}")

# %%
# Predict
# -------
#
# The outputs of the linearized network are Gaussian. Their covariance is ``J S J^T``,
# with the Jacobian ``J`` from ``BatchGrad``, one backward pass for each output, and the
# posterior's covariance ``S``. Probabilities are means over draws from this Gaussian.


def predict(inputs: Tensor, draws: int = 100) -> Tensor:
    """Probabilities ``[n, 10]``."""
    output = model(inputs)
    rows: dict[str, list[Tensor]] = {name: [] for name in blocks}
    for c in range(10):
        with backpack(BatchGrad(), retain_graph=True):
            output[:, c].sum().backward(retain_graph=True)
        for name, p in model.named_parameters():
            rows[name].append(p.grad_batch.flatten(1))
    covariance = torch.zeros(len(inputs), 10, 10)
    for name, block in blocks.items():
        jacobian = torch.stack(rows[name], 1)  # [n, 10, p]
        solved = block.apply_inverse(jacobian.flatten(0, 1).T, damping=precision)
        covariance += jacobian @ solved.T.reshape(jacobian.shape).mT
    root = torch.linalg.cholesky(covariance)
    noise = torch.randn(draws, len(inputs), 10, 1)
    return (output.detach() + (root @ noise)[..., 0]).softmax(2).mean(0)


# %%
# Turned digits
# -------------

shown = test[:200]
images = X[shown].reshape(-1, 8, 8).numpy()
angles = range(0, 181, 30)
lines: dict[str, list[float]] = {"accuracy": [], "network": [], "Laplace": []}
for angle in angles:
    turned = rotate(images, angle, (1, 2), reshape=False, order=1, cval=-1.0)
    turned = torch.from_numpy(turned).flatten(1)
    with torch.no_grad():
        plain = model(turned).softmax(1)
    laplace = predict(turned)
    lines["accuracy"].append((laplace.argmax(1) == y[shown]).float().mean().item())
    lines["network"].append(plain.amax(1).mean().item())
    lines["Laplace"].append(laplace.amax(1).mean().item())
    if angle in (0, 30, 90):
        before, after = (test_loss(p, y[shown]) for p in (plain, laplace))
        print(f"{angle:3} degrees: test loss {before:.2f}, with Laplace {after:.2f}")

figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
axis.plot(angles, lines["network"], label="confidence of the network")
axis.plot(angles, lines["Laplace"], label="confidence with Laplace")
axis.plot(angles, lines["accuracy"], "k--", label="accuracy")
axis.set(xlabel="angle [degrees]", ylabel="mean over test digits", ylim=(0, 1.02))
axis.set_xticks(angles)
figure.legend(loc="outside upper center", ncols=2)
plt.show()

# %%
# Confidence is the probability of the likeliest class. It should be as high as the
# accuracy. Far from the training data, the network's confidence is too high, and that
# of the Laplace approximation is closer. On upright digits it is the other way round:
# there the Laplace approximation with one precision for all weights is too modest.
