"""Results for some parameters at a time, in files, equal those for all at once in memory."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models.layers import CASES, build
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset
from truths import close
from truths.data_sets import (
    LOSSES,
    all_extensions,
    check,
    check_others,
    fixed_draws,
    giant,
    other_extensions,
    problem,
    targets,
)

from backpack import accumulate
from backpack.curvature.columns import Columns
from backpack.dataset import CurvatureStore
from backpack.dataset.parts import divided, owners_of
from backpack.extensions import (
    EKFAC,
    HBP,
    KFAC,
    KFLR,
    KFRA,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    ProjectedGrad,
    SumGradSquared,
    Variance,
    WeightedGrad,
)
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.utils.kroneckers import kfacs_to_mat

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]
SCRIPT = str(Path(__file__).with_name("resumed_in_parts.py"))


def same(found, expected, equal=close):
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    return type(found) is type(expected) and all(equal(one, other) for one, other in pairs)


def without_clipping(rows=None):
    return [e for e in all_extensions(1.0, rows) if not isinstance(e, ClippedGrad)]


class WithBound(dict):
    """What parts compute, and in addition the results that take all parameters at once."""

    def __init__(self, found, clipped):
        super().__init__({**found.results, "grad_clipped": clipped})
        self.loss, self.grad = found.loss, found.grad


@pytest.mark.parametrize("kind", ["ignored", "mse", "sum"])
@pytest.mark.parametrize("rows", [None, [7, 2, -1, 2]])
@pytest.mark.parametrize("parts", [2, 9, [["2.bias", "0.weight"], ["0.bias"], ["2.weight"]]])
def test_results_in_parts_equal_one_giant_batch(kind, rows, parts, tmp_path):
    lossfunc, divides = LOSSES[kind]
    model, lossfunc, X, _ = problem(lossfunc)
    y = targets(kind)
    truth = giant(model, lossfunc, X, y, divides(y), rows)
    bound = 1.0
    data = DataLoader(TensorDataset(X, y), batch_size=4)
    found = accumulate(model, lossfunc, data, *without_clipping(rows), parts=parts, stream=tmp_path)
    clipped = accumulate(model, lossfunc, data, ClippedGrad(bound, rows))["grad_clipped"]
    check(WithBound(found, clipped), truth, bound, model)
    assert [*found.grad] == [*found["variance"]] == NAMES
    if kind == "mse":
        with fixed_draws():
            found = accumulate(model, lossfunc, data, *other_extensions(rows), parts=parts)
        check_others(found, truth, model, divides(y))


QUICK = ("mlp", "conv2d_0", "transposed2d_1", "batch_norm1d", "embedding", "lstm_0", "attention", "weight_norm",
         "shared_kernel", "tokens_flat", "adapter_merged")  # fmt: skip
OTHERS = sorted({*CASES} - {*QUICK, "lstm_root_sequence_first", "keywords_and_names"})
SETS = [
    lambda: [EKFAC(2), KFAC(2), KFLR(), DiagGGNMC(2), BatchGrad(), Variance(), BatchDotGrad(against=[0]),
             BatchL2Grad([-1, 0])],
    lambda: [DiagGGNMC(2), BatchGrad(), Variance(), SumGradSquared([0])],
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Samples are mixed", "ignore:The model is in training mode", "ignore:.*no sample")
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_parts_equal_the_whole(name):
    """Draws are the same, too; Kronecker factors where they are defined."""
    made = build(name)
    if len(made.inputs) != 1:
        pytest.skip("not one input")
    model, (x,) = made.model, made.inputs
    y = torch.rand_like(made.output())
    cut = max(1, len(x) - 1)
    data = [(x[:cut], y[:cut]), (x[cut:], y[cut:])][: 2 if cut < len(x) else 1]
    try:
        torch.manual_seed(3)
        whole = accumulate(model, nn.MSELoss(), data, *SETS[0]())
        extensions = SETS[0]
    except RuntimeError as error:
        assert "Kronecker factors are not defined" in str(error)
        extensions = SETS[1]
        torch.manual_seed(3)
        whole = accumulate(model, nn.MSELoss(), data, *extensions())
    for parts in (2, sum(p.requires_grad for p in model.parameters())):
        torch.manual_seed(3)
        found = accumulate(model, nn.MSELoss(), data, *extensions(), parts=parts)
        assert torch.equal(found.loss, whole.loss) and found.samples == whole.samples
        for own, expected in [(found.grad, whole.grad), *((found[field], whole[field]) for field in whole)]:
            assert [*own] == [*expected]
            assert all(same(own[name], expected[name]) for name in expected)
        for extension in extensions():
            for name, parameter in model.named_parameters():
                if name in found[extension.savefield]:
                    assert extension.result(parameter) is found[extension.savefield][name]


@pytest.mark.parametrize("parts", [2, 4])
def test_what_goes_through_all_layers_is_right_in_parts(parts):
    model, lossfunc, X, y = problem()
    data = [*zip(X.split(4), y.split(4), strict=True)]
    made = lambda: [KFRA(), HBP("ggn", "exact", "average", "E[J^T E(H) J]"), DiagHessian([3, 1])]  # noqa: E731
    whole = accumulate(model, lossfunc, data, *made())
    found = accumulate(model, lossfunc, data, *made(), parts=parts)
    for field in whole:
        assert all(same(found[field][name], whole[field][name]) for name in NAMES)


@pytest.mark.filterwarnings("ignore:The loader draws its samples", "ignore:The model is in training mode")
def test_all_passes_see_the_same_draws():
    """Of the order, of dropout, and of labels, in two passes for each part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 3)).double()
    data = DataLoader(TensorDataset(torch.randn(11, 4).double(), torch.arange(11) % 3), batch_size=4, shuffle=True)
    found = []
    for parts in (None, 3):
        torch.manual_seed(5)
        found.append(accumulate(model, nn.CrossEntropyLoss(), data, EKFAC(3), BatchGrad([10, 4]), parts=parts))
        found[-1].after = torch.rand(())
    whole, own = found
    assert torch.equal(whole.after, own.after) and torch.equal(whole.places["grad_batch"], own.places["grad_batch"])
    for field in whole:
        assert all(same(own[field][name], whole[field][name]) for name in whole[field])


