"""On a GPU: what the CPU gives, also where the work is queued on a stream of its own."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from truths import close

from backpack import backpack, extend
from backpack.extensions import (
    KFLR,
    KFRA,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagHessian,
    GaussNewtonStep,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

FIRST = [BatchGrad, BatchL2Grad, SumGradSquared, Variance, BatchDotGrad, lambda **options: ClippedGrad(0.1, **options)]
SECOND = [
    *(DiagGGNExact, BatchDiagGGNExact, SqrtGGNExact, DiagHessian, BatchDiagHessian, KFLR),
    lambda **options: GaussNewtonStep(0.1, **options),
]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, activation="gelu", batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, index):
        return self.out(self.layer(self.words(index)).mean(1))


def convolutional():
    layers = [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.Sigmoid(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 3)), torch.randn(4, 2, 8, 8).double()


MODELS = {
    "convolutional": convolutional,
    "dense": lambda: (nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(4, 3).double()),
    "encoder": lambda: (Encoder(), torch.randint(9, (4, 5))),
}


def results(model, X, extensions, device, forward=None, backward=None):
    """What each extension gives for each parameter, with the passes on these streams."""
    model, X, y = extend(deepcopy(model).to(device)), X.to(device), torch.tensor([0, 2, 1, 1], device=device)
    lossfunc = extend(nn.CrossEntropyLoss())
    with backpack(*extensions):
        with torch.cuda.stream(forward):
            if forward is not None:
                forward.wait_stream(torch.cuda.default_stream())
            loss = lossfunc(model(X), y)
        with torch.cuda.stream(backward):
            if backward is not None and forward is not None:
                backward.wait_stream(forward)
            loss.backward()
    for stream in (forward, backward):
        if stream is not None:
            torch.cuda.default_stream().wait_stream(stream)
    return [[getattr(p, extension.savefield) for extension in extensions] for p in model.parameters()]


@pytest.mark.parametrize("streams", [0, 1, 2])
@pytest.mark.parametrize("subsampling", [None, [2, 0]])
@pytest.mark.parametrize("kinds", [FIRST, SECOND], ids=["first order", "second order"])
@pytest.mark.parametrize("name", MODELS)
def test_results_are_those_of_the_cpu(name, kinds, subsampling, streams):
    torch.manual_seed(0)
    model, X = MODELS[name]()
    own = [torch.cuda.Stream() for _ in range(streams)]
    forward, backward = (own * 2)[:2] or (None, None)
    extensions = [kind(subsampling=subsampling) for kind in kinds]
    if kinds is SECOND and isinstance(model, nn.Sequential):
        extensions.append(KFRA(subsampling=subsampling))
    truth = results(model.double(), X, extensions, "cpu")
    found = results(model.double(), X, extensions, "cuda", forward, backward)
    for one, other in zip(tree_leaves(found), tree_leaves(truth), strict=True):
        assert close(one.cpu(), other, rtol=1e-9)


def test_first_order_waits_for_nothing():
    model, X = convolutional()
    model, X, y = extend(model.double().cuda()), X.cuda(), torch.tensor([0, 2, 1, 1], device="cuda")
    lossfunc = extend(nn.CrossEntropyLoss())

    def step():
        with backpack(*[kind() for kind in FIRST]):
            lossfunc(model(X), y).backward()

    step()  # the first one looks whether gradients are explained
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
