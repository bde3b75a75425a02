"""Means over steps: what they are, what they keep, and how they go on from a file."""

import copy
import gc
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from truths import close
from truths.options import required

from backpack import RunningMean, backpack, extend, extensions, results
from backpack.extensions import (
    EKFAC,
    GGNMP,
    KFAC,
    KFLR,
    BatchGrad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    GGNGram,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.merge_batches import Joined, Listed, Summed
from backpack.utils.kroneckers import eigh_kfacs

R = torch.float64


class Experts(nn.Module):
    """Samples go to one of the experts; the last may get none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))

    def forward(self, x):
        chosen = (x[:, 0] * 10).long().clamp(max=2)
        out = x.new_zeros(len(x), 2)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return out


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def ready(model, dtype=R):
    torch.manual_seed(0)
    return extend(model.to(dtype)), extend(nn.CrossEntropyLoss())


def listed(value):
    return value if isinstance(value, list) else [value]


def step(model, lossfunc, *exts, n=5, dtype=R, low=0.0):
    """A backward pass of a new batch."""
    X, y = torch.rand(n, 3, dtype=dtype) + low, torch.randint(2, (n,))
    model.zero_grad()
    with backpack(*exts):
        lossfunc(model(X), y).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * (0 if p.grad is None else p.grad)


def weighted(history, decay):
    """The mean of what there was in some steps, the oldest first."""
    ages = range(len(history) - 1, -1, -1)
    weights = [1.0 if decay is None else decay**age if age else 1.0 for age in ages]
    places = zip(*map(listed, history), strict=True)
    return [sum(w * t for w, t in zip(weights, own, strict=True)) / sum(weights) for own in places]


SUMMED = [name for name in extensions.__all__ if isinstance(getattr(extensions, name).batches, (Summed, Listed))]


def build(name, **options):
    return getattr(extensions, name)(*required(5).get(name, ()), **options)


@pytest.mark.parametrize("name", SUMMED)
@pytest.mark.parametrize("decay", [None, 0.7, 0.0])
def test_the_mean_is_the_weighted_mean_of_all_steps(name, decay):
    assert {"KFAC", "DiagGGNMC", "SumGradSquared", "ClippedGrad"} <= {*SUMMED}
    model, lossfunc = ready(net())
    extension, history = build(name, savefield="mine"), {}
    mean = RunningMean(extension, decay)
    for _ in range(4):
        step(model, lossfunc, extension)
        mean.update(model)
        for key, value in results(model, extension).items():
            history.setdefault(key, []).append(copy.deepcopy(value))
        for key, found in mean.items():
            true = weighted(history[key], decay)
            assert isinstance(found, list) == isinstance(history[key][0], list)
            assert all(close(a, b) for a, b in zip(listed(found), true, strict=True)), key
    assert [*mean] == [name for name, _ in model.named_parameters()] and len(mean) == 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=30), st.sampled_from([None, 0.0, 0.5, 0.99, 0.9999999]))
def test_the_weights_add_up_to_one_after_any_number_of_steps(numbers, decay):
    model, extension = nn.Linear(2, 1, dtype=R), SumGradSquared()
    mean = RunningMean(extension, decay)
    for number in numbers:
        for p in model.parameters():
            p.sum_grad_squared = torch.full_like(p.detach(), number)
        mean.update(model)
    (expected,) = weighted([torch.tensor(float(number), dtype=R) for number in numbers], decay)
    assert close(mean["weight"], expected.expand(1, 2), 9.0, 1e-7 if decay == 0.9999999 else 1e-10)


@pytest.mark.parametrize("decay", [None, 0.8])
def test_a_parameter_that_takes_no_part_in_a_step_keeps_its_mean_and_weights(decay):
    model, lossfunc = ready(Experts())
    extension, history = DiagGGNExact(), {}
    mean = RunningMean(extension, decay)
    for low in (0.0, 0.3, 0.0, 0.1, 0.3, 0.0):
        step(model, lossfunc, extension, n=4, low=low)
        mean.update(model)
        for key, value in results(model, extension).items():
            history.setdefault(key, []).append(value)
    counts = {key: len(value) for key, value in history.items()}
    assert len(set(counts.values())) > 1 and mean.state_dict()["steps"] == counts
    for key, found in mean.items():
        assert close(found, weighted(history[key], decay)[0]), key


def test_what_was_read_is_not_changed_by_further_steps_and_results_are_not_changed():
    model, lossfunc = ready(net())
    extension = KFLR()
    mean = RunningMean(extension)
    step(model, lossfunc, extension)
    own = [[factor.clone() for factor in p.kflr] for p in model.parameters()]
    mean.update(model)
    first = results(model, extension)
    read, copies = dict(mean), copy.deepcopy(dict(mean))
    for _ in range(2):
        step(model, lossfunc, extension)
        mean.update(model)
    assert all(torch.equal(a, b) for name in read for a, b in zip(read[name], copies[name], strict=True))
    assert all(torch.equal(a, b) for one, two in zip(own, first.values(), strict=True) for a, b in zip(one, two))  # noqa: B905


@pytest.mark.parametrize("extension", [KFAC(), DiagGGNMC(), SumGradSquared()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("decay", [None, 0.95])
def test_a_mean_goes_on_from_a_file_with_the_same_bits(extension, decay, tmp_path):
    def steps(model, lossfunc, mean, count, seed):
        torch.manual_seed(seed)
        for _ in range(count):
            step(model, lossfunc, extension)
            mean.update(model)

    model, lossfunc = ready(net())
    mean = RunningMean(extension, decay)
    steps(model, lossfunc, mean, 3, seed=1)
    torch.save({"model": model.state_dict(), "mean": mean.state_dict()}, tmp_path / "file.pt")
    steps(model, lossfunc, mean, 2, seed=2)

    state = torch.load(tmp_path / "file.pt", weights_only=True)
    again, lossfunc = ready(net())
    again.load_state_dict(state["model"])
    resumed = RunningMean(type(extension)(subsampling=[0], savefield=extension.savefield), decay)
    resumed.load_state_dict(state["mean"])
    before = copy.deepcopy(state["mean"])
    steps(again, lossfunc, resumed, 2, seed=2)
    assert [*resumed] == [*mean]
    for name in mean:
        assert all(map(torch.equal, listed(mean[name]), listed(resumed[name])))
        assert all(map(torch.equal, listed(before["means"][name]), listed(state["mean"]["means"][name])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, R])
def test_means_of_16_bit_results_are_in_float32(dtype):
    extension, model = SumGradSquared(), nn.Linear(2, 1, dtype=dtype)
    mean = RunningMean(extension, None)
    for k in range(300):
        for p in model.parameters():
            p.sum_grad_squared = torch.full_like(p.detach(), 1 + k % 2)
        mean.update(model)
    assert mean["weight"].dtype == (R if dtype == R else torch.float32)
    assert torch.allclose(mean["weight"], torch.tensor(1.5, dtype=mean["weight"].dtype))


def test_a_mean_follows_its_model_to_another_precision():
    extension, model = SumGradSquared(), nn.Linear(2, 1)
    mean = RunningMean(extension, None)
    for dtype in (torch.float32, R):
        model.to(dtype)
        for p in model.parameters():
            p.sum_grad_squared = torch.ones_like(p.detach())
        mean.update(model)
    assert mean["weight"].dtype == R and bool((mean["weight"] == 1).all())


def test_means_of_complex_factors_are_right():
    extension, model = KFAC(), nn.Linear(2, 2, dtype=torch.complex128)
    mean = RunningMean(extension, 0.5)
    factors = [torch.randn(2, 2, dtype=torch.complex128) for _ in range(2)]
    for factor in factors:
        model.weight.kfac = [factor]
        mean.update(model)
    assert close(mean["weight"][0], (factors[0] + 2 * factors[1]) / 3)


def test_a_mean_keeps_no_graph_alive():
    model, lossfunc = ready(net())
    extension = SumGradSquared()
    mean = RunningMean(extension)
    for _ in range(2):
        loss = lossfunc(model(torch.rand(4, 3, dtype=R)), torch.randint(2, (4,)))
        with backpack(extension):
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        assert model[0].weight.sum_grad_squared.requires_grad
        mean.update(model)
    assert not any(value.requires_grad for value in mean.values())
    gone = ref(loss.grad_fn.next_functions[0][0].metadata.setdefault("mine", nn.Module()))
    for p in model.parameters():
        p.grad = None
        del p.sum_grad_squared
    del loss
    gc.collect()
    assert gone() is None


def test_a_mean_of_factors_takes_their_place():
    model, lossfunc = ready(net())
    mean = RunningMean(KFAC())
    for _ in range(2):
        step(model, lossfunc, KFAC(subsampling=[0, 1]))
        mean.update(model)
    blocks = {name: eigh_kfacs(factors) for name, factors in mean.items()}
    assert blocks["0.weight"].sample(damping=1.0).shape == (12,)
    assert repr(mean) == "RunningMean(KFAC(), decay=0.95)"


class Mine(BackpropExtension):
    savefield = "mine"

    def compute(self, grads):
        return grads.total()


@pytest.mark.parametrize(
    "extension, remedy",
    [
        (BatchGrad(), "single samples.*DiagGGNExact in place of BatchDiagGGNExact"),
        (SqrtGGNExact(), "single samples"),
        (GGNGram(), "single samples"),
        (EKFAC(), "Average KFAC, and decompose the mean"),
        (Variance(), "Average SumGradSquared"),
        (GGNMP(), "functions. Average a diagonal"),
        (Mine(), r"set batches = Summed\(degree\)"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_does_not_add_up_is_refused_with_a_remedy(extension, remedy):
    with pytest.raises(ValueError, match=rf"results that add up, and {type(extension).__name__}.*{remedy}"):
        RunningMean(extension)


def test_every_extension_has_a_mean_or_is_refused():
    for name in extensions.__all__:
        extension = build(name)
        if isinstance(extension.batches, (Summed, Listed)):
            RunningMean(extension)
        else:
            with pytest.raises(ValueError, match="results that add up") as caught:
                RunningMean(extension)
            assert "does not say" not in str(caught.value)
            assert ("single samples" in str(caught.value)) == (
                isinstance(extension.batches, Joined) or name in ("GGNGram", "BatchDotGrad")
            )


def test_the_remedies_work():
    class Summing(Mine):
        batches = Summed(1)

    model, lossfunc = ready(net())
    mean = RunningMean(Summing())
    step(model, lossfunc, Summing())
    mean.update(model)
    assert close(mean["0.weight"], model[0].weight.grad)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="takes an instance of an extension"):
        RunningMean(DiagGGNMC)
    for decay in (1.0, -0.1, 2, float("nan")):
        with pytest.raises(ValueError, match="decay must be at least 0"):
            RunningMean(DiagGGNMC(), decay)


def test_steps_of_another_model_are_refused_and_leave_the_mean_as_it_was():
    model, lossfunc = ready(net())
    extension = SumGradSquared()
    mean = RunningMean(extension)
    with pytest.raises(ValueError, match=r"No parameter of the model has \.sum_grad_squared: run backward"):
        mean.update(model)
    step(model, lossfunc, extension)
    mean.update(model)
    before = copy.deepcopy(mean.state_dict())
    other, lossfunc = ready(nn.Sequential(nn.Linear(3, 2)))
    step(other, lossfunc, extension)
    with pytest.raises(ValueError, match=r"has no parameter '2\.bias', of which there is a mean"):
        mean.update(other)
    wider, lossfunc = ready(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)))
    step(wider, lossfunc, extension)
    with pytest.raises(ValueError, match=r"has the shape .*, and its mean"):
        mean.update(wider)
    assert mean.state_dict()["steps"] == before["steps"]
    assert all(torch.equal(mean[name], before["means"][name]) for name in mean)
    step(model, extend(nn.CrossEntropyLoss()), extension)
    mean.update(model)  # the remedy


def test_states_of_other_means_are_refused():
    state = RunningMean(KFAC(approx="expand"), 0.9).state_dict()
    for mean in (RunningMean(KFAC(), 0.9), RunningMean(KFLR(), 0.9), RunningMean(KFAC(approx="expand"), None)):
        with pytest.raises(ValueError, match="state of the RunningMean has the .* give both the same"):
            mean.load_state_dict(state)
    with pytest.raises(ValueError, match="no state of a RunningMean; its keys are 'weight'"):
        RunningMean(KFAC()).load_state_dict({"weight": torch.ones(2)})
    RunningMean(KFAC(approx="expand", savefield="mine"), 0.9).load_state_dict(state)
    RunningMean(DiagHessian(chunk_size=1), None).load_state_dict(RunningMean(DiagHessian(), None).state_dict())
    assert ClippedGrad.batches  # options that change the numbers count
    with pytest.raises(ValueError, match="max_norm=2"):
        RunningMean(ClippedGrad(1.0)).load_state_dict(RunningMean(ClippedGrad(2.0)).state_dict())