class Stop(Exception):
    pass


class Noting(nn.Module):
    """Notes the gradients that come through; its inputs are kept, so that hooks are kept out of other passes."""

    def __init__(self):
        super().__init__()
        self.seen, self.inputs = [], []

    def forward(self, x):
        x.register_hook(self.seen.append)
        self.inputs.append(x)
        return x.clone()


class Counting(KFLR):
    savefield = "counted"

    def __init__(self):
        super().__init__()
        self.counts = {}

    def compute(self, grads):
        shape = tuple(grads.parameter.shape)
        self.counts[shape] = self.counts.get(shape, 0) + 1
        return super().compute(grads)


def test_each_result_is_computed_once_and_passes_end_at_the_part(monkeypatch):
    """A pass for the last layer runs no node below it."""
    model, lossfunc, X, y = problem()
    noting, extension, ends, begin = Noting(), Counting(), [], Columns.__init__
    model.insert(1, noting)

    def noted(self, *given):
        begin(self, *given)
        ends.append([place for node, place in self.places.items() if node in self.captured])

    monkeypatch.setattr(Columns, "__init__", noted)
    accumulate(model, lossfunc, [(X, y)], extension, Variance(), parts=[["3.weight", "3.bias"], ["0.weight", "0.bias"]])
    assert extension.counts == {(5, 4): 1, (5,): 1, (3, 5): 1, (3,): 1}
    assert len(noting.seen) == 1  # the gradient of the second pass
    (upper,), (lower,) = ends
    assert upper < lower  # places in the order of the graph


