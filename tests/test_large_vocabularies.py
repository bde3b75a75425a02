"""Losses that never hold the logits of all positions: every way to compute them gives what plain autograd gives."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from truths import close
from truths.first_order import clipped, quantities, subsets

from backpack import accumulate, backpack, extend
from backpack.extensions import (
    KFLR,
    BatchDiagGGNExact,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)
from backpack.memory import AT_A_TIME
from backpack.nodes import form
from backpack.nodes.products import grad_rows_of, rows_of
from backpack.uses import DenseUse, RowsUse

HAS_LOSS = hasattr(nn, "LinearCrossEntropyLoss")
needs_loss = pytest.mark.skipif(not HAS_LOSS, reason="this PyTorch does not have the loss")

N, T, D, V = 4, 3, 5, 7
IGNORED = -100


class Fused(torch.autograd.Function):
    """Computes the loss and both gradients in its forward pass, some rows at a time, as kernel libraries do."""

    @staticmethod
    def forward(ctx, h, weight, target):
        ctx.save_for_backward(h, weight, target)
        loss, ctx.of_h, ctx.of_weight = h.new_zeros(()), torch.zeros_like(h), torch.zeros_like(weight)
        for rows in torch.arange(len(h)).split(4):
            x, y = h[rows], target[rows]
            logits = (x @ weight.T).requires_grad_()
            with torch.enable_grad():
                part = F.cross_entropy(logits, y, reduction="sum", ignore_index=IGNORED)
                (grad,) = torch.autograd.grad(part, logits)
            loss += part.detach()
            ctx.of_h[rows] = grad @ weight
            ctx.of_weight += grad.T @ x
        return loss

    @staticmethod
    def backward(ctx, grad):
        return ctx.of_h * grad, ctx.of_weight * grad, None


class Registered(Fused):
    """The same with a form."""


@form(Registered, rows_of=0)
def _(place):
    h, weight, target = place.node.saved_tensors

    def grad(outer: Tensor, h: Tensor, target: Tensor) -> Tensor:
        counted = (target != IGNORED).to(h)[:, None]
        of_logits = ((h @ weight.T).softmax(1) - F.one_hot(target.clamp(min=0), V)) * counted
        return outer[:, :, None] * of_logits

    return RowsUse((h, target), grad) if place.k == 1 else None


class Body(nn.Module):
    """Tokens ``[n, t]`` to hidden states ``[n, t, d]``; positions depend on those before."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(V, D), nn.Linear(D, D)

    def forward(self, x):
        return self.linear(self.embedding(x).cumsum(1) / x.shape[1]).tanh()


class OfFunction(nn.Module):
    """The loss of hidden states, with a head of its own."""

    def __init__(self, function, reduction):
        super().__init__()
        self.head, self.function, self.reduction = nn.Linear(D, V, bias=False), function, reduction

    def forward(self, h, target):
        h, target = h.reshape(-1, D), target.reshape(-1)
        total = self.function(h, self.head.weight, target)
        return total / (target != IGNORED).sum() if self.reduction == "mean" else total


class OfModule(nn.Module):
    """PyTorch's loss of hidden states."""

    def __init__(self, reduction, summed=False, **options):
        super().__init__()
        self.reduction = reduction
        how = nn.LinearCrossEntropyOptions(**options) if options else None
        self.loss = nn.LinearCrossEntropyLoss(
            D, V, options=how, reduction="none" if summed else reduction, ignore_index=IGNORED
        )

    def forward(self, h, target):
        terms = self.loss(h.reshape(-1, D), target.reshape(-1))
        if terms.dim():
            return terms.sum() / (target != IGNORED).sum() if self.reduction == "mean" else terms.sum()
        return terms


def term(h, weight, target):
    return F.cross_entropy(h @ weight.T, target, reduction="sum", ignore_index=IGNORED)


def in_chunks(size):
    def function(h, weight, target):
        return sum(term(x, weight, y) for x, y in zip(h.split(size), target.split(size), strict=True))

    return function


