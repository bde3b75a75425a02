"""What is computed for a data set is what one giant batch would give."""

import copy

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding
from truths import close
from truths.data_sets import (
    LOSSES,
    all_extensions,
    bound_of,
    check,
    check_hessians,
    check_others,
    fixed_draws,
    giant,
    hessian_diagonals,
    other_extensions,
    problem,
    targets,
)
from truths.options import CASES

from backpack import accumulate, across_processes, backpack, extend, extensions
from backpack.extensions import (
    EKFAC,
    GGNMP,
    HBP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagGGNExact,
    BatchGrad,
    DiagGGNExact,
    DiagHessianMC,
    GaussNewtonStep,
    SumGradSquared,
    Variance,
)
from backpack.extensions.backprop_extension import BackpropExtension


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("rows", [None, [7, 2, -1, 2]])
def test_results_equal_one_giant_batch(kind, rows):
    lossfunc, divided = LOSSES[kind]
    model, lossfunc, X, _ = problem(copy.deepcopy(lossfunc))
    y = targets(kind)
    truth = giant(model, lossfunc, X, y, divided(y), rows)
    bound = bound_of(truth)
    data = DataLoader(TensorDataset(X, y), batch_size=4)
    found = accumulate(model, lossfunc, data, *all_extensions(bound, rows))
    assert found.samples == 11
    check(found, truth, bound, model)


def test_without_knowing_the_whole_beforehand_the_result_is_the_same():
    """An iterable of unknown length, read once."""
    model, lossfunc, X, y = problem()
    truth = giant(model, lossfunc, X, y, 11)
    reads = []

    def batches():
        reads.append(1)
        yield from zip(X.split(4), y.split(4), strict=True)

    found = accumulate(model, lossfunc, batches(), Variance(), BatchGrad(), DiagGGNExact())
    assert reads == [1]
    for name, g in truth["individual"].items():
        assert close(found["grad_batch"][name], g) and close(found["variance"][name], g.var(0, correction=0))
        assert close(found["diag_ggn_exact"][name], truth["roots"][name].square().sum((0, 1)))


@pytest.mark.parametrize("rows", [None, [7, 2, -1, 2]])
def test_results_of_samples_are_streamed_to_files_in_the_order_of_the_data(rows, tmp_path):
    model, lossfunc, X, y = problem()
    truth = giant(model, lossfunc, X, y, 11, rows)
    bound = bound_of(truth)
    data = DataLoader(TensorDataset(X, y), batch_size=4)
    found = accumulate(model, lossfunc, data, *all_extensions(bound, rows), stream=tmp_path / "new" / "results")
    check(found, truth, bound, model)
    files = sorted(path.name for path in (tmp_path / "new" / "results").iterdir())
    indices = {file for file in files if file.startswith("samples.")}
    numbers = torch.arange(11)[rows or slice(None)]
    for file in indices:
        assert torch.equal(torch.from_numpy(numpy.load(tmp_path / "new" / "results" / file)), numbers)
    files = [file for file in files if file not in indices]
    fields = {file.split(".")[0] for file in files}
    assert indices == {f"samples.{field}.npy" for field in fields}
    assert fields >= {"grad_batch", "batch_l2", "batch_dot", "sqrt_ggn_exact", "diag_ggn_exact_batch", "ggn_gram"}
    assert files == sorted(f"{field}.{name}.npy" for field in fields for name, _ in model.named_parameters())
    stored = numpy.load(tmp_path / "new" / "results" / "sqrt_ggn_exact.0.weight.npy")
    assert torch.equal(torch.from_numpy(stored).movedim(0, 1), found["sqrt_ggn_exact"]["0.weight"])


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_batch(tmp_path):
    model, lossfunc, X, y = problem()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", "/proc/self"):  # the second one is there, but cannot be written to
        with pytest.raises(OSError, match=f"stream='{folder}' is no folder to write results to"):
            accumulate(model, lossfunc, iter([]), BatchGrad(), stream=folder)


@pytest.mark.parametrize("kind", ["mse", "bce", "weighted"])
@pytest.mark.parametrize("rows", [None, [7, 2, -1, 2]])
def test_sampled_quantities_and_those_of_the_hessian_equal_one_giant_batch(kind, rows):
    """Sampled ones for losses whose draws can be fixed."""
    lossfunc, divided = LOSSES[kind]
    model, lossfunc, X, _ = problem(copy.deepcopy(lossfunc))
    y = targets(kind)
    truth = giant(model, lossfunc, X, y, divided(y), rows)
    with fixed_draws():
        found = accumulate(model, lossfunc, DataLoader(TensorDataset(X, y), batch_size=4), *other_extensions(rows))
    check_hessians(found, hessian_diagonals(model, lossfunc, X, y, divided(y), rows))
    if kind != "weighted":
        check_others(found, truth, model, divided(y))