class Sometimes(nn.Module):
    """Uses its second layer for batches with a positive first entry only."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.never = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.first(x) + (self.second(x) if x[0, 0] > 0 else 0)


def test_a_part_that_some_batches_do_not_use(tmp_path):
    torch.manual_seed(0)
    model, lossfunc = Sometimes().double(), nn.MSELoss()
    X, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    X[:, 0] = torch.tensor([1.0, 1, -1, -1, 1])
    data = [(X[:2], y[:2]), (X[2:4], y[2:4]), (X[4:], y[4:])]
    parts = [["second.weight"], ["first.weight", "first.bias"], ["never.weight", "never.bias", "second.bias"]]
    for extensions in ([KFAC(), Variance(), DiagGGNMC()], [DiagGGNMC(), EKFAC()]):
        torch.manual_seed(3)
        whole = accumulate(model, lossfunc, data, *extensions)
        torch.manual_seed(3)
        found = accumulate(model, lossfunc, data, *extensions, parts=parts)
        torch.manual_seed(3)
        folder = tmp_path / str(len(extensions))
        stored = accumulate(model, lossfunc, data, *extensions, parts=parts, store=folder)
        assert [*found.grad] == [*stored.grad] == [*whole.grad]
        for field in whole:
            store = CurvatureStore(folder, field) if field != "ekfac" else None
            assert [*found[field]] == [*whole[field]] and not any("never" in name for name in found[field])
            assert all(same(found[field][name], whole[field][name]) for name in found[field])
            if store is not None:
                assert [*store] == [*whole[field]]
                assert all(same(store[name], whole[field][name]) for name in store)


def test_parts_need_about_equal_memory():
    layers = {f"{k}.weight": torch.empty(2**k, 4) for k in range(6)}
    found = divided(layers, [DiagGGNExact()], 2)
    assert found == [[f"{k}.weight" for k in range(5)], ["5.weight"]]  # 31 and 32 rows
    assert divided(layers, [KFLR()], 1) == [[*layers]]
    equal = {str(k): torch.empty(8, 8) for k in range(12)}
    assert [len(part) for part in divided(equal, [EKFAC()], 4)] == [3] * 4
    assert sum(divided(equal, [EKFAC()], 5), []) == [*equal]
    assert len(divided(equal, [EKFAC()], 50)) == 12


def test_owners_have_about_equal_work():
    sizes = {str(k): size for k, size in enumerate([9, 1, 4, 4, 4, 1])}
    owners = owners_of([[*sizes]], sizes, 2)
    loads = [sum(sizes[name] ** 1.5 for name, owner in owners.items() if owner == rank) for rank in range(2)]
    assert sorted(loads) == [26, 27]
    assert owners_of([["0"], ["1"], ["2"]], sizes, 2) == {"0": 0, "1": 1, "2": 1}
    assert set(owners_of([[*sizes]], sizes, 1).values()) == {0}


# Files


def run(folder=None, parts=3, seed=3, data=None, extensions=None, **further):
    model, lossfunc, X, y = problem()
    torch.manual_seed(seed)
    data = data or [*zip(X.split(4), y.split(4), strict=True)]
    extensions = extensions or [EKFAC(2), KFAC(2), Variance()]
    return model, accumulate(model, lossfunc, data, *extensions, parts=parts, store=folder, **further)


def test_files_hold_what_memory_would_and_results_leave_it(tmp_path):
    _, whole = run()
    model, found = run(tmp_path / "new" / "folder")
    assert not found.results and not any(hasattr(p, field) for p in model.parameters() for field in whole)
    assert torch.equal(found.loss, whole.loss)
    for field in whole:
        store = CurvatureStore(tmp_path / "new" / "folder", field)
        assert [*store] == NAMES and len(store) == 4
        assert all(same(store[name], whole[field][name], torch.equal) for name in NAMES)
    assert all(torch.equal(found.grad[name], whole.grad[name]) for name in NAMES)
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert files == sorted([*(f"{name}.safetensors" for name in NAMES), "run 0 of 1.safetensors"])


def test_one_part_can_be_stored_too(tmp_path):
    _, whole = run(None, None)
    run(tmp_path, None)
    assert all(same(CurvatureStore(tmp_path, "ekfac")[name], whole["ekfac"][name], torch.equal) for name in NAMES)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


class Failing(list):
    """Batches, the reading of which fails after so many in all passes together."""

    left = -1

    def __iter__(self):
        for batch in super().__iter__():
            if self.left == 0:
                raise Stop
            self.left -= 1
            yield batch


def batches():
    _, _, X, y = problem()
    return Failing(zip(X.split(4), y.split(4), strict=True))


@pytest.mark.parametrize("after", [0, 2, 3, 5, 6, 10, 13, 17])
@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_an_interrupted_run_ends_with_the_same_files(after, with_checkpoint, tmp_path):
    """Three parts, of two passes each, with three batches."""
    run(tmp_path / "undisturbed")
    data = batches()
    where = {"checkpoint": tmp_path / "c", "checkpoint_seconds": 0} if with_checkpoint else {}
    data.left = after
    with pytest.raises(Stop):
        run(tmp_path / "store", data=data, **where)
    data.left = -1
    _, found = run(tmp_path / "store", data=data, seed=99, **where)
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")
    data.left = 0
    _, again = run(tmp_path / "store", data=data, seed=98, **where)  # nothing is read
    assert torch.equal(found.loss, again.loss) and again.samples == 11
    assert all(torch.equal(found.grad[name], again.grad[name]) for name in NAMES)
    assert not any(path.name.startswith("c.") for path in tmp_path.iterdir())


class Filling(Failing):
    """The disk is full in the second part, by a limit on the size of files, which the system reports in that way."""

    limit = resource.RLIM_INFINITY

    def __iter__(self):
        self.left -= 1
        if self.left == -4:  # two passes for each part
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))
        return list.__iter__(self)


def test_a_disk_that_becomes_full_leaves_the_files_of_earlier_parts(tmp_path):
    run(tmp_path / "undisturbed")
    data = Filling(batches())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    data.limit = 100
    try:
        with pytest.raises(OSError, match="could not be written: .* The files of earlier parts are intact"):
            run(tmp_path / "store", data=data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, signal_before)
    written = contents(tmp_path / "store")
    assert 1 < len(written) < 5 and all("new" not in path.name for path in (tmp_path / "store").iterdir())
    run(tmp_path / "store", data=data, seed=9)
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def test_parts_in_memory_go_on_from_checkpoints(tmp_path):
    _, whole = run()
    data = batches()
    where = {"checkpoint": tmp_path / "c", "checkpoint_seconds": 0}
    for after in (1, 7, 9, 14):
        data.left = after
        with pytest.raises(Stop):
            run(data=data, seed=3 if after == 1 else 99, **where)
    data.left = -1
    _, found = run(data=data, seed=98, **where)
    for field in whole:
        assert all(same(found[field][name], whole[field][name], torch.equal) for name in NAMES)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert subprocess.run([sys.executable, "-W", "error", SCRIPT, str(folder)], check=False).returncode == 0
    return contents(folder / "store")


def kill_and_resume(folder, kills, draw):
    for number in range(kills + 1):
        process = subprocess.Popen([sys.executable, "-W", "error", SCRIPT, str(folder), "0.01"])
        if number < kills:
            while not (folder / "store" / "run 0 of 1.safetensors").exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 2.5) + (2.0 if number else 0.0))
            process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode in (0, -signal.SIGKILL)
    assert process.returncode == 0


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bit_identical(kills, tmp_path, undisturbed):
    kill_and_resume(tmp_path, kills, random.Random(kills))
    assert contents(tmp_path / "store") == undisturbed
    assert os.listdir(tmp_path) == ["store"]


# Products


def made(model, X, y, extensions, folder, lossfunc=None):
    accumulate(model, lossfunc or nn.CrossEntropyLoss(), [(X, y)], *extensions, store=folder, parts=2)
    return CurvatureStore(folder)


def vectors_for(model, count, dtype=None):
    return {name: torch.randn(count, *p.shape, dtype=dtype or p.dtype) for name, p in model.named_parameters()}


def dense_solve(block, v, damping):
    flat = v.flatten(1)
    return torch.linalg.solve(block + damping * torch.eye(len(block)).to(block), flat.T).T.reshape(v.shape)


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (7, 4)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), (7, 3, 3, 3)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(3, 3, 2), nn.Tanh(), nn.ConvTranspose1d(3, 2, 2), nn.Flatten(),
                              nn.Linear(10, 3)), (7, 3, 3),
    ),
    "transposed groups": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
        (7, 4, 3),
    ),
}  # fmt: skip


def kron_block(factors, shape, turned):
    """The block in the order of the parameter's entries."""
    matrix = factors[0]
    for factor in factors[1:]:
        matrix = torch.kron(matrix.contiguous(), factor.contiguous())
    if turned:
        order = torch.arange(shape.numel()).reshape(shape).transpose(0, 1).flatten()
        matrix = torch.empty_like(matrix).index_put((order[:, None], order[None]), matrix)
    return matrix