def checkpointed(size):
    def function(h, weight, target):
        pairs = zip(h.split(size), target.split(size), strict=True)
        return sum(checkpoint(term, x, weight, y, use_reentrant=False) for x, y in pairs)

    return function


def functional(**options):
    def function(h, weight, target):
        how = nn.LinearCrossEntropyOptions(**options) if options else None
        terms = F.linear_cross_entropy(h, weight, target, reduction="none", ignore_index=IGNORED, options=how)
        return terms.sum()

    return function


CHUNKS = {"batch_chunk_size": 5, "chunking_method": None}
WAYS = {
    "module": lambda reduction: OfModule(reduction),
    "module_in_chunks": lambda reduction: OfModule(reduction, **CHUNKS),
    "module_in_chunks_twice": lambda reduction: OfModule(reduction, allow_retain_graph=True, **CHUNKS),
    "module_by_rows": lambda reduction: OfModule(reduction, summed=True, **CHUNKS),
    "function": lambda reduction: OfFunction(functional(), reduction),
    "function_in_chunks": lambda reduction: OfFunction(functional(**CHUNKS), reduction),
    "loop_across_samples": lambda reduction: OfFunction(in_chunks(4), reduction),
    "loop_of_whole_samples": lambda reduction: OfFunction(in_chunks(2 * T), reduction),
    "loop_of_short_chunks": lambda reduction: OfFunction(in_chunks(2), reduction),
    "loop_of_one_chunk": lambda reduction: OfFunction(in_chunks(100), reduction),
    "checkpointed": lambda reduction: OfFunction(checkpointed(4), reduction),
    "fused": lambda reduction: OfFunction(Registered.apply, reduction),
}


class Both(nn.Module):
    """A model that computes its own loss."""

    def __init__(self, body, loss):
        super().__init__()
        self.body, self.loss = body, loss

    def forward(self, x, y):
        return self.loss(self.body(x), y)


def data(ignored):
    x, y = torch.randint(V, (N, T)), torch.randint(V, (N, T))
    if ignored:
        y[0, 1] = y[2, 0] = y[2, 2] = IGNORED
        y[3] = IGNORED
    return x, y


@dataclass
class Case:
    body: Body
    loss: nn.Module
    x: Tensor
    y: Tensor

    @property
    def parameters(self):
        return {**dict(self.body.named_parameters()), **dict(self.loss.named_parameters())}

    def truth(self):
        """Individual gradients by plain autograd, of a linear layer and cross entropy."""
        (weight,) = self.loss.parameters()
        count = (self.y != IGNORED).sum() if self.loss.reduction == "mean" else 1
        parameters = list(self.parameters.values())
        rows = []
        for n in range(N):
            value = term(self.body(self.x[n : n + 1]).reshape(-1, D), weight, self.y[n]) / count
            rows.append(torch.autograd.grad(value, parameters))
        return dict(zip(self.parameters, map(torch.stack, zip(*rows, strict=True)), strict=True))


def case(way, reduction="mean", ignored=True):
    body, loss = Body().double(), WAYS[way](reduction).double()
    return Case(body, loss, *data(ignored))


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
@pytest.mark.parametrize("ignored", [False, True], ids=["all", "ignored"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=needs_loss if way.startswith(("module", "function")) else ()) for way in WAYS]
)
def test_quantities_of_first_order_are_those_of_a_linear_layer_and_cross_entropy(way, reduction, ignored, inside):
    own = case(way, reduction, ignored)
    truth = own.truth()
    largest = max(t.abs().max() for t in truth.values())
    model = extend(Both(own.body, own.loss)) if inside else Both(extend(own.body), extend(own.loss))
    norms = torch.stack([t.flatten(1).square().sum(1) for t in truth.values()]).sum(0).sqrt()
    bound = float(norms.median())
    for chosen, rows in subsets(N).values():
        first = (BatchGrad, BatchL2Grad, BatchDotGrad, SumGradSquared, Variance)
        with backpack(*(cls(subsampling=chosen) for cls in first), ClippedGrad(bound, subsampling=chosen)):
            model(own.x, own.y).backward()
        of_clipped = clipped({name: t[rows] for name, t in truth.items()}, bound)
        for name, parameter in own.parameters.items():
            for field, expected in quantities(truth[name][rows]).items():
                size = largest if "batch" not in field or "grad" in field else largest**2
                assert close(getattr(parameter, field), expected, size), (name, field)
            assert close(parameter.grad_clipped, of_clipped[name], largest), name
    total = {name: t.sum(0) for name, t in truth.items()}
    for name, parameter in own.parameters.items():
        assert close(parameter.grad, len(subsets(N)) * total[name], largest), name


