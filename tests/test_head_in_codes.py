"""Drawn columns and gradients at the logits of ``nn.LinearCrossEntropyLoss``, which are never formed for all positions.

Which class was drawn for each position is recorded. Given that, columns are gradients by plain autograd.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_large_vocabularies import IGNORED, OPTIONS, SETTINGS, Body, D, Largest, N, Second, T, V, needs_loss
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from truths import close
from truths.first_order import subsets

from backpack import accumulate, backpack, extend
from backpack.curvature.losses import in_codes, loss_root
from backpack.curvature.losses.with_heads import CLASSES
from backpack.extensions import (
    EKFAC,
    KFAC,
    BatchDiagGGNMC,
    BatchGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNMC,
)
from backpack.memory import AT_A_TIME
from backpack.modules.loss_calls import LossCall
from backpack.nodes.linear_cross_entropy import Head
from backpack.samples import Layout

pytestmark = [needs_loss, pytest.mark.filterwarnings("ignore:linear_cross_entropy")]


@pytest.fixture(name="drawn")
def _drawn(monkeypatch):
    """The classes ``[v, r]`` that were drawn for each term of the loss, in the order of the draws."""
    drawn, parts = [], []
    original_drawn, original_from = in_codes.CodesRoot.drawn, in_codes.drawn_from

    def drawn_from(probability, points):
        parts.append(original_from(probability, points))
        return parts[-1]

    def all_drawn(self, count):
        parts.clear()
        found = original_drawn(self, count)
        drawn.append(torch.cat(parts).T)
        return found

    monkeypatch.setattr(in_codes, "drawn_from", drawn_from)
    monkeypatch.setattr(in_codes.CodesRoot, "drawn", all_drawn)
    return drawn


def weights_of_rows(own: Second) -> Tensor:
    """What the curvature of each row is multiplied by in the loss, ``[r]``."""
    loss, counted = own.loss, (own.y != IGNORED).double()
    given = torch.ones(V).double() if loss.weight is None else loss.weight
    of_targets = given[own.y.clamp(min=0)] * counted
    smoothing = loss.label_smoothing
    mass = (1 - smoothing) * of_targets + smoothing * given.mean() * counted
    return mass / of_targets.sum() if loss.reduction == "mean" else mass


def columns(own: Second, classes: Tensor) -> tuple[dict[nn.Parameter, Tensor], Tensor, Tensor]:
    """Columns of each sample and parameter ``[v, n, *p]``, those at the logits ``[v, n, t, V]``, and hidden states.

    ``classes``: of each seed and row, ``[v, r]``.
    """
    scale, rows, at_logits = weights_of_rows(own).sqrt(), [], []
    for chosen in classes:
        hidden = own.body(own.x)
        logits = own.loss.linear(hidden)
        terms = (scale * F.cross_entropy(logits, chosen, reduction="none")).reshape(N, -1).sum(1)
        rows.append([torch.autograd.grad(value, own.parameters, retain_graph=True) for value in terms])
        at_logits.append(torch.autograd.grad(terms.sum(), logits)[0].reshape(N, -1, V))
    found = {
        parameter: torch.stack([torch.stack([grads[k] for grads in seed]) for seed in rows])
        for k, parameter in enumerate(own.parameters)
    }
    return found, torch.stack(at_logits), hidden.detach().reshape(N, -1, D)


def factors(cotangents: Tensor, x: Tensor, approx: str | None) -> tuple[Tensor, Tensor]:
    """The factors of a matrix, from the cotangents ``[v, n, t, o]`` of its outputs and its inputs ``[n, t, i]``."""
    n, t, _ = x.shape
    rows = cotangents.flatten(0, 2) if approx == "expand" else cotangents.sum(2).flatten(0, 1)
    inputs = x.mean(1) if approx == "reduce" else x.flatten(0, 1)
    return rows.T @ rows, inputs.T @ inputs / (n * t if approx == "expand" else n)


class Tied(Second):
    """The same with a head that is the embedding as well."""

    @property
    def parameters(self):
        return list(dict.fromkeys([*self.body.parameters(), *self.loss.parameters()]))


def case(kind: str, reduction: str, options: str = "reference", is_tied: bool = False) -> Second:
    own = (Tied if is_tied else Second).of(OPTIONS[options](), reduction, **SETTINGS[kind])
    if is_tied:
        own.loss.linear.weight = own.body.embedding.weight
    return own


@pytest.mark.parametrize("is_tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("samples, entries", [(1, 1), (3, 5 * V), (2, 2**22)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_drawn_columns_are_those_of_the_classes(kind, reduction, samples, entries, is_tied, drawn, monkeypatch):
    monkeypatch.setitem(AT_A_TIME, "cotangents", entries)
    own = case(kind, reduction, is_tied=is_tied)
    for chosen, rows in subsets(N).values():
        drawn.clear()
        kinds = (SqrtGGNMC, DiagGGNMC, BatchDiagGGNMC)
        kfac = [] if is_tied else [KFAC(samples, chosen, fisher="mc", approx="expand")]
        with backpack(*(cls(samples, subsampling=chosen) for cls in kinds), *kfac):
            own.run().backward()
        (classes,) = drawn
        truth, at_logits, hidden = columns(own, classes)
        for parameter, found in truth.items():
            expected = found[:, rows] / samples**0.5
            assert close(parameter.sqrt_ggn_mc, expected)
            assert close(parameter.diag_ggn_mc, expected.square().sum((0, 1)))
            assert close(parameter.diag_ggn_mc_batch, expected.square().sum(0))
        if kfac:
            expected = factors(at_logits[:, rows] / samples**0.5, hidden[rows], "expand")
            assert all(map(close, own.loss.linear.weight.kfac, expected))


@pytest.mark.parametrize("entries", [1, 5 * V, 2**22])
@pytest.mark.parametrize("approx", [None, "expand", "reduce"])
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("options", OPTIONS)
def test_kronecker_factors_and_eigenvalues(options, fisher, approx, entries, drawn, monkeypatch):
    monkeypatch.setitem(AT_A_TIME, "cotangents", entries)
    for kind in ("bias", "weights"):
        own = case(kind, "mean", "reference" if kind == "weights" else options)
        for chosen, rows in (subsets(N)[name] for name in ("all", "reversed", "duplicates")):
            found = []
            for cls in (KFAC, EKFAC):
                drawn.clear()
                with backpack(cls(2, chosen, fisher, approx)):
                    own.run().backward()
                classes = drawn[0] if fisher == "mc" else own.y.clamp(min=0)[None]
                assert len(drawn) == (fisher == "mc")
                truth, at_logits, hidden = columns(own, classes)
                scale = len(classes) ** -0.5
                found.append(({p: scale * g[:, rows] for p, g in truth.items()}, scale * at_logits[:, rows]))
            (truth, at_logits), (of_eigen, eigen_logits) = found
            weight, hidden = own.loss.linear.weight, hidden[rows]
            assert all(map(close, weight.kfac, factors(at_logits, hidden, approx)))
            for factor, basis in zip(factors(eigen_logits, hidden, approx), weight.ekfac.bases, strict=True):
                turned = basis.T @ factor @ basis
                assert close(turned - turned.diag().diag(), torch.zeros_like(turned), factor.abs().max())
                assert close(basis.T @ basis, torch.eye(len(basis)).double())
            outputs, inputs = weight.ekfac.bases
            squares = (outputs.T @ of_eigen[weight] @ inputs).square().sum((0, 1))
            assert close(weight.ekfac.eigenvalues, squares)
            for parameter, grads in truth.items():
                if parameter.dim() == 1:
                    assert close(parameter.kfac[0], grads.flatten(0, 1).T @ grads.flatten(0, 1))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_columns_of_the_exact_root_have_the_hessian_as_their_second_moment(reduction):
    own = case("weights", reduction)
    hidden = own.body(own.x).detach().requires_grad_()
    codes = torch.zeros(N * T, 2).double()
    loss = in_codes.LinearCrossEntropyLoss(LossCall(own.loss, hidden, get_gradient_edge(hidden), (own.y,), {}))
    root = loss_root(loss, codes, Layout(N, inner=T), (own.y,), {}, torch.ones(()))
    found = torch.cat([root.exact(start, start + 4) for start in range(0, root.columns, 4)])
    logits = loss.head.from_code(found.reshape(root.columns, N * T, 2), hidden.detach()).reshape(-1, N, T * V)
    truth = torch.autograd.functional.hessian(
        lambda z: F.cross_entropy(z, own.y, own.loss.weight, ignore_index=IGNORED, reduction=reduction),
        own.loss.linear(hidden).detach(),
    ).reshape(N, T * V, N, T * V)
    for n in range(N):
        assert close(torch.einsum("vp,vq->pq", logits[:, n], logits[:, n]), truth[n, :, n])


@given(st.integers(0, CLASSES - 1), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_class_numbers_survive_in_single_precision(index, scale, factor):
    head = Head(torch.empty(CLASSES, 0), None)
    code = in_codes.code(torch.tensor(scale), torch.tensor(index))
    assert code.dtype == torch.float32
    for own in (code, code * factor, code / factor**0.5):
        assert head.decoded(own)[1] == index
    assert head.decoded(code * 0)[1] == 0


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setitem(AT_A_TIME, "cotangents", 2**14)
    n, t = 8, 32
    for vocabulary, extensions in (
        (4096, [DiagGGNMC(), BatchDiagGGNMC(subsampling=[0, 3]), SqrtGGNMC()]),
        (64, [KFAC(fisher=fisher, approx=approx) for fisher in ("mc", "empirical") for approx in (None, "expand")]),
        (64, [EKFAC(), EKFAC(fisher="empirical")]),
    ):
        monkeypatch.setitem(AT_A_TIME, "cotangents", 2**14 if vocabulary > 64 else 2**12)
        for k, extension in enumerate(extensions):
            extension.savefield = f"{extension.savefield}_{k}"
        body, loss = extend(Body()), extend(nn.LinearCrossEntropyLoss(D, vocabulary, options=chunked(16)))
        x, y = torch.randint(V, (n, t)), torch.randint(vocabulary, (n, t))
        with Largest() as largest, backpack(*extensions):
            loss(body(x).flatten(0, 1), y.flatten()).backward()
        assert largest.entries < n * t * vocabulary


def chunked(rows):
    return nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)


def test_exact_columns_and_drawn_ones_in_one_block(drawn):
    own, alone, done = case("bias", "mean"), {}, []
    with backpack(DiagGGNExact(), DiagHessian(), BatchGrad()):
        own.run().backward()
    for parameter in own.parameters:
        alone[parameter] = [getattr(parameter, field).clone() for field in ("diag_ggn_exact", "diag_h", "grad_batch")]
    extensions = DiagGGNMC(), DiagGGNExact(), KFAC(fisher="empirical"), DiagHessian(), BatchGrad()
    with backpack(*extensions, extension_hook=done.append):
        own.run().backward()
    truth, _, _ = columns(own, drawn[0])
    for parameter, (exact, hessian, grads) in alone.items():
        assert close(parameter.diag_ggn_exact, exact)
        assert close(parameter.diag_h, hessian)
        assert close(parameter.grad_batch, grads)
        assert close(parameter.diag_ggn_mc, truth[parameter].square().sum((0, 1)))
    assert sorted(type(module).__name__ for module in done) == ["Embedding", "Linear", "Linear"]


def test_a_hook_finds_all_results_in_place():
    own, seen = case("bias", "mean"), []

    def hook(module):
        for parameter in module.parameters(recurse=False):
            seen.append(hasattr(parameter, "diag_ggn_mc") and hasattr(parameter, "diag_ggn_exact"))

    for extensions in ([DiagGGNMC(), DiagGGNExact()], [DiagGGNExact(), DiagGGNMC()]):
        with backpack(*extensions, extension_hook=hook):
            own.run().backward()
    assert len(seen) == 2 * len(own.parameters)
    assert all(seen)


def test_several_losses_of_one_model(drawn):
    own = case("bias", "mean", "chunks")
    other = extend(nn.LinearCrossEntropyLoss(D, V, reduction="sum", ignore_index=IGNORED).double())
    second = Second(own.body, other, own.x, torch.randint(V, own.y.shape))
    with backpack(SqrtGGNMC(2), KFAC(fisher="empirical", approx="expand")):
        hidden = own.body(own.x)
        (own.loss(hidden, own.y) + other(hidden, second.y)).backward()
    for k, case_of in enumerate((own, second)):
        truth, _, _ = columns(case_of, drawn[k])
        for parameter, expected in truth.items():
            assert close(parameter.sqrt_ggn_mc[2 * k : 2 * k + 2], expected / 2**0.5)
        _, at_logits, states = columns(case_of, case_of.y.clamp(min=0)[None])
        assert all(map(close, case_of.loss.linear.weight.kfac, factors(at_logits, states, "expand")))


def test_rows_belong_to_samples_in_any_order_and_number(drawn):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, D)

        def forward(self, x):
            return self.linear(x).tanh()

    ids = torch.tensor([2, 0, 0, 1, 2, 2, 0, 2])
    body, loss = extend(Rows().double()), extend(nn.LinearCrossEntropyLoss(D, V, options=chunked(3)).double())
    x, y = torch.rand(8, 3).double(), torch.randint(V, (8,))
    parameters = [*body.parameters(), *loss.parameters()]
    for chosen in (None, [2, 0]):
        drawn.clear()
        with backpack(SqrtGGNMC(2, subsampling=chosen), sample_ids=ids):
            loss(body(x), y).backward()
        (classes,) = drawn
        for n, sample in enumerate([0, 1, 2] if chosen is None else chosen):
            for v in range(2):
                terms = F.cross_entropy(loss.linear(body(x)), classes[v], reduction="none") * (2 * 8) ** -0.5
                grads = torch.autograd.grad(terms[ids == sample].sum(), parameters)
                for parameter, grad in zip(parameters, grads, strict=True):
                    assert close(parameter.sqrt_ggn_mc[v, n], grad)


@pytest.mark.parametrize("reduced", [False, True])
def test_terms_that_are_weighed_later(reduced, drawn):
    own = Second.of(chunked(5), "none")
    weights = torch.rand(N * T).double() * (own.y != IGNORED)
    with backpack(SqrtGGNMC()):
        terms = own.run()
        (terms[own.y != IGNORED].mean() if reduced else terms @ weights).backward()
    counted = (own.y != IGNORED).double()
    expected = counted / counted.sum() if reduced else weights
    logits = own.loss.linear(own.body(own.x))
    terms = expected.sqrt() * F.cross_entropy(logits, drawn[0][0], reduction="none")
    for n, value in enumerate(terms.reshape(N, T).sum(1)):
        grads = torch.autograd.grad(value, own.parameters, retain_graph=True)
        for parameter, grad in zip(own.parameters, grads, strict=True):
            assert close(parameter.sqrt_ggn_mc[0, n], grad)


@pytest.mark.parametrize(
    "settings, soft",
    [({"label_smoothing": 0.2}, False), ({}, True), ({"out_features": (2,)}, False)],
    ids=["smooth", "soft", "several"],
)
def test_gradients_that_have_no_codes_begin_at_logits(settings, soft):
    class Model(nn.Module):
        def __init__(self, body, head):
            super().__init__()
            self.body, self.head = body, head

        def forward(self, x):
            z = self.head(self.body(x))
            return z.reshape(len(z), V, 2) if "out_features" in settings else z

    body, loss = nn.Linear(3, D).double(), nn.LinearCrossEntropyLoss(D, V, **settings).double()
    model = extend(Model(nn.Linear(3, D), nn.Linear(D, loss.linear.out_features, bias=False)).double())
    model.body.load_state_dict(body.state_dict())
    model.head.load_state_dict(loss.linear.state_dict())
    extend(body), extend(loss)
    plain = extend(nn.CrossEntropyLoss(label_smoothing=settings.get("label_smoothing", 0.0)))
    x = torch.rand(6, 3).double()
    y = torch.rand(6, V).double().softmax(1) if soft else torch.randint(V, (6, *settings.get("out_features", ())))
    with backpack(KFAC(fisher="empirical")):
        loss(body(x), y).backward()
        plain(model(x), y).backward()
    parameters = [*body.parameters(), *loss.parameters()]
    for parameter, other in zip(parameters, model.parameters(), strict=True):
        assert all(map(close, parameter.kfac, other.kfac))


@pytest.mark.parametrize("options", OPTIONS)
def test_under_autocast_and_in_16_bits(options, drawn):
    for is_half in (False, True):
        drawn.clear()
        own = Second.of(OPTIONS[options](), "mean")
        extend(own.body.to(torch.bfloat16 if is_half else torch.float32)), extend(own.loss.to(own.body.linear.weight))
        with backpack(SqrtGGNMC(), BatchGrad(), DiagGGNExact()):
            with torch.autocast("cpu", torch.bfloat16, enabled=not is_half):
                value = own.run()
            value.backward()
        assert all(p.sqrt_ggn_mc.dtype == p.dtype for p in own.parameters)
        found = [[p.sqrt_ggn_mc, p.grad_batch, p.diag_ggn_exact] for p in own.parameters]
        own.body.double(), own.loss.double()
        truth, _, _ = columns(own, drawn[0])
        with backpack(BatchGrad(), DiagGGNExact()):
            own.run().backward()
        for p, results in zip(own.parameters, found, strict=True):
            for result, expected in zip(results, (truth[p], p.grad_batch, p.diag_ggn_exact), strict=True):
                assert close(result.double(), expected, rtol=0.05)


@pytest.mark.parametrize("options", OPTIONS)
def test_batches_of_a_data_set_add_up_to_the_factors_of_all(options):
    own = case("bias", "mean", options)
    with backpack(KFAC(fisher="empirical")):
        own.run().backward()
    truth = {p: [factor.clone() for factor in p.kfac] for p in own.body.parameters()}
    y = own.y.reshape(N, T)
    batches = [(own.x[rows], y[rows].flatten()) for rows in ([0, 1], [2], [3])]
    found = accumulate(own.body, own.loss, batches, KFAC(fisher="empirical"))
    for name, parameter in own.body.named_parameters():
        assert all(map(close, found["kfac"][name], truth[parameter]))


def test_results_that_are_to_be_differentiated_begin_at_logits(drawn):
    own = case("plain", "mean")
    parameters = own.parameters
    with backpack(DiagGGNMC()):
        torch.autograd.grad(own.run(), parameters, create_graph=True)
    assert not drawn
    (grad,) = torch.autograd.grad(own.body.linear.weight.diag_ggn_mc.sum(), own.loss.linear.weight)
    assert bool(grad.any())