@pytest.mark.parametrize("kind", MODELS)
def test_inverse_products_and_inner_products_are_those_of_the_dense_blocks(kind, tmp_path):
    build_model, shape = MODELS[kind]
    torch.manual_seed(0)
    model, X, y = build_model().double(), torch.randn(shape).double(), torch.arange(7) % 3
    whole = accumulate(model, nn.CrossEntropyLoss(), [(X, y)], KFLR(), EKFAC(fisher="exact"), DiagGGNExact())
    v, w, damping = vectors_for(model, 3), vectors_for(model, 5), 0.03
    for number, extension in enumerate((KFLR(), EKFAC(fisher="exact"), DiagGGNExact())):
        store = made(model, X, y, [extension], tmp_path / str(number))
        solved = store.inverse_product(v, damping)
        expected = torch.zeros(3, 5).double()
        for name, parameter in model.named_parameters():
            result = whole[extension.savefield][name]
            layer = model[int(name.split(".")[0])]
            turned = name.endswith("weight") and isinstance(layer, nn.ConvTranspose1d)
            if isinstance(extension, KFLR):
                block = kron_block(result, parameter.shape, turned)
            elif isinstance(extension, EKFAC):
                basis = kron_block(result.bases, parameter.shape, False)
                block = (basis * result.eigenvalues.flatten()) @ basis.T
                block = kron_block([block], parameter.shape, turned)
            else:
                block = torch.diag(result.flatten())
            assert close(solved[name], dense_solve(block, v[name], damping)), name
            expected += solved[name].flatten(1) @ w[name].flatten(1).T
        assert close(store.inner_products(v, w, damping), expected)
        assert close(store.inner_products(w, v, damping), expected.T)
        some = {"0.weight": v["0.weight"]}
        assert torch.equal(store.inverse_product(some, damping)["0.weight"], solved["0.weight"])


