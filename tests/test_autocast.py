"""Mixed and low precision: results in float32 where the parameters are, close to those in float32."""

import pytest
import torch
from torch import nn

from backpack import backpack, extend
from backpack.extensions import (
    GGNMP,
    HMP,
    PCHMP,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagHessian,
    GGNGram,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

N, C = 32, 5
POWERS = {
    BatchGrad: 1,
    BatchL2Grad: 2,
    SumGradSquared: 2,
    Variance: 2,
    BatchDotGrad: 2,
    ClippedGrad: 1,
    DiagGGNExact: 2,
    BatchDiagGGNExact: 2,
    SqrtGGNExact: 1,
    GGNGram: 2,
}
"""How often a cotangent enters a quantity."""


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
        self.out = nn.Linear(16, C)

    def forward(self, index):
        return self.out(self.layer(self.words(index)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layer, self.out = nn.Linear(12, 12), nn.GRU(12, 16, batch_first=True), nn.Linear(16, C)

    def forward(self, x):
        return self.out(self.layer(self.first(x))[0][:, -1])


MODELS = {
    # model, inputs, and how many products lie one behind the other; without kinks, at which rounding decides
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, C)), lambda: torch.randn(N, 12), 2),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(128, C)),
        lambda: torch.randn(N, 3, 6, 6),
        2,
    ),
    "encoder": (Encoder, lambda: torch.randint(0, 20, (N, 6)), 7),
    "recurrent": (Recurrent, lambda: torch.randn(N, 4, 12), 6),
}


def results(model, X, y, autocast=None, inside=False, **options):
    """All quantities, by their attribute, and the gradient."""
    for parameter in model.parameters():
        parameter.grad = None
    lossfunc = extend(nn.CrossEntropyLoss())
    extensions = [cls(0.1, **options) if cls is ClippedGrad else cls(**options) for cls in POWERS]
    with backpack(*extensions):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = lossfunc(model(X), y)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    found = {e.savefield: [getattr(p, e.savefield) for p in model.parameters()] for e in extensions}
    return found, [p.grad for p in model.parameters()]


def deviation(found, expected):
    """Of all parameters together, relative to their norm."""
    found, expected = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (found, expected))
    return float((found - expected).norm() / expected.norm())


def agree(found, expected, depth, dtype):
    """Up to rounding.

    Forward and backward, each of ``depth`` products rounds its two operands and its result to ``dtype``: ``6 depth``
    roundings of a relative size of ``eps / 2`` at most, which are taken to add up. In a quantity of the power ``p``
    of the cotangent they count ``p`` times.
    """
    for cls, power in POWERS.items():
        bound = power * 6 * depth * torch.finfo(dtype).eps / 2
        assert deviation(found[cls.savefield], expected[cls.savefield]) < bound, cls.__name__


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_autocast_gives_float32_results_within_the_rounding_of_the_format(name, dtype, inside):
    build, inputs, depth = MODELS[name]
    model, X, y = build(), inputs(), torch.randint(0, C, (N,))
    with torch.autocast("cpu", dtype):
        loss = nn.CrossEntropyLoss()(model(X), y)
        plain = torch.autograd.grad(loss, list(model.parameters())) if inside else None
    plain = torch.autograd.grad(loss, list(model.parameters())) if plain is None else plain
    extend(model)
    for options in ({}, {"subsampling": [3, 1]}):
        expected, _ = results(model, X, y, **options)
        found, grads = results(model, X, y, dtype, inside, **options)
        assert all(t.dtype == torch.float32 for tensors in found.values() for t in tensors)
        assert all(map(torch.equal, grads, plain))
        agree(found, expected, depth, dtype)


def hessians(model, X, y, vectors, autocast=None, inside=False, retain=False):
    """Diagonals, and products with a vector for each parameter."""
    lossfunc = extend(nn.CrossEntropyLoss())
    extensions = [DiagHessian(), BatchDiagHessian(subsampling=[3, 1]), HMP(), GGNMP(), PCHMP()]
    with backpack(*extensions):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = lossfunc(model(X), y)
            if inside:
                loss.backward(retain_graph=retain)
        if not inside:
            loss.backward(retain_graph=retain)
    found = {e.savefield: [getattr(p, e.savefield) for p in model.parameters()] for e in extensions}
    for field in ("hmp", "ggnmp", "pchmp"):
        found[field] = [multiply(v) for multiply, v in zip(found[field], vectors, strict=True)]
    return found