def test_every_extension_is_compared_with_one_giant_batch_or_refused():
    """Here or, with several processes, in ``in_processes.py``; what is random in more than its draws: on average.

    Those that need arguments: in ``test_options_of_first_order.py``.
    """
    tables = {type(extension) for extension in (*all_extensions(1.0), *other_extensions())}
    tables |= {type(case.make({"p": torch.ones(1, 1)}, None, [0])) for case in CASES.values()}
    on_average, averages, refused = {DiagHessianMC}, {KFRA}, {HMP, GGNMP, PCHMP}
    assert tables | on_average | averages | refused | {GaussNewtonStep} == {
        getattr(extensions, name) for name in extensions.__all__
    }
    model, lossfunc, X, y = problem()
    for extension in refused:
        with pytest.raises(ValueError, match="no meaning for more than one batch: .* weighted sum of its batches'"):
            accumulate(model, lossfunc, [(X, y)], EKFAC(), extension())
    with pytest.raises(ValueError, match="no meaning for more than one batch: .* KFAC or EKFAC"):
        accumulate(model, lossfunc, [(X, y)], EKFAC(), GaussNewtonStep(0.1))
    with pytest.raises(ValueError, match="accumulate.* does that"), across_processes(model, EKFAC(), samples=11):
        pass


def test_the_estimate_of_the_hessians_diagonal_is_right_on_average():
    model, lossfunc, X, y = problem()
    truth = hessian_diagonals(model, lossfunc, X, y, 11)
    data = [*zip(X.split(4), y.split(4), strict=True)]
    drawn = [accumulate(model, lossfunc, data, DiagHessianMC(10))["diag_h_mc"] for _ in range(30)]
    for name, h in truth.items():
        found = torch.stack([result[name] for result in drawn])
        error = (found.mean(0) - h.sum(0)).abs()
        assert (error < 6 * found.std(0) / len(drawn) ** 0.5 + 1e-10).all()  # one of 41 beyond: 1 of 10,000 runs


class Tied(nn.Module):
    """The embedding is the output layer as well, and one of its uses is transposed."""

    def __init__(self):
        super().__init__()
        self.embedding, self.square = nn.Embedding(5, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, index):
        hidden = (self.embedding(index) @ self.square).tanh() @ self.square.T
        return (hidden @ self.embedding.weight.T).mean(1)


def test_kronecker_factors_of_parameters_with_several_uses_are_those_of_one_batch():
    torch.manual_seed(0)
    model, lossfunc = extend(Tied().double()), extend(nn.CrossEntropyLoss(weight=torch.arange(1.0, 6).double()))
    X, y = torch.randint(0, 5, (9, 3)), torch.arange(9) % 5
    for extension in (KFLR(), KFLR(approx="expand"), KFAC(fisher="empirical", subsampling=[8, 0, 3])):
        with backpack(extension):
            lossfunc(model(X), y).backward()
        whole = {name: getattr(p, extension.savefield) for name, p in model.named_parameters()}
        found = accumulate(model, lossfunc, DataLoader(TensorDataset(X, y), batch_size=4), extension)
        for name, factors in whole.items():
            for factor, expected in zip(found[extension.savefield][name], factors, strict=True):
                assert close(factor, expected), name


def test_factors_of_rows_and_columns_of_a_large_table_are_those_of_one_batch(monkeypatch):
    monkeypatch.setattr("backpack.uses.kronecker.LARGEST", 4)
    torch.manual_seed(0)

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 2))

        def forward(self, x):
            return (x + self.table).tanh().flatten(1)

    model, lossfunc, X, y = Table().double(), nn.MSELoss(), torch.randn(5, 3, 2).double(), torch.randn(5, 6).double()
    found = accumulate(model, lossfunc, [(X[:2], y[:2]), (X[2:], y[2:])], KFLR())["kflr"]["table"]
    slopes = (2 / 30) ** 0.5 * (1 - model(X).detach().square())  # of the root's columns; each reaches one entry
    moments = slopes.reshape(5, 3, 2).square()
    assert close(found[0], torch.diag(moments.sum((0, 2))))
    assert close(found[1], torch.diag(moments.sum((0, 1)) / moments.sum()))