def test_damping_can_be_divided_between_factors(tmp_path):
    model, _, X, y = problem()
    store = made(model, X, y, [KFLR()], tmp_path)
    v, damping = vectors_for(model, 3), 0.03
    solved = store.inverse_product(v, damping, factored=True)
    for name in NAMES:
        factors = store[name]
        means = [float(torch.trace(factor)) / len(factor) for factor in factors]
        scale = damping if len(factors) == 1 else (damping / (means[0] * means[1])) ** 0.5
        shifts = [scale] if len(factors) == 1 else [scale * mean for mean in means]
        shifted = [
            factor + shift * torch.eye(len(factor)).double() for factor, shift in zip(factors, shifts, strict=True)
        ]
        assert close(solved[name], dense_solve(kron_block(shifted, v[name].shape[1:], False), v[name], 0.0)), name


def test_vectors_keep_their_data_type(tmp_path):
    model, _, X, y = problem()
    store = made(model, X, y, [EKFAC()], tmp_path)
    v = vectors_for(model, 2, torch.float32)
    solved = store.inverse_product(v, 0.1)
    exact = store.inverse_product({name: own.double() for name, own in v.items()}, 0.1)
    for name, own in solved.items():
        assert torch.equal(own, exact[name].float())


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters(dtype, tmp_path):
    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.last = nn.Linear(4, 3, dtype=dtype), nn.Linear(3, 3)

        def forward(self, x):
            return self.last(torch.view_as_real(self.linear(x)).square().sum(-1).float())

    torch.manual_seed(0)
    model, X, y = Squares(), torch.randn(7, 4, dtype=dtype), torch.arange(7) % 3
    factors = accumulate(model, nn.CrossEntropyLoss(), [(X, y)], KFLR())["kflr"]
    store, v, w = made(model, X, y, [KFLR()], tmp_path), vectors_for(model, 2), vectors_for(model, 3)
    solved, total, accuracy = store.inverse_product(v, 0.1), 0, 1e-4 if dtype == torch.complex64 else 1e-5
    for name, own in solved.items():
        block = kron_block([*factors[name]], v[name].shape[1:], False)
        assert own.dtype == v[name].dtype and block.is_complex() == own.is_complex()
        assert close(own, dense_solve(block, v[name], 0.1), rtol=accuracy if "last" in name else 1e-4)
        total = total + solved[name].flatten(1).conj() @ w[name].flatten(1).T
    assert close(store.inner_products(v, w, 0.1), total, rtol=1e-5)


