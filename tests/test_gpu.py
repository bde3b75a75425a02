"""On a GPU: what the CPU gives, also where the work is queued on a stream of its own.

Where there is no GPU, the CPU takes its place, so that these tests themselves are known to run. Streams, and waiting
for them, are left out there; `test_waiting_for_devices.py` has the latter.
"""

from contextlib import nullcontext
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
    GGNGram,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)
from backpack.memory import AT_A_TIME, at_a_time

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FIRST = [BatchGrad, BatchL2Grad, SumGradSquared, Variance, BatchDotGrad, lambda **options: ClippedGrad(0.1, **options)]
SECOND = [
    *(DiagGGNExact, BatchDiagGGNExact, SqrtGGNExact, GGNGram, DiagHessian, BatchDiagHessian, KFLR),
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


def on(stream):
    """Inside, work is queued on this stream; ``None``: on the default one."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def results(model, X, extensions, device, forward=None, backward=None):
    """What each extension gives for each parameter, with the passes on these streams."""
    model, X, y = extend(deepcopy(model).to(device)), X.to(device), torch.tensor([0, 2, 1, 1], device=device)
    lossfunc = extend(nn.CrossEntropyLoss())
    with backpack(*extensions):
        with on(forward):
            if forward is not None:
                forward.wait_stream(torch.cuda.default_stream())
            loss = lossfunc(model(X), y)
        with on(backward):
            if backward is not None and forward is not None:
                backward.wait_stream(forward)
            loss.backward()
    for stream in (forward, backward):
        if stream is not None:
            torch.cuda.default_stream().wait_stream(stream)
    return [[getattr(p, extension.savefield) for extension in extensions] for p in model.parameters()]


@pytest.mark.parametrize("streams", [0, *(pytest.param(count, marks=NEEDS_GPU) for count in (1, 2))])
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
    found = results(model.double(), X, extensions, DEVICE, forward, backward)
    for one, other in zip(tree_leaves(found), tree_leaves(truth), strict=True):
        assert close(one.cpu(), other, rtol=1e-9)


@NEEDS_GPU
@pytest.mark.parametrize("subsampling", [None, [2, 0]])
@pytest.mark.parametrize("name", MODELS)
def test_first_order_waits_for_nothing(name, subsampling):
    model, X = MODELS[name]()
    model, X, y = extend(model.double().cuda()), X.cuda(), torch.tensor([0, 2, 1, 1], device="cuda")
    lossfunc = extend(nn.CrossEntropyLoss())
    kinds = [kind for kind in FIRST if name != "encoder" or kind is not BatchDotGrad]  # which groups words by their use

    def step():
        extensions = [kind(subsampling=subsampling) for kind in kinds]
        loss = lossfunc(model(X), y)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with backpack(*extensions):
                loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    step()
    step()


@NEEDS_GPU
def test_more_is_computed_at_a_time_than_on_a_cpu():
    _, total = torch.cuda.mem_get_info()
    for what, entries in AT_A_TIME.items():
        assert entries < at_a_time(what, torch.device("cuda", 0)) < total / 8
