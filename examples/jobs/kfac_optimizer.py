"""
K-FAC as an optimizer of PyTorch
================================

K-FAC (`Martens & Grosse, 2015 <https://arxiv.org/abs/1503.05671>`_) multiplies each
gradient with the inverse of the curvature, which it approximates by Kronecker factors.
Here it is a ``torch.optim.Optimizer`` that works like any other: with parameter groups,
learning rate schedulers and ``state_dict``. The factors come from the backward pass
that computes the gradient.

The script trains an autoencoder of handwritten digits, the problem on which the method
was introduced, and compares with momentum steps.
"""

from collections.abc import Callable, Iterable

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from backpack import backpack, disable, extend
from backpack.extensions import KFAC
from backpack.utils.examples import load_one_batch_mnist
from backpack.utils.kroneckers import apply_kfac_mat_prod, inv_kfacs, pi_damping

# %%
# The optimizer
# -------------
#
# ``step`` expects ``p.kfac`` on each parameter when new factors are due, which
# ``needs_factors`` tells. It averages them with the old ones, inverts them with
# damping, and preconditions the gradient. Far away the curvature is another one, so
# that the length of a step is bounded, measured by the curvature itself.


class KFACOptimizer(torch.optim.Optimizer):
    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 0.05,
        momentum: float = 0.9,
        damping: float = 1e-3,
        memory: float = 0.9,
        every: int = 10,
        max_length: float = 0.03,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "steps": 0})
        self.damping, self.memory = damping, memory
        self.every, self.max_length = every, max_length

    @property
    def needs_factors(self) -> bool:
        return self.param_groups[0]["steps"] % self.every == 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        pairs = [(g, p) for g in self.param_groups for p in g["params"]]
        pairs = [(group, p) for group, p in pairs if p.grad is not None]
        if self.needs_factors:
            for _, p in pairs:
                if hasattr(p, "kfac"):
                    self._update(p, p.kfac)
        natural = [self._precondition(p) for _, p in pairs]
        products = [
            (p.grad * v).sum() for (_, p), v in zip(pairs, natural, strict=True)
        ]
        root = torch.stack(products).sum().sqrt().item()
        for (group, p), v in zip(pairs, natural, strict=True):
            scale = min(1.0, self.max_length / (group["lr"] * root + 1e-12))
            velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
            velocity.mul_(group["momentum"]).add_(v, alpha=scale)
            p.sub_(velocity, alpha=group["lr"])
        for group in self.param_groups:
            group["steps"] += 1

    def _update(self, p: Tensor, new: list[Tensor]) -> None:
        state = self.state[p]
        old = state.get("factors", new)
        state["factors"] = [
            self.memory * a + (1 - self.memory) * b
            for a, b in zip(old, new, strict=True)
        ]
        shift = pi_damping(state["factors"], self.damping)
        state["inverses"] = inv_kfacs(state["factors"], shift)

    def _precondition(self, p: Tensor) -> Tensor:
        if "inverses" not in self.state[p]:  # no step with factors has used it so far
            return p.grad
        product = apply_kfac_mat_prod(self.state[p]["inverses"], p.grad.flatten())
        return product.reshape(p.shape)


# %%
# The training loop
# -----------------
#
# Only the steps that need new factors run inside of ``backpack``.

images, _ = load_one_batch_mnist(1000, shuffle=False)
pixels = images * 0.3081 + 0.1307  # from 0 to 1
pixels = nn.functional.avg_pool2d(pixels, 2).flatten(1)  # 14 x 14
SIZES, BATCH, STEPS = (196, 100, 50, 12, 50, 100, 196), 250, 400


def errors(make_optimizer: Callable[..., torch.optim.Optimizer]) -> list[float]:
    """The mean squared error of all digits, at every tenth step."""
    torch.manual_seed(0)
    layers = []
    for a, b in zip(SIZES, SIZES[1:], strict=False):
        layers += [nn.Linear(a, b), nn.Tanh()]
    model, lossfunc = extend(nn.Sequential(*layers[:-1])), extend(nn.MSELoss())
    optimizer = make_optimizer(model.parameters())
    found = []
    for number in range(STEPS):
        X = pixels[torch.randperm(len(pixels))[:BATCH]]
        optimizer.zero_grad()
        if getattr(optimizer, "needs_factors", False):
            loss = lossfunc(model(X), X)
            with backpack(KFAC()):
                loss.backward()
        else:
            with disable():
                lossfunc(model(X), X).backward()
        optimizer.step()
        if number % 10 == 9:
            with torch.no_grad():
                found.append(lossfunc(model(pixels), pixels).item())
    return found


# %%
# Steps, not seconds
# ------------------
#
# Both have the best learning rate of three: 0.025, 0.05 and 0.1 for K-FAC; 3, 6 and 8
# for momentum steps. They see the same batches.

curves = {
    "SGD with momentum": errors(
        lambda parameters: torch.optim.SGD(parameters, lr=6.0, momentum=0.9)
    ),
    "K-FAC": errors(KFACOptimizer),
}
for name, found in curves.items():
    print(
        f"{name:18} mean squared error after 100 steps {found[9]:.4f}, "
        f"after {STEPS} {found[-1]:.4f}"
    )
reached = next(
    i for i, e in enumerate(curves["K-FAC"]) if e < curves["SGD with momentum"][-1]
)
print(f"K-FAC needs {10 * (reached + 1)} steps for what takes SGD {STEPS}.")

figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
for name, found in curves.items():
    axis.plot(range(10, STEPS + 1, 10), found, label=name)
axis.set(xlabel="step", ylabel="mean squared error", yscale="log")
axis.set_yticks([0.02, 0.05, 0.1], ["0.02", "0.05", "0.10"])
axis.minorticks_off()
axis.legend()
plt.show()

# %%
# A step of K-FAC costs more than one of SGD: every tenth pass computes the factors and
# inverts them, and each gradient is multiplied with two matrices. Whether it pays in
# seconds depends on the sizes of the layers and on the device.
