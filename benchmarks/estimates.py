"""Where is it best to draw for an estimate of the Hessian's diagonal?

    python benchmarks/estimates.py

Prints the squared error of one draw, relative to the diagonal's squared norm: at the outputs of the nonlinear functions
(``DiagHessianMC``), and at the parameters, ``v * (H v)`` with random signs ``v`` (Hutchinson, 1989). Both are
measured before and after 60 steps of Adam on random data.
"""

import torch
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import DiagHessian, DiagHessianMC
from backpack.hessianfree import TwiceDifferentiable

DRAWS = 300


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    mlp = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16), nn.Sigmoid(), nn.Linear(16, 10))
    layers = [nn.Conv2d(3, 4, 5), nn.Sigmoid(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.Tanh(), nn.Flatten()]
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
    return {
        "MLP": (mlp, (64, 64)),
        "CNN": (nn.Sequential(*layers, nn.Linear(128, 10)), (16, 3, 16, 16)),
        "transformer": (nn.Sequential(nn.Linear(8, 8), encoder, nn.Flatten(), nn.Linear(32, 10)), (16, 4, 8)),
    }


def variances(model: nn.Module, lossfunc: nn.Module, X: Tensor, y: Tensor) -> tuple[float, float]:
    """At the outputs, and at the parameters."""
    parameters = list(model.parameters())
    with backpack(DiagHessian()):
        lossfunc(model(X), y).backward()
    truth = torch.cat([p.diag_h.flatten() for p in parameters])
    with TwiceDifferentiable():
        loss = lossfunc(model(X), y)
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    errors = [0.0, 0.0]
    for _ in range(DRAWS):
        with backpack(DiagHessianMC()):
            lossfunc(model(X), y).backward()
        signs = [torch.randint(0, 2, p.shape).float() * 2 - 1 for p in parameters]
        products = torch.autograd.grad(grads, parameters, signs, retain_graph=True)
        own = [p.diag_h_mc for p in parameters]
        for place, found in enumerate((own, [s * h for s, h in zip(signs, products, strict=True)])):
            errors[place] += float((torch.cat([f.flatten() for f in found]) - truth).square().sum()) / DRAWS
    size = float(truth.square().sum())
    return errors[0] / size, errors[1] / size


def main() -> None:
    torch.manual_seed(0)
    for name, (model, shape) in networks().items():
        X, y = torch.randn(shape), torch.randint(10, shape[:1])
        lossfunc = extend(nn.CrossEntropyLoss())
        extend(model)
        before = variances(model, lossfunc, X, y)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            lossfunc(model(X), y).backward()
            optimizer.step()
        after = variances(model, lossfunc, X, y)
        print(
            f"{name}: outputs {before[0]:.3g}, {after[0]:.3g}; parameters {before[1]:.3g}, {after[1]:.3g}", flush=True
        )


if __name__ == "__main__":
    main()