def test_recursions_of_averages_are_averaged_over_batches():
    """Of one layer, where nothing is averaged on the way, they are those of one giant batch."""
    torch.manual_seed(0)
    model, lossfunc = nn.Sequential(nn.Linear(4, 3)).double(), nn.CrossEntropyLoss()
    X, y = torch.randn(7, 4).double(), torch.arange(7) % 3
    extensions = (
        KFRA(),
        HBP("ggn", "exact", "average", "E[J^T E(H) J]"),
        HBP("ggn", "exact", "sqrt", "E[J^T E(H) J]", "s"),
    )
    found = accumulate(model, lossfunc, DataLoader(TensorDataset(X, y), batch_size=3), *extensions)
    p = model(X).softmax(1).detach()
    B = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    for extension in extensions:
        assert close(found[extension.savefield]["0.weight"][0], B)
        assert close(found[extension.savefield]["0.weight"][1], X.T @ X / 7)
        assert close(found[extension.savefield]["0.bias"][0], B)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, extra=None):
        return {"hidden": None, "logits": self.linear(x) + extra["shift"][0]}


@pytest.mark.parametrize("form", ["mapping", "pair of mapping", "pair of tuple", "own", "user mapping"])
def test_batches_of_any_form_are_understood(form):
    torch.manual_seed(0)
    model, lossfunc = Two().double(), nn.CrossEntropyLoss()
    X, shift, y = torch.randn(5, 4).double(), torch.randn(5, 3).double(), torch.tensor([0, 2, 1, 1, 0])
    forward = None

    def batch(rows):
        extra = {"shift": (shift[rows],)}
        if form == "mapping":
            return {"x": X[rows], "extra": extra, "labels": y[rows]}
        if form == "user mapping":
            return BatchEncoding({"x": X[rows], "extra": extra, "labels": y[rows]})
        if form == "pair of mapping":
            return {"x": X[rows], "extra": extra}, y[rows]
        if form == "pair of tuple":
            return [(X[rows], extra), y[rows]]
        return X[rows], extra, y[rows], "id"

    if form == "own":

        def forward(model, batch):
            return model(batch[0], extra=batch[1])["logits"], batch[2]

    found = accumulate(model, lossfunc, [batch(slice(0, 3)), batch(slice(3, 5))], BatchGrad(), forward=forward)
    truth = [
        torch.autograd.grad(
            lossfunc(model(X[[k]], {"shift": (shift[[k]],)})["logits"], y[[k]]) / 5, model.linear.weight
        )
        for k in range(5)
    ]
    assert close(found["grad_batch"]["linear.weight"], torch.cat([g[None] for (g,) in truth]))