def test_factors_of_one_layer_are_in_memory_at_a_time(tmp_path, monkeypatch):
    from weakref import ref

    from backpack.dataset import curvature_store

    model, _, X, y = problem()
    store, alive, read = made(model, X, y, [KFLR()], tmp_path), [], curvature_store.read

    def noted(path, tensors=True):
        assert not any(reference() is not None for reference in alive)
        state = read(path, tensors)
        alive.extend(ref(tensor) for tensor in state["results"]["kflr"])
        return state

    monkeypatch.setattr(curvature_store, "read", noted)
    store.inverse_product(vectors_for(model, 2), 0.1)
    assert len(alive) == 6


# Errors


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"parts": 0}, ValueError, "parts must be positive"),
        ({"parts": "0.weight"}, TypeError, "parts takes a number, or for each part a list"),
        ({"parts": ["0.weight", "0.bias"]}, TypeError, "parts takes a number, or for each part a list"),
        ({"parts": 1.5}, TypeError, "parts takes a number, or for each part a list"),
        ({"parts": [NAMES, ["0.bias"]]}, ValueError, "parts has several times: 0.bias"),
        ({"parts": [NAMES[1:]]}, ValueError, "parts leaves out: 0.weight"),
        ({"parts": [[*NAMES, "3.bias"]]}, ValueError, "parts names what is no parameter .*: 3.bias"),
        ({"extensions": [ClippedGrad(1.0)]}, ValueError, "ClippedGrad.* depends on all parameters"),
        ({"extensions": [ProjectedGrad(3, across="model")]}, ValueError, "ProjectedGrad.* depends on all parameters"),
        ({"data": iter([])}, ValueError, "can be read once only, but 2 parts take as many passes"),
        ({"extensions": [BatchGrad()], "store": "x"}, ValueError, "store= is for results of the data set.*stream="),
        ({"extensions": [BatchDotGrad(against=[0])], "store": "x"}, ValueError, "store= is for results of the data"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_in_parts_is_refused_before_the_first_batch(given, error, words, tmp_path):
    model, lossfunc, X, y = problem()
    data = given.get("data", Failing([(X, y)]))
    if "data" not in given:
        data.left = 0
    where = {"store": tmp_path / given["store"]} if "store" in given else {}
    with pytest.raises(error, match=words):
        accumulate(model, lossfunc, data, *given.get("extensions", [KFAC()]), parts=given.get("parts", 2), **where)


class Other(SumGradSquared):
    savefield = "other"

    def of_whole(self, name, merged):
        return {"value": merged}


def test_a_result_that_files_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="store= holds tensors.*results in .other are of type dict"):
        run(tmp_path, extensions=[Other()])


