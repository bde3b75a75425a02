"""
An optimizer that uses the diagonal of the GGN
==============================================

Each coordinate of the gradient is divided by its curvature: ``theta <- theta - rate * grad / (diag(G) + damping)``. The
curvature comes from the same backward pass as the gradient.
"""

import matplotlib.pyplot as plt
import torch
from torch.nn import CrossEntropyLoss, Flatten, Linear, Sequential, Sigmoid
from torch.optim import SGD, Optimizer

from backpack import backpack, extend
from backpack.extensions import DiagGGNMC
from backpack.utils.examples import load_one_batch_mnist


class DiagGGNOptimizer(Optimizer):
    def __init__(self, parameters, rate: float, damping: float) -> None:
        super().__init__(parameters, {"rate": rate, "damping": damping})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["rate"] * p.grad / (p.diag_ggn_mc + group["damping"])


# %%
# A network that is badly scaled for gradient descent: sigmoids make the gradients of early layers small. There, the
# curvature is small too.


def losses(make_optimizer) -> list[float]:
    torch.manual_seed(0)
    X, y = load_one_batch_mnist(batch_size=512)
    layers = [Flatten(), Linear(784, 64), Sigmoid(), Linear(64, 32), Sigmoid(), Linear(32, 10)]
    model, lossfunc = extend(Sequential(*layers)), extend(CrossEntropyLoss())
    optimizer, history = make_optimizer(model.parameters()), []
    for _ in range(15):
        for batch in torch.randperm(len(X)).split(64):
            optimizer.zero_grad()
            loss = lossfunc(model(X[batch]), y[batch])
            with backpack(DiagGGNMC()):
                loss.backward()
            optimizer.step()
            history.append(loss.item())
    return history


figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
makers = {f"SGD, rate {rate}": lambda parameters, rate=rate: SGD(parameters, rate) for rate in (1, 2, 4)}
makers["diagonal GGN, rate 0.1"] = lambda parameters: DiagGGNOptimizer(parameters, 0.1, 0.03)
final = {}
for name, make_optimizer in makers.items():
    history = losses(make_optimizer)
    final[name] = sum(history[-8:]) / 8
    axis.plot(history, label=name)
    print(f"{name:24} mean loss in the last epoch {final[name]:.3f}")
axis.set(xlabel="step", ylabel="loss of the batch", ylim=(0, 3))
axis.legend()
plt.show()
assert final["diagonal GGN, rate 0.1"] == min(final.values())