@pytest.mark.parametrize("size", [1, 2, 3, N, 5, N * T])
@pytest.mark.parametrize("inside", [False, True])
def test_a_chunk_with_as_many_rows_as_there_are_samples_is_no_batch(size, inside):
    own = Case(Body().double(), OfFunction(in_chunks(size), "mean").double(), *data(False))
    truth = own.truth()
    model = extend(Both(own.body, own.loss)) if inside else None
    body, loss = (own.body, own.loss) if inside else (extend(own.body), extend(own.loss))
    with backpack(BatchGrad()):
        (loss(body(own.x), own.y) if model is None else model(own.x, own.y)).backward()
    for name, parameter in own.parameters.items():
        assert close(parameter.grad_batch, truth[name]), name


@needs_loss
def test_a_head_that_is_tied_to_the_embedding_has_the_sum_of_both_uses():
    own = case("module_in_chunks")
    own.loss.loss.linear.weight = own.body.embedding.weight
    count, weight = (own.y != IGNORED).sum(), own.body.embedding.weight
    body, loss = extend(own.body), extend(own.loss)
    with backpack(BatchGrad(), BatchL2Grad()):
        loss(body(own.x), own.y).backward()
    for n in range(N):
        value = term(own.body(own.x[n : n + 1]).reshape(-1, D), weight, own.y[n]) / count
        (grad,) = torch.autograd.grad(value, weight)
        assert close(weight.grad_batch[n], grad, 1e-3)
        assert close(weight.batch_l2[n], grad.square().sum(), 1e-3)


@pytest.mark.parametrize("inside", [False, True])
def test_a_function_that_hides_the_gradients_of_samples_is_refused(inside):
    functions = [Fused.apply]
    if HAS_LOSS:
        how = nn.LinearCrossEntropyOptions()
        functions.append(lambda h, w, y: F.linear_cross_entropy(h, w, y, reduction="sum", options=how))
    for function in functions:
        body, loss = Body().double(), OfFunction(function, "sum").double()
        model = extend(Both(body, loss)) if inside else None
        if not inside:
            extend(body), extend(loss)
        x, y = data(False)
        value = loss(body(x), y) if model is None else model(x, y)
        with (
            pytest.raises(RuntimeError, match="combines samples with the parameter .*head.weight"),
            backpack(BatchGrad()),
        ):
            value.backward()


def test_a_function_that_hides_the_head_is_fine_if_the_head_is_frozen():
    own = Case(Body().double(), OfFunction(Fused.apply, "sum").double(), *data(False))
    truth = own.truth()
    own.loss.requires_grad_(False)
    body, loss = extend(own.body), extend(own.loss)
    with backpack(BatchGrad()):
        loss(body(own.x), own.y).backward()
    for name, parameter in own.body.named_parameters():
        assert close(parameter.grad_batch, truth[name]), name


def test_the_ggn_of_a_fused_function_is_refused_rather_than_zero():
    body, loss = extend(Body().double()), OfFunction(Fused.apply, "sum").double().requires_grad_(False)
    x, y = data(False)
    with pytest.raises(RuntimeError, match=r"backward\(\) can't be differentiated"), backpack(DiagGGNExact()):
        extend(loss)(body(x), y).backward()


@needs_loss
def test_a_head_that_was_overwritten_before_the_backward_pass_is_refused():
    own = case("module_in_chunks")
    body, loss = extend(own.body), extend(own.loss)
    value = loss(body(own.x), own.y)
    with torch.no_grad():
        own.loss.loss.linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"), backpack(BatchGrad()):
        value.backward()