class Sometimes(nn.Module):
    """Uses its second layer for batches with a positive first entry only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.first(x) + (self.second(x) if x[0, 0] > 0 else 0)


def test_a_parameter_that_some_batches_do_not_use_has_zeros_for_their_samples():
    torch.manual_seed(0)
    model, lossfunc = Sometimes().double(), nn.MSELoss()
    X, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    X[:, 0] = torch.tensor([1.0, 1, -1, -1, 1])
    found = accumulate(model, lossfunc, [(X[:2], y[:2]), (X[2:4], y[2:4]), (X[4:], y[4:])], BatchGrad(), Variance())
    for name, parameter in model.named_parameters():
        grads = []
        for k in range(5):
            (grad,) = torch.autograd.grad(lossfunc(model(X[[k]]), y[[k]]) / 5, parameter, allow_unused=True)
            grads.append(torch.zeros_like(parameter) if grad is None else grad)
        g = torch.stack(grads)
        assert close(found["grad_batch"][name], g) and close(found["variance"][name], g.var(0, correction=0))


def test_a_parameter_that_is_never_used_has_no_results(tmp_path):
    model, lossfunc, X, y = problem()
    model.register_parameter("unused", nn.Parameter(torch.zeros(2)))
    for where in ({}, {"stream": tmp_path}):
        found = accumulate(model, lossfunc, [(X, y)], BatchGrad(), Variance(), **where)
        assert not {"unused"} & {*found.grad, *found["grad_batch"], *found["variance"]}
        assert not hasattr(model.unused, "grad_batch")


@pytest.mark.parametrize("rows", [None, [7, 2, -1, 2]])
def test_large_parameters_whose_results_are_added_as_they_come_are_no_other(rows, monkeypatch):
    """Also if a gradient is taken in the forward pass, and if a hook changes one."""
    monkeypatch.setattr("backpack.dataset.collection.LARGE", 0)
    model, lossfunc, X, y = problem()
    truth = giant(model, lossfunc, X, y, 11, rows)
    bound = bound_of(truth)

    def forward(model, batch):
        with torch.enable_grad():
            (found,) = torch.autograd.grad(model[0].weight.square().sum(), model[0].weight)
        assert torch.equal(found, 2 * model[0].weight)
        return model(batch[0]), batch[1]

    data = DataLoader(TensorDataset(X, y), batch_size=4)
    check(accumulate(model, lossfunc, data, *all_extensions(bound, rows), forward=forward), truth, bound, model)
    with model[2].weight.register_hook(lambda grad: 2 * grad):
        found = accumulate(model, lossfunc, data, BatchGrad())
    for name, grad in truth["grad"].items():
        assert close(found.grad[name], grad * (2 if name == "2.weight" else 1))


def test_gradients_that_are_there_stay():
    model, lossfunc, X, y = problem()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    accumulate(model, lossfunc, [(X, y)], SumGradSquared())
    assert all(bool((p.grad == 1).all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lossfunc": nn.CrossEntropyLoss(reduction="none")}, ValueError, "reduction='none'"),
        ({"lossfunc": nn.MultiMarginLoss()}, ValueError, "denominator=function"),
        ({"dataloader": [torch.zeros(2, 4)]}, TypeError, "pair .inputs, targets.*forward="),
        ({"dataloader": ["text"]}, TypeError, "no tensor"),
        ({"dataloader": []}, ValueError, "empty"),
        ({"dataloader": iter([])}, ValueError, "empty"),
        ({"dataloader": iter([]), "extension": BatchGrad([0])}, ValueError, "can be read once only"),
        ({"extension": BatchGrad}, ValueError, "instances"),
        ({"dataloader": iter([]), "extension": EKFAC()}, ValueError, "read once only, but EKFAC takes two passes"),
        ({"extension": BackpropExtension("own")}, ValueError, "no meaning for more than one batch"),
        ({"extension": BatchGrad([11])}, IndexError, "11 is out of range for a batch of 11"),
    ],
)
def test_what_cannot_be_computed_is_refused(change, error, words):
    model, lossfunc, X, y = problem()
    given = {"lossfunc": lossfunc, "dataloader": [(X, y)], "extension": BatchGrad(), **change}
    with pytest.raises(error, match=words):
        accumulate(model, given["lossfunc"], given["dataloader"], given["extension"])


def test_a_batch_whose_first_tensor_is_another_than_the_models_is_refused():
    model, lossfunc, X, y = problem()
    with pytest.raises(ValueError, match="has 2 samples, but the model was called with"):
        accumulate(
            model,
            lossfunc,
            [(torch.zeros(2, 1), X, y)],
            Variance(),
            forward=lambda model, batch: (model(batch[1]), batch[2]),
        )


def test_a_loss_of_the_users_own_says_what_its_mean_divides_by():
    class Own(nn.Module):
        def forward(self, out, target):
            return (out - target).square().sum(1).mean()

    model, _, X, _ = problem()
    y = targets("mse")
    batches = list(zip(X.split(4), y.split(4), strict=True))
    found = accumulate(model, Own(), batches, Variance(), DiagGGNExact(), denominator=lambda batch: len(batch[0]))
    truth = giant(model, nn.MSELoss(), X, y, 11)
    for name, g in truth["individual"].items():
        assert close(found["variance"][name], g.var(0, correction=0))
        assert close(found["diag_ggn_exact"][name], truth["roots"][name].square().sum((0, 1)))


def test_nothing_is_printed_unless_there_is_a_terminal(capfd):
    model, lossfunc, X, y = problem()
    accumulate(model, lossfunc, [(X, y)] * 3, SumGradSquared())
    assert capfd.readouterr() == ("", "")
    accumulate(model, lossfunc, [(X, y)] * 3, SumGradSquared(), progress=True)
    assert "/3 [" in capfd.readouterr().err


class Reading(torch.autograd.Function):
    """Its backward pass reads a number, which ``torch.vmap`` does not allow."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad if grad.sum().item() < 1e9 else None


class Doubled(nn.Module):
    reading = False

    def forward(self, x):
        return Reading.apply(x) if self.reading else 2 * x


@pytest.mark.parametrize("large", [0, 2**20])
def test_results_of_a_pass_that_begins_anew_count_once(large, monkeypatch):
    """Of the last layer, results were there before the pass failed and its columns were pulled back one by one."""
    monkeypatch.setattr("backpack.curvature.spliced_graph.must_loop", lambda *graph: False)
    monkeypatch.setattr("backpack.dataset.collection.LARGE", large)
    model, lossfunc, X, y = problem()
    model[1] = nn.Sequential(nn.Tanh(), Doubled())
    truth = giant(model, lossfunc, X, y, 11)
    model[1][1].reading = True
    found = accumulate(model, lossfunc, [(X[:5], y[:5]), (X[5:], y[5:])], DiagGGNExact(), BatchDiagGGNExact())
    for name, v in truth["roots"].items():
        assert close(found["diag_ggn_exact"][name], v.square().sum((0, 1)))
        assert close(found["diag_ggn_exact_batch"][name], v.square().sum(0))