def test_data_that_change_their_size_are_refused():
    model, lossfunc, X, y = problem()

    class Shrinking(list):
        def __iter__(self):
            yield from super().__iter__()
            self.pop()

    with pytest.raises(RuntimeError, match="The data had 11 and 8 samples .* the same data"):
        data = Shrinking(zip(X.split(4), y.split(4), strict=True))
        accumulate(model, lossfunc, data, KFAC(), parts=2)


@pytest.mark.parametrize("what", ["weights of the model", "extensions", "parts", "number of batches"])
def test_a_folder_of_another_run_is_refused(what, tmp_path):
    run(tmp_path)
    model, lossfunc, X, y = problem()
    data = [*zip(X.split(4), y.split(4), strict=True)]
    extensions = [EKFAC(2), KFAC(2), Variance()]
    if what == "weights of the model":
        nn.init.zeros_(model[0].bias)
    with pytest.raises(ValueError, match=f"another run: its {what} was .* Give an empty folder as store="):
        accumulate(model, lossfunc, data[1:] if what == "number of batches" else data,
                   *extensions[1 if what == "extensions" else 0 :], parts=2 if what == "parts" else 3,
                   store=tmp_path)  # fmt: skip
    (tmp_path / "run 0 of 1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has files of another run, as those of 0\.weight"):
        run(tmp_path)


def test_a_folder_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="store='.*file' is no folder to write results to"):
        run(tmp_path / "file")


def test_a_store_that_is_not_right_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder that accumulate"):
        CurvatureStore(tmp_path)
    run(tmp_path)
    with pytest.raises(ValueError, match="has results of ekfac, kfac, variance: give the savefield of one"):
        CurvatureStore(tmp_path)
    with pytest.raises(ValueError, match="has results of ekfac, kfac, variance, but none of kflr"):
        CurvatureStore(tmp_path, "kflr")
    file = tmp_path / "2.weight.safetensors"
    whole = file.read_bytes()
    file.unlink()
    with pytest.raises(ValueError, match=r"is not complete, the files of 2\.weight are missing"):
        CurvatureStore(tmp_path, "kfac")
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"2\.weight\.safetensors is no checkpoint of accumulate|is damaged"):
        CurvatureStore(tmp_path, "kfac")
    save_file(load_file(tmp_path / "0.weight.safetensors"), file)
    with pytest.raises(ValueError, match=r"2\.weight\.safetensors is no"):
        CurvatureStore(tmp_path, "kfac")
    with pytest.raises(ValueError, match=r"2\.weight\.safetensors is no"):
        run(tmp_path)
    file.unlink()
    run(tmp_path, seed=9)
    assert file.read_bytes() == whole
    other = tmp_path / "other"
    run(other, parts=2)
    file.write_bytes((other / file.name).read_bytes())
    with pytest.raises(ValueError, match="is of another run than 'run 0 of 1.safetensors'"):
        CurvatureStore(tmp_path, "kfac")
    file.write_bytes(whole)
    assert [*CurvatureStore(tmp_path, "kfac")] == NAMES


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda v: v.update(other=v["0.bias"]), KeyError, "other: there are results of 0.weight"),
        (lambda v: v.update({"0.bias": v["0.bias"][0]}), ValueError, r"for 0.bias have the shape \[5\]; .*\[V, 5\]"),
        (lambda v: v.update({"0.bias": v["0.bias"][:1]}), ValueError, "as many vectors for each parameter"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(change, error, words, tmp_path):
    model, _, X, y = problem()
    store, v = made(model, X, y, [KFLR()], tmp_path), vectors_for(model, 2)
    with pytest.raises(ValueError, match="the same parameters, .* 0.bias has them on one side only"):
        store.inner_products(v, {name: v[name] for name in NAMES if name != "0.bias"}, 0.1)
    with pytest.raises(ValueError, match="the same parameters"):
        store.inner_products({}, {}, 0.1)
    with pytest.raises(ValueError, match="damping must not be negative"):
        store.inverse_product(v, -1.0)
    with pytest.raises(KeyError, match="nothing: there are results of"):
        store["nothing"]
    change(v)
    with pytest.raises(error, match=words):
        store.inverse_product(v, 0.1)


def test_singular_blocks_and_options_without_meaning_are_refused(tmp_path):
    model, _, X, y = problem()
    v = vectors_for(model, 2)
    diagonal = made(model, torch.zeros_like(X), y, [DiagGGNExact()], tmp_path / "diagonal")
    with pytest.raises(ValueError, match="The diagonal for 0.weight has zeros: give a positive damping"):
        diagonal.inverse_product(v, 0.0)
    with pytest.raises(ValueError, match="factored=True is for Kronecker factors, and diag_ggn_exact has none"):
        diagonal.inverse_product(v, 0.1, factored=True)
    with pytest.raises(ValueError, match="factored=True is for Kronecker factors"):
        made(model, X, y, [EKFAC()], tmp_path / "ekfac").inverse_product(v, 0.1, factored=True)


class Bare(nn.Module):
    """A functional convolution, plain or transposed, whose weight is square in its first axes."""

    def __init__(self, function):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(3, 3, 2)), function

    def forward(self, x):
        return self.function(x, self.weight).sum(2)


