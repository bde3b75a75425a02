"""What users can check before a long run: ``verify`` and ``summary``."""

import pydoc
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput
from truths.options import required

from backpack import extensions, summary, verify
from backpack.extensions import (
    GGNMP,
    HBP,
    HMP,
    KFLR,
    KFRA,
    PCHMP,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    GaussNewtonStep,
)
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.curvature import CurvatureExtension
from backpack.extensions.firstorder.base import FirstOrderModuleExtension
from backpack.uses import Dense

QUANTITIES = [
    *("BatchGrad", "BatchL2Grad", "BatchDotGrad", "SumGradSquared", "Variance"),
    *("DiagGGNExact", "BatchDiagGGNExact", "SqrtGGNExact", "DiagHessian", "BatchDiagHessian", "DiagHessianMC"),
    *("DiagGGNMC", "BatchDiagGGNMC", "SqrtGGNMC", "GGNGram", "KFAC", "KFLR", "EKFAC"),
]


def problem(training=False):
    norm = nn.BatchNorm2d(3).train(training)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.Sigmoid(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(12, 3))
    return model, nn.CrossEntropyLoss(), torch.rand(4, 2, 4, 4), torch.tensor([0, 2, 1, 2])


@pytest.mark.parametrize("subsampling", [None, [3, 0]])
def test_every_quantity_is_verified_and_the_model_left_as_it_is(subsampling, capsys):
    model, *rest = problem()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exts = [getattr(extensions, name)(subsampling=subsampling) for name in QUANTITIES]
    outcome = verify(model, *rest, *exts, GaussNewtonStep(0.1, subsampling))
    assert outcome.passed and {row.verdict for row in outcome.rows} == {"right"}
    assert len(outcome.rows) == 6 * (len(QUANTITIES) + 1) and str(outcome) in capsys.readouterr().out
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules()) and all(p.grad is None for p in model.parameters())


class Scalars(nn.Module):
    """Parameters without axes, and one without entries; the output is put into any container."""

    def __init__(self, form):
        super().__init__()
        self.form, self.a, self.b = form, nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale, self.shift = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(1.3))
        self.empty = nn.Parameter(torch.zeros(0))

    def forward(self, x):
        h = (self.a(x) * self.scale).tanh()
        return self.form(self.b(torch.cat([h, h[:, :0] + self.empty], 1)) + self.shift)


@dataclass
class Scores:
    loss: Any
    scores: torch.Tensor


@dataclass
class Unnamed(ModelOutput):
    prediction: torch.Tensor | None = None


OUTPUTS = {
    "tuple": lambda out: (torch.arange(3), out, 1),
    "dictionary": lambda out: OrderedDict(count=len(out), scores=out),
    "named in a dictionary": lambda out: {"hidden": out.sum(1), "logits": out},
    "dataclass": lambda out: Scores(None, out),
    "named in a dataclass": lambda out: SequenceClassifierOutput(logits=out, hidden_states=(2 * out,)),
    "mapping and dataclass": lambda out: Unnamed(prediction=out),
    "nested": lambda out: {"all": [Scores(None, out)]},
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_outputs_of_all_forms_and_parameters_without_axes_are_verified(form):
    model, lossfunc = Scalars(OUTPUTS[form]), nn.CrossEntropyLoss()
    exts = [
        getattr(extensions, name)(*required(5).get(name, ()))
        for name in extensions.__all__
        if name not in ("KFRA", "DiagHessianMC")
    ]
    exts = exts if form == "dataclass" else exts[::6]
    outcome = verify(model, lossfunc, torch.rand(5, 3), torch.tensor([0, 1, 1, 0, 1]), *exts)
    assert {row.verdict for row in outcome.rows} == {"right"}, outcome
    assert {row.parameter for row in outcome.rows} >= {"a.weight", "a.bias", "b.weight", "b.bias", "scale", "shift"}


def test_an_output_without_a_tensor_is_an_error_with_the_remedy():
    with pytest.raises(TypeError, match="holds no tensor .*forward=function"):
        verify(Scalars(lambda out: [1]), nn.MSELoss(), torch.rand(5, 3), torch.rand(5, 2), BatchGrad())


@pytest.mark.parametrize("subsampling", [None, [3, 0, 3]])
def test_averaged_and_positive_curvature_are_verified(subsampling):
    model, *rest = problem()
    strategies = {
        "a": ("ggn", "sampling"),
        "b": ("hessian", "exact"),
        "c": ("pch-abs", "sum"),
        "d": ("pch-clip", "sum"),
    }
    exts = [
        HBP(curvature, loss, "average", "E[J^T E(H) J]", name, 2, subsampling, approx="expand" if name == "d" else None)
        for name, (curvature, loss) in strategies.items()
    ]
    exts += [KFRA(subsampling), KFRA(subsampling, approx="reduce")]
    exts += [PCHMP(subsampling=subsampling), PCHMP("absolute", "abs", subsampling)]
    outcome = verify(model.eval(), *rest, *exts)
    assert {row.verdict for row in outcome.rows} == {"right"}, outcome
    assert len(outcome.rows) == 6 * len(exts)


@pytest.mark.parametrize(
    ("place", "extension"),
    [
        ("backpack.curvature.averaged.second_moment", KFRA()),
        (
            "backpack.curvature.averaged_hessian.AveragedHessianPass._modified",
            HBP("hessian", "sum", "average", "E[J^T E(H) J]"),
        ),
        ("backpack.curvature.residuals.residual.Blocks._to_blocks", PCHMP()),
    ],
)
def test_broken_curvature_is_found_wrong(place, extension, monkeypatch):
    parent, name = place.rsplit(".", 1)
    owner = pydoc.locate(parent)
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: 1.001 * function(*args))
    model, *rest = problem()
    outcome = verify(model.eval(), *rest, extension)
    assert any(row.verdict == "wrong" for row in outcome.rows), outcome


class TiedWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(3, 2)

    def forward(self, index):
        return (self.words(index).tanh() @ self.words.weight.T).mean(1)


def test_factors_of_words_in_one_sample_are_verified(monkeypatch):
    """Those of looked up rows are diagonal, also where positions are averaged first."""
    monkeypatch.setattr("backpack.uses.kronecker.LARGEST", 1)
    X, y = torch.tensor([[0, 1, 2], [2, 2, 0]]), torch.tensor([0, 1])
    exts = [KFLR(approx=approx) for approx in (None, "expand", "reduce")]
    exts += [extensions.EKFAC(fisher="exact", approx=approx) for approx in (None, "expand", "reduce")]
    single = nn.Sequential(nn.Embedding(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))
    for model in (TiedWords(), single):
        outcome = verify(model, nn.CrossEntropyLoss(), X, y, *exts)
        assert {row.verdict for row in outcome.rows} == {"right"}, outcome


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def test_second_derivatives_through_attention_are_verified():
    model = nn.Sequential(nn.Embedding(7, 4), Attention(), Attention(), nn.Flatten(), nn.Linear(8, 2))
    X, y = torch.randint(0, 7, (3, 2)), torch.tensor([0, 1, 1])
    names = ["BatchGrad", "DiagHessian", "BatchDiagHessian"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*which costs")
        assert verify(model, nn.CrossEntropyLoss(), X, y, *[getattr(extensions, name)() for name in names]).passed


class Broken(FirstOrderModuleExtension):
    def __init__(self):
        super().__init__(["weight"])

    def weight(self, ext, module, g_inp, g_out, bpQuantities):
        return 1.001 * torch.einsum("no,ni->noi", g_out[0], module.input0)


def test_a_broken_rule_is_caught():
    extension = BatchGrad()
    extension.set_module_extension(nn.Linear, Broken(), overwrite=True)
    outcome = verify(*problem(), extension)
    assert not outcome.passed
    assert [row.parameter for row in outcome.rows if row.verdict == "wrong"] == ["5.weight"]


class Largest(BackpropExtension):
    savefield = "largest"

    def compute(self, grads):
        return grads.dense().abs().amax((0, 1))


class LargestOfColumns(CurvatureExtension):
    savefield = "largest_of_columns"

    def compute(self, grads):
        return grads.dense().abs().amax((0, 1))


@pytest.mark.parametrize("subsampling", [None, [3, 0, 3]])
def test_an_extension_of_a_users_own_is_compared_with_its_definition(subsampling, monkeypatch):
    model, *rest = problem()
    outcome = verify(model.eval(), *rest, Largest(subsampling=subsampling))
    assert len(outcome.rows) == 6 and {row.verdict for row in outcome.rows} == {"right"}, outcome
    right = Dense._dense
    monkeypatch.setattr(Dense, "_dense", lambda self: 1.001 * right(self))
    outcome = verify(model.eval(), *rest, Largest(subsampling=subsampling))
    assert {row.parameter for row in outcome.rows if row.verdict == "wrong"} == {"0.weight", "5.weight"}, outcome


def test_what_is_refused_or_not_compared_is_said():
    with pytest.warns(UserWarning, match="Samples are mixed by NativeBatchNorm of parameter 1.weight"):
        outcome = verify(*problem(training=True), BatchGrad(), DiagGGNExact())
    assert outcome.passed
    outcome = verify(*problem(training=True), KFLR())
    assert not outcome.passed and "refused: KFLR: samples are mixed by NativeBatchNorm" in str(outcome)
    model, *rest = problem()
    outcome = verify(model.eval(), *rest, LargestOfColumns(), HMP(), GGNMP(subsampling=[1]))
    verdicts = {row.quantity: row.verdict for row in outcome.rows if row.parameter.endswith("weight")}
    assert outcome.passed and verdicts["hmp"] == verdicts["ggnmp"] == "right"
    assert "no check is known" in verdicts["largest_of_columns"]
    with pytest.raises(ValueError, match="needs the extensions"):
        verify(*problem())


class Distances(nn.Module):
    """A function without a second derivative."""

    def __init__(self):
        super().__init__()
        self.centers, self.out = nn.Parameter(torch.rand(3, 2)), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(torch.cdist(x[:, None], self.centers)[:, 0])


def test_functions_without_a_second_derivative_are_compared_or_said():
    given = Distances(), nn.CrossEntropyLoss(), torch.rand(3, 2), torch.tensor([0, 1, 1])
    names = ["BatchGrad", "Variance", "BatchDiagGGNExact", "SqrtGGNExact", "KFLR"]
    assert verify(*given, *[getattr(extensions, name)() for name in names]).passed
    outcome = verify(*given, DiagHessian(), HMP())
    assert [row.verdict for row in outcome.rows if row.verdict.startswith("refused")] and not outcome.passed
    assert "not compared: PyTorch has no second derivative" in outcome.rows[-1].verdict + outcome.rows[1].verdict


class Several(nn.Linear):
    def forward(self, x):
        return {"loss": None, "states": x.clone(), "logits": super().forward(x)}


@pytest.mark.parametrize("model", [Several(3, 4), nn.LSTM(3, 4), nn.GRU(3, 4, batch_first=True)])
def test_outputs_of_several_tensors_are_what_the_loss_takes(model):
    """By themselves the first tensor."""
    X = torch.rand(2, 5, 3)
    exts = [BatchGrad(), DiagGGNMC(), KFLR()]
    if not isinstance(model, Several):
        assert verify(model, nn.MSELoss(), X, torch.rand(2, 5, 4), *exts).passed

    def chosen(model, batch):
        out, target = model(batch[0]), batch[1]
        return out["logits"] if isinstance(out, dict) else out[0], target

    assert verify(model, nn.MSELoss(), X, torch.rand(2, 5, 4), *exts, forward=chosen).passed


def test_a_summary_tells_uses_ways_and_refusals(capsys):
    model, _, X, _ = problem()
    lines = {line.parameter: line for line in summary(model, X, BatchGrad(), BatchL2Grad(subsampling=[0])).lines}
    assert list(lines) == [name for name, _ in model.named_parameters()]
    assert lines["0.weight"].kind == "linear map" and lines["0.weight"].positions > 1
    assert lines["1.weight"].kind == "scale" and lines["0.bias"].kind == "shift"
    assert lines["5.weight"].how["BatchGrad"].startswith("stored")
    assert lines["5.weight"].how["BatchL2Grad"].startswith("closed form")
    model, _, X, _ = problem(training=True)
    model[0].weight.requires_grad_(False)
    model.append(nn.Linear(3, 3))
    assert "refused" not in str(summary(model, X, BatchGrad())).lower()
    found = str(summary(model, X, BatchGrad(), DiagGGNMC(), KFLR()))
    assert "Samples are mixed by NativeBatchNorm of parameter 1.weight" in found
    assert "Will be refused: KFLR: samples are mixed by NativeBatchNorm of parameter 1.weight" in found
    assert "DiagGGNMC:" not in found
    assert "frozen" in found and found in capsys.readouterr().out
    assert not any(m._forward_hooks for m in model.modules())