@pytest.mark.parametrize("inside, softmax", [(False, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_hessians_under_autocast_are_in_float32_and_within_the_rounding_of_the_format(name, dtype, inside, softmax):
    """The output is in the format, or behind a softmax in float32; it enters by its products' rounding, twice."""
    build, inputs, depth = MODELS[name]
    model, X, y = build(), inputs(), torch.randint(0, C, (N,))
    vectors = [torch.randn_like(p) for p in model.parameters()]
    model = extend(nn.Sequential(model, nn.LogSoftmax(1)) if softmax else model)
    expected = hessians(model, X, y, vectors)
    found = hessians(model, X, y, vectors, dtype, inside, retain=inside)
    for field, tensors in found.items():
        assert all(t.dtype == torch.float32 for t in tensors)
        assert deviation(tensors, expected[field]) < 2 * 6 * depth * torch.finfo(dtype).eps / 2, field


def test_a_model_that_uses_autocast_itself_is_an_error_of_second_derivatives_with_the_remedy():
    class Casting(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    model, lossfunc = extend(nn.Sequential(Casting(3, 3), nn.Tanh(), nn.Linear(3, C))), extend(nn.CrossEntropyLoss())
    X, y = torch.randn(N, 3), torch.randint(0, C, (N,))
    for extension in (DiagHessian(), HMP()):
        with pytest.raises(RuntimeError, match="without autocast"), backpack(extension):
            lossfunc(model(X), y).backward(retain_graph=True)


@pytest.mark.parametrize("name", MODELS)
def test_models_in_bfloat16_are_within_its_rounding(name):
    build, inputs, depth = MODELS[name]
    model, X, y = extend(build()), inputs(), torch.randint(0, C, (N,))
    model.bfloat16().float()  # parameters that both formats hold
    expected, _ = results(model, X.bfloat16().float() if X.is_floating_point() else X, y)
    found, _ = results(model.bfloat16(), X.bfloat16() if X.is_floating_point() else X, y)
    assert all(t.dtype == torch.bfloat16 for tensors in found.values() for t in tensors)
    agree(found, expected, depth + 1, torch.bfloat16)  # the result is rounded as well


SUMMING = {
    "linear": (lambda: nn.Linear(3, 2), lambda *shape: torch.randn(*shape, 3)),
    "scaling": (lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)), lambda *shape: torch.randn(*shape, 3)),
    "lookup": (lambda: nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2)), lambda *shape: torch.randint(0, 4, shape)),
}


@pytest.mark.parametrize("positions", [1, 512])
@pytest.mark.parametrize("name", SUMMING)
def test_sums_under_autocast_are_accumulated_in_float32(name, positions):
    """Of equal terms, of which bfloat16 could add 256 before a further one is less than its rounding."""
    n = 4096 // positions
    build, inputs = SUMMING[name]
    model, lossfunc = extend(build()), extend(nn.MSELoss(reduction="sum"))
    X, y, rows = inputs(1, 1), torch.ones(1, 1, 2), [0, n - 1]

    def of_copies(n, positions, *extensions):
        with backpack(*extensions):
            with torch.autocast("cpu", torch.bfloat16):
                loss = lossfunc(model(X.expand(n, positions, *X.shape[2:])), y.expand(n, positions, 2))
            loss.backward()

    of_copies(1, 1, BatchGrad(), BatchDiagGGNExact())
    ones = [(positions * p.grad_batch[0], p.diag_ggn_exact_batch[0]) for p in model.parameters()]
    extensions = [BatchGrad(subsampling=rows), BatchL2Grad(), SumGradSquared(), Variance(), ClippedGrad(1e9)]
    curvature = [DiagGGNExact()] if positions == 1 else []  # elsewhere, there is a seed for each position
    of_copies(n, positions, *extensions, BatchDotGrad(subsampling=rows), *curvature)
    for p, (grad, diagonal) in zip(model.parameters(), ones, strict=True):
        square = grad.square()
        expected = [
            (p.grad_batch, grad.expand(2, *grad.shape)),
            (p.batch_l2, square.sum().expand(n)),
            (p.sum_grad_squared, n * square),
            (p.variance + square, square),
            (p.grad_clipped, n * grad),
            (p.batch_dot, square.sum().expand(2, 2)),
        ]
        for found, value in expected:
            assert torch.allclose(found, value, rtol=n * positions * torch.finfo(torch.float32).eps)
        if curvature:
            assert torch.allclose(p.diag_ggn_exact, n * diagonal, rtol=n * torch.finfo(torch.float32).eps)


class Rude(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad if grad.abs().sum().item() >= 0 else grad


def test_what_cannot_be_pulled_back_together_is_pulled_back_one_by_one(monkeypatch):
    """Also where ``backpack.graph.vmap_limits`` does not know it."""

    class Doubling(nn.Module):
        def forward(self, x):
            return Rude.apply(x)

    X, y = torch.randn(N, 4), torch.randint(0, C, (N,))
    model = extend(nn.Sequential(nn.Linear(4, 4), Doubling(), nn.Linear(4, C)))
    expected, _ = results(model, X, y)
    monkeypatch.setattr("backpack.curvature.spliced_graph.must_loop", lambda *graph: False)
    found, _ = results(model, X, y)
    agree(found, expected, 2, torch.float32)