@pytest.mark.parametrize("function", [nn.functional.conv1d, nn.functional.conv_transpose1d])
def test_a_kernel_whose_order_is_not_known_is_refused(function, tmp_path):
    torch.manual_seed(0)
    model, X, y = Bare(function).double(), torch.randn(4, 3, 5).double(), torch.arange(4) % 3
    store = made(model, X, y, [KFLR()], tmp_path)
    with pytest.raises(ValueError, match=r"not known whether weight, of shape \[3, 3, 2\]"):
        store.inverse_product(vectors_for(model, 1), 0.1)


def test_the_interface_without_a_form_of_its_own_counts_entries():
    assert BackpropExtension("own").entries(torch.empty(3, 4)) == 12
    assert KFLR().entries(torch.empty(3, 4, 2)) == 9 + 64 and KFLR().entries(torch.empty(5)) == 25
    assert EKFAC().entries(torch.empty(3, 4)) == 9 + 16 + 12 and KFLR().entries(torch.empty(())) == 1
    assert KFLR().entries(torch.empty(50_000, 2)) == 50_000 + 4 and KFLR().entries(torch.empty(0, 4)) == 0
    assert WeightedGrad(torch.ones(2)).entries(torch.empty(3, 4)) == 12


def test_products_are_defined_for_parameters_without_axes(tmp_path):
    """Their vectors have one axis, which counts them."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(0.7))

        def forward(self, x):
            return self.linear(x) * self.scale

    _, lossfunc, X, y = problem()
    model = Scaled().double()
    found = accumulate(model, lossfunc, [(X, y)], KFLR())
    matrices = {name: kfacs_to_mat(factors) for name, factors in found["kflr"].items()}
    accumulate(model, lossfunc, [(X, y)], KFLR(), store=tmp_path)
    vectors = {name: torch.randn(3, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    flat = {name: v.reshape(3, v[0].numel()) for name, v in vectors.items()}
    solved = {
        name: torch.linalg.solve(m + 0.1 * torch.eye(len(m), dtype=m.dtype), flat[name].T).T
        for name, m in matrices.items()
    }
    store = CurvatureStore(tmp_path)
    for name, own in store.inverse_product(vectors, 0.1).items():
        assert torch.allclose(own, solved[name].reshape(own.shape), rtol=1e-9), name
    expected = sum(flat[name] @ solved[name].T for name in flat)
    assert torch.allclose(store.inner_products(vectors, vectors, 0.1), expected, rtol=1e-9)