class Project(torch.autograd.Function):
    """``x @ weight`` over the last axis."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.T, x.flatten(0, -2).T @ grad.flatten(0, -2)


@form(Project)
def _(place):
    if place.k != 1 or place.layout.axes != [0]:
        return None
    x, _ = place.node.saved_tensors
    calls.append(place.k)
    return DenseUse((x,), rows_of, grad_rows_of, flipped=True)


calls: list[int] = []


def test_a_form_is_registered_for_a_class_of_functions():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(D, V))

        def forward(self, x):
            return Project.apply(x, self.weight)

    model, x = extend(Model().double()), torch.rand(N, T, D).double()
    calls.clear()
    with backpack(BatchGrad(), BatchL2Grad()):
        model(x).square().sum().backward()
    assert calls
    for n in range(N):
        (grad,) = torch.autograd.grad((x[n] @ model.weight).square().sum(), model.weight)
        assert close(model.weight.grad_batch[n], grad)
        assert close(model.weight.batch_l2[n], grad.square().sum())


class Largest(TorchDispatchMode):
    """Notes the entries of the largest tensor that any operation returns, and whether one has both sizes."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.entries = max(self.entries, leaf.numel())
        return result


@needs_loss
@pytest.mark.parametrize("way", ["module", "module_in_chunks"])
def test_first_order_needs_no_logits_of_all_positions(way, monkeypatch):
    monkeypatch.setitem(AT_A_TIME, "cotangents", 2**12)
    n, t, vocabulary = 16, 32, 512
    how = nn.LinearCrossEntropyOptions(batch_chunk_size=16, chunking_method=None) if way != "module" else None
    body, loss = extend(Body()), extend(nn.LinearCrossEntropyLoss(D, vocabulary, options=how))
    x, y = torch.randint(V, (n, t)), torch.randint(vocabulary, (n, t))
    with Largest() as largest, backpack(BatchL2Grad(), SumGradSquared(), ClippedGrad(1.0)):
        loss(body(x).flatten(0, 1), y.flatten()).backward()
    assert (largest.entries >= n * t * vocabulary) == (way == "module")


SETTINGS = {
    "plain": {},
    "bias": {"bias": True},
    "weights": {"weight": torch.linspace(0.2, 2, V, dtype=torch.float64)},
    "smooth": {"label_smoothing": 0.2},
}


@dataclass
class Second:
    """A body and a loss with a head, and the same as a model with logits and ``CrossEntropyLoss``."""

    body: nn.Module
    loss: nn.Module
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, options, reduction, **settings):
        class Rows(Body):
            def forward(self, x):
                return super().forward(x).flatten(0, 1)

        loss = nn.LinearCrossEntropyLoss(D, V, options=options, reduction=reduction, ignore_index=IGNORED, **settings)
        x, y = data(True)
        return cls(extend(Rows().double()), extend(loss.double()), x, y.flatten())

    @property
    def parameters(self):
        return [*self.body.parameters(), *self.loss.parameters()]

    def run(self):
        return self.loss(self.body(self.x), self.y)

    def blocks(self):
        """For each sample and parameter the GGN ``[n, p, p]``, by explicit Jacobians and Hessians."""
        loss, found = self.loss, []
        count = self._count() if loss.reduction == "mean" else 1
        for n in range(N):
            logits = loss.linear(self.body(self.x[n : n + 1]))
            target = self.y.reshape(N, T)[n]

            def value(z, target=target):
                return F.cross_entropy(z, target, loss.weight, None, IGNORED, None, "sum", loss.label_smoothing) / count

            hessian = torch.autograd.functional.hessian(value, logits.detach()).reshape(T * V, T * V)
            rows = [torch.autograd.grad(z, self.parameters, retain_graph=True) for z in logits.flatten()]
            found.append(
                [J.T @ hessian @ J for J in (torch.stack([g.flatten() for g in p]) for p in zip(*rows, strict=True))]
            )
        return [torch.stack(own) for own in zip(*found, strict=True)]

    def _count(self):
        counted = self.y[self.y != IGNORED]
        return len(counted) if self.loss.weight is None else self.loss.weight[counted].sum()


OPTIONS = {"reference": lambda: None, "chunks": lambda: nn.LinearCrossEntropyOptions(**CHUNKS)}


@needs_loss
@pytest.mark.filterwarnings("ignore:linear_cross_entropy")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_ggn_is_that_of_logits_and_cross_entropy(options, reduction, settings):
    own = Second.of(OPTIONS[options](), reduction, **SETTINGS[settings])
    blocks = own.blocks()
    for chosen, rows in (subsets(N)[name] for name in ("all", "reversed", "mask", "duplicates")):
        with backpack(DiagGGNExact(subsampling=chosen), BatchDiagGGNExact(subsampling=chosen)):
            own.run().backward()
        for parameter, block in zip(own.parameters, blocks, strict=True):
            diagonals = block.diagonal(dim1=1, dim2=2)[rows].reshape(len(rows), *parameter.shape)
            assert close(parameter.diag_ggn_exact, diagonals.sum(0))
            assert close(parameter.diag_ggn_exact_batch, diagonals)


@needs_loss
@pytest.mark.filterwarnings("ignore:linear_cross_entropy")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS)
def test_sampled_columns_have_the_ggn_as_their_expectation(options, reduction, settings):
    own, samples = Second.of(OPTIONS[options](), reduction, **SETTINGS[settings]), 3000
    blocks = own.blocks()
    with backpack(SqrtGGNMC(mc_samples=samples)):
        own.run().backward()
    for parameter, block in zip(own.parameters, blocks, strict=True):
        columns = parameter.sqrt_ggn_mc.flatten(2) * samples**0.5  # [v, n, p]
        outer = torch.einsum("vnp,vnq->vnpq", columns, columns)
        error = outer.mean(0) - block
        allowed = 6 * outer.std(0) / samples**0.5 + 1e-12
        assert bool((error.abs() <= allowed).all())


@needs_loss
@pytest.mark.parametrize("options", OPTIONS)
def test_the_hessian_of_the_head_is_its_ggn(options):
    own = Second.of(OPTIONS[options](), "mean")
    block = own.blocks()[-1]
    with backpack(DiagHessian(), DiagGGNExact()):
        own.run().backward()
    weight = own.loss.linear.weight
    assert close(weight.diag_h, block.diagonal(dim1=1, dim2=2).sum(0).reshape(weight.shape))


@needs_loss
@pytest.mark.parametrize("options", OPTIONS)
def test_kronecker_factors_of_one_position_are_exact_in_the_head(options):
    own = Second.of(OPTIONS[options](), "sum")
    own.x, own.y = own.x[:1, :1], own.y[:1]
    with backpack(KFLR()):
        own.run().backward()
    hidden = own.body(own.x)
    hessian = torch.autograd.functional.hessian(
        lambda z: F.cross_entropy(z, own.y, reduction="sum"), own.loss.linear(hidden).detach()
    ).reshape(V, V)
    outputs, inputs = own.loss.linear.weight.kflr
    assert close(torch.kron(outputs, inputs), torch.kron(hessian, hidden.T @ hidden))


@needs_loss
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_of_a_data_set_add_up(options, reduction):
    own = Second.of(OPTIONS[options](), reduction)
    with backpack(DiagGGNExact(), SumGradSquared()):
        own.run().backward()
    truth = {p: (p.diag_ggn_exact.clone(), p.sum_grad_squared.clone()) for p in own.body.parameters()}
    y = own.y.reshape(N, T)
    batches = [(own.x[rows], y[rows].flatten()) for rows in ([0, 1], [2], [3])]
    found = accumulate(own.body, own.loss, batches, DiagGGNExact(), SumGradSquared())
    for name, parameter in own.body.named_parameters():
        assert close(found["diag_ggn_exact"][name], truth[parameter][0])
        assert close(found["sum_grad_squared"][name], truth[parameter][1])
