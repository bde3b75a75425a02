"""Damped Gauss-Newton steps against a dense solve with explicit Jacobians and Hessians of the loss."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.networks import LOSSES, NETWORKS, Sequences, make, mlp, values
from torch import nn
from torch.utils.checkpoint import checkpoint
from truths import close

from backpack import accumulate, backpack, extend, results, verify
from backpack.curvature.gauss_newton import StepPass
from backpack.extensions import BatchGrad, DiagGGNExact, GaussNewtonStep, GGNGram, SqrtGGNExact
from backpack.extensions.module_extension import ModuleExtension

R = torch.float64


def flat(tensors):
    reals = [torch.view_as_real(t.detach()) if t.is_complex() else t.detach() for t in tensors]
    return torch.cat([t.flatten() for t in reals])


def gradient(of, parameters):
    found = torch.autograd.grad(of, parameters, retain_graph=True, allow_unused=True)
    return flat([torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(found, parameters, strict=True)])


def system(model, inputs, lossfunc, rows=None, axis=0):
    """The whole GGN and the gradient of a loss that is a function of the model's output, of the samples ``rows``."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    out = model(inputs)
    jacobian = torch.stack([gradient(entry, parameters) for entry in out.flatten()])
    point = out.detach().flatten().requires_grad_()
    value = lossfunc(point.reshape(out.shape))
    (u,) = torch.autograd.grad(value, point, create_graph=True)
    hessian = torch.stack(
        [torch.zeros_like(u) if not e.requires_grad else torch.autograd.grad(e, point, retain_graph=True)[0] for e in u]
    )
    n = out.shape[axis]
    weight = torch.ones(n, dtype=R) if rows is None else torch.bincount(torch.tensor(rows) % n, minlength=n).to(R)
    weight = weight.reshape([-1 if k == axis else 1 for k in range(out.dim())]).expand(out.shape).flatten()
    return jacobian.T @ (weight[:, None] * hessian) @ jacobian, jacobian.T @ (weight * u.detach())


def solved(ggn, gradient, damping):
    return -torch.linalg.solve(ggn + damping * torch.eye(len(ggn), dtype=R), gradient)


def stepped(model, field="gauss_newton_step"):
    return flat([vars(p)[field] for p in model.parameters() if p.requires_grad])


def check(model, X, lossfunc, y, rows=((2, 0), [1, 3, 1, -1])):
    """Steps of all and of some samples with several dampings, in one block."""
    exts = {(None, d): GaussNewtonStep(d, savefield=f"all_{d}") for d in (1e-3, 0.1, 10.0)}
    for k, own in enumerate(rows):
        exts[tuple(own), 0.01] = GaussNewtonStep(0.01, list(own), savefield=f"some_{k}")
    plain = [p.grad for p in model.parameters()]
    assert not any(grad is not None for grad in plain)
    with backpack(*exts.values()):
        lossfunc(model(X), y).backward()
    (whole, grad) = system(model, X, lambda out: lossfunc(out, y))
    assert torch.allclose(flat([p.grad for p in model.parameters()]), grad, atol=1e-12)
    for (own, damping), extension in exts.items():
        truth = solved(*system(model, X, lambda out: lossfunc(out, y), own and list(own)), damping)
        assert close(stepped(model, extension.savefield), truth, rtol=1e-8), (own, damping)


CONVEX = ["cross_entropy", "mse"]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("loss", CONVEX)
def test_the_step_of_networks_is_that_of_the_dense_system(network, loss):
    check(*make(network, "bce" if network == "sigmoid_bce" else loss))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_step_of_losses_is_that_of_the_dense_system(loss):
    check(*make("mlp", loss))


def test_a_loss_whose_hessian_is_singular_leaves_a_rest():
    """Of a huber loss beyond its bend the Hessian is zero, and the gradient is not."""
    torch.manual_seed(0)
    model, X, y = extend(mlp().double()), values(4, 4), values(4, 3) - 0.5
    check(model, X, extend(nn.HuberLoss(delta=0.3, reduction="sum")), y)


def test_where_the_loss_is_linear_the_step_is_the_gradient_divided_by_the_damping():
    torch.manual_seed(0)
    model, lossfunc = extend(mlp().double()), extend(nn.HuberLoss(delta=1e-3))
    with pytest.warns(UserWarning, match="linear in its input"), backpack(GaussNewtonStep(0.3)):
        lossfunc(model(values(4, 4)), 5 + values(4, 3)).backward()
    for p in model.parameters():
        assert close(p.gauss_newton_step, -p.grad / 0.3)


@pytest.mark.parametrize("seed", range(3))
def test_positions_of_sequences_are_outputs_of_one_sample(seed):
    torch.manual_seed(seed)
    index, target = torch.randint(0, 6, (3, 4)), torch.randint(0, 6, (3, 4))
    target[0, 1] = -100
    check(extend(Sequences(False).double()), index, extend(nn.CrossEntropyLoss()), target, rows=([2, 0], [1, 1]))


@pytest.mark.filterwarnings("ignore:HuberLoss is linear in its input")
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**20),
    st.sampled_from(["cross_entropy", "cross_entropy_options", "mse_sum", "bce_logits", "huber", "poisson", "custom"]),
    st.floats(1e-4, 1e2),
    st.one_of(st.none(), st.lists(st.integers(-4, 3), min_size=1, max_size=6)),
)
def test_any_step_solves_the_system(seed, loss, damping, rows):
    model, X, lossfunc, y = make("mlp", loss)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    X = torch.randn_like(X)
    with backpack(GaussNewtonStep(damping, rows)):
        lossfunc(model(X), y).backward()
    ggn, grad = system(model, X, lambda out: lossfunc(out, y), rows)
    step = stepped(model)
    residual = ggn @ step + damping * step + grad
    assert residual.abs().max() <= 1e-10 * max(1, ggn.abs().max() * step.abs().max(), grad.abs().max())


class Mixing(nn.Module):
    """Batch normalization in training mode: each row depends on all samples."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("loss", CONVEX)
def test_mixed_samples_have_the_step_of_the_whole_jacobian(loss):
    _, X, lossfunc, y = make("mlp", loss)
    model = extend(Mixing().double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(model, X, lossfunc, y, rows=([2, 0],))


def test_several_losses_have_one_step():
    torch.manual_seed(0)
    model, X = extend(mlp().double()), values(4, 4)
    one, other = extend(nn.CrossEntropyLoss()), extend(nn.HuberLoss(delta=0.8, reduction="sum"))
    labels, target = torch.tensor([0, 2, 1, 2]), values(4, 2) - 1

    def total(out):
        return one(out, labels) + other(out[:, :2], target)

    for rows in (None, [2, 0]):
        with backpack(GaussNewtonStep(0.02, rows)):
            total(model(X)).backward()
        assert close(stepped(model), solved(*system(model, X, total, rows), 0.02), rtol=1e-8)


def test_rows_of_packed_samples_are_one_sample():
    torch.manual_seed(0)
    model, X, y = extend(mlp().double()), values(5, 4), torch.tensor([0, 2, 1, 2, 0])
    lossfunc, ids = extend(nn.CrossEntropyLoss(reduction="sum")), torch.tensor([1, 0, 1, -1, 0])
    with backpack(GaussNewtonStep(0.02, [1]), sample_ids=ids):
        lossfunc(model(X), y).backward()
    truth = solved(*system(model, X, lambda out: lossfunc(out, y), [0, 2]), 0.02)
    assert close(stepped(model), truth, rtol=1e-8)
    with backpack(GaussNewtonStep(0.02), sample_ids=ids):
        lossfunc(model(X), y).backward()
    truth = solved(*system(model, X, lambda out: lossfunc(out, y), [0, 1, 2, 4]), 0.02)
    assert close(stepped(model), truth, rtol=1e-8)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 3, dtype=torch.complex128), nn.Linear(3, 3).double()

    def forward(self, x):
        return self.out(self.inner(x + 0j).abs())


def test_complex_parameters_count_as_two_real_ones():
    _, X, lossfunc, y = make("mlp", "cross_entropy")
    model = extend(Complex())
    with backpack(GaussNewtonStep(0.02)):
        lossfunc(model(X), y).backward()
    truth = solved(*system(model, X, lambda out: lossfunc(out, y)), 0.02)
    assert close(stepped(model), truth, rtol=1e-8) and model.inner.weight.gauss_newton_step.is_complex()


class Branches(nn.Module):
    """With a frozen part, a part that is not used, and a checkpointed one."""

    def __init__(self):
        super().__init__()
        self.frozen, self.unused = nn.Linear(4, 4).requires_grad_(False), nn.Linear(2, 2)
        self.embedding, self.layers = nn.Embedding(4, 4, sparse=True), mlp()

    def forward(self, x):
        h = self.frozen(x) + self.embedding(torch.arange(len(x)) % 4)
        return checkpoint(self.layers, h, use_reentrant=False)


def test_parameters_that_take_no_part_have_no_step():
    _, X, lossfunc, y = make("mlp", "cross_entropy")
    model = extend(Branches().double())
    with backpack(GaussNewtonStep(0.02)):
        lossfunc(model(X), y).backward()
    found = results(model, GaussNewtonStep(0.02))
    assert {name.split(".")[0] for name in found} == {"embedding", "layers"}
    model.unused.requires_grad_(False)
    assert close(flat(found.values()), solved(*system(model, X, lambda out: lossfunc(out, y)), 0.02), rtol=1e-8)


def test_the_gradient_is_that_of_plain_autograd_and_users_hooks_see_nothing():
    model, X, lossfunc, y = make("mlp", "cross_entropy")
    plain = copy.deepcopy(model)
    nn.CrossEntropyLoss()(plain(X), y).backward()
    calls = []
    for p in model.parameters():
        p.register_hook(lambda grad: calls.append(grad))
    with backpack(GaussNewtonStep(0.1), BatchGrad()):
        lossfunc(model(X), y).backward()
    assert len(calls) == len(list(model.parameters()))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_pass_without_the_gradient_has_the_same_step():
    model, X, lossfunc, y = make("cnn", "cross_entropy")
    with backpack(GaussNewtonStep(0.1)):
        lossfunc(model(X), y).backward()
    whole = stepped(model)
    out = model(X)
    with backpack(GaussNewtonStep(0.1)):
        torch.autograd.grad(lossfunc(out, y), out)
    assert close(stepped(model), whole, rtol=1e-9)


def test_dampings_in_one_block_share_the_columns(monkeypatch):
    model, X, lossfunc, y = make("mlp", "cross_entropy")
    pulls, pull_all = [], StepPass._pull_all
    monkeypatch.setattr(StepPass, "_pull_all", lambda self, rows: pulls.append(1) or pull_all(self, rows))
    with backpack(*(GaussNewtonStep(10.0**-k, savefield=f"step_{k}") for k in range(3))):
        lossfunc(model(X), y).backward()
    assert len(pulls) == 1
    assert all({"step_0", "step_1", "step_2"} <= vars(p).keys() for p in model.parameters())


@pytest.mark.parametrize("network", ["mlp", "cnn", "tied"])
def test_steps_in_the_range_of_the_root_are_no_difference_of_large_numbers(network):
    """In float32, they are much nearer to the truth than by the identity of Woodbury, if the damping is small."""
    model, X, lossfunc, y = make(network, "cross_entropy")
    single, damping = extend(copy.deepcopy(model).float()), 1e-6
    with backpack(GaussNewtonStep(damping), SqrtGGNExact()):
        lossfunc(single(X.float()), y).backward()
    root = torch.cat([p.sqrt_ggn_exact.flatten(2) for p in single.parameters()], 2).flatten(0, 1).T.double()
    grad = flat([p.grad for p in single.parameters()]).double()
    inner = torch.linalg.solve(root.T @ root + damping * torch.eye(root.shape[1], dtype=R), root.T @ grad)
    woodbury = -(grad - root @ inner) / damping
    truth = solved(*system(model, X, lambda out: lossfunc(out, y)), damping)
    assert stepped(single).dtype == torch.float32
    assert (stepped(single) - truth).norm() < 0.05 * (woodbury - truth).norm()


@pytest.mark.parametrize("dtype", [R, torch.float32])
@pytest.mark.parametrize("size", [10.0, 50.0, 300.0, 1000.0])
def test_probabilities_that_are_zero_up_to_rounding_are_no_problem(size, dtype):
    """Logits that are certain and wrong: the Hessian is nearly zero, the gradient is not."""
    torch.manual_seed(0)
    model = extend(nn.Linear(3, 3, bias=False).to(dtype))
    with torch.no_grad():
        model.weight.copy_(size * torch.eye(3))
    X, y, lossfunc = torch.eye(3, dtype=dtype) + 0.1, torch.tensor([1, 1, 2]), extend(nn.CrossEntropyLoss())
    with backpack(GaussNewtonStep(0.1)):
        lossfunc(model(X), y).backward()
    twin = copy.deepcopy(model).double()
    truth = solved(*system(twin, X.double(), lambda out: lossfunc(out, y)), 0.1)
    assert close(stepped(model).double(), truth, rtol=1e-9 if dtype == R else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_solves_in_more(dtype):
    torch.manual_seed(0)
    model, lossfunc = extend(nn.Linear(4, 3).to(dtype)), extend(nn.CrossEntropyLoss())
    X, y = torch.rand(4, 4, dtype=dtype), torch.tensor([0, 2, 1, 2])
    with backpack(GaussNewtonStep(0.5)):
        lossfunc(model(X), y).backward()
    twin = copy.deepcopy(model).double()
    truth = solved(*system(twin, X.double(), lambda out: lossfunc(out, y)), 0.5)
    assert close(stepped(model).double(), truth, rtol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_whole_step_without_damping_nearly_fits_a_linear_model(reduction):
    torch.manual_seed(0)
    model, lossfunc = extend(nn.Linear(4, 2).double()), extend(nn.MSELoss(reduction=reduction))
    X, y = torch.randn(20, 4, dtype=R), torch.randn(20, 2, dtype=R)
    with backpack(GaussNewtonStep(1e-7)):
        lossfunc(model(X), y).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(p.gauss_newton_step)
    design = torch.cat([X, torch.ones(20, 1, dtype=R)], 1)
    best = torch.linalg.lstsq(design, y).solution
    assert close(torch.cat([model.weight.detach().T, model.bias.detach()[None]]), best, rtol=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_is_not_a_number_where_the_gradient_is_not(loss, value):
    model, X, lossfunc, y = make("mlp", loss)
    X[1, 2] = value
    model[1] = nn.Identity()
    with backpack(GaussNewtonStep(0.1)):
        lossfunc(model(X), y).backward()
    for p in model.parameters():
        assert not p.grad.isfinite().all() and not p.gauss_newton_step.isfinite().all()


def test_a_single_class_has_no_curvature_and_no_step():
    model, lossfunc = extend(nn.Linear(4, 1).double()), extend(nn.CrossEntropyLoss())
    with backpack(GaussNewtonStep(0.1)):
        lossfunc(model(values(4, 4)), torch.zeros(4, dtype=torch.int64)).backward()
    assert not stepped(model).any()


def test_a_pass_under_autocast_gives_the_step_of_the_rounded_model():
    _, X, lossfunc, y = make("mlp", "cross_entropy")
    model = extend(mlp())
    with backpack(GaussNewtonStep(0.5)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = lossfunc(model(X.float()), y)
        loss.backward()
    twin = copy.deepcopy(model).double()
    truth = solved(*system(twin, X, lambda out: lossfunc(out, y)), 0.5)
    assert stepped(model).dtype == torch.float32
    assert close(stepped(model).double(), truth, rtol=16 * torch.finfo(torch.bfloat16).eps)


def test_what_cannot_be_computed_is_refused():
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="damping must be positive"):
            GaussNewtonStep(damping)
    model, X, lossfunc, y = make("mlp", "cross_entropy")
    with pytest.raises(RuntimeError, match="steps cannot be differentiated"), backpack(GaussNewtonStep(0.1)):
        torch.autograd.grad(lossfunc(model(X), y), list(model.parameters()), create_graph=True)

    class Rule(ModuleExtension):
        def weight(self, ext, module, g_inp, g_out, columns):
            return None

    ruled = GaussNewtonStep(0.1)
    ruled.set_module_extension(nn.Linear, Rule(["weight"]), overwrite=True)
    with pytest.raises(RuntimeError, match="takes no rules of users"), backpack(ruled):
        lossfunc(model(X), y).backward()
    with pytest.raises(ValueError, match="not positive semidefinite"), backpack(GaussNewtonStep(0.1)):
        extend(Concave())(model(X), y).backward()
    with pytest.raises(ValueError, match="no meaning for more than one batch: a step is pulled back"):
        accumulate(model, nn.CrossEntropyLoss(), [(X, y)], GaussNewtonStep(0.1))
    assert not any("gauss_newton_step" in vars(p) for p in model.parameters())


class Concave(nn.Module):
    reduction = "mean"

    def forward(self, out, target):
        return -out.square().mean()


@pytest.mark.parametrize("loss", ["cross_entropy", "huber"])
def test_verify_knows_the_step(loss):
    model, X, lossfunc, y = make("mlp", loss)
    assert verify(model, lossfunc, X, y, GaussNewtonStep(0.1), GaussNewtonStep(0.1, [2, 0], savefield="some")).passed


def test_verify_sees_a_wrong_step(monkeypatch):
    from backpack.curvature import gauss_newton

    model, X, lossfunc, y = make("mlp", "cross_entropy")
    right = gauss_newton._damped_solve
    monkeypatch.setattr(gauss_newton, "_damped_solve", lambda m, r, d: 1.001 * right(m, r, d))
    assert not verify(model, lossfunc, X, y, GaussNewtonStep(0.1)).passed


def test_a_block_with_other_extensions_has_all_results():
    model, X, lossfunc, y = make("cnn", "mse")
    with backpack(DiagGGNExact(), GaussNewtonStep(0.1), BatchGrad(), GGNGram()):
        lossfunc(model(X), y).backward()
    assert all(
        {"diag_ggn_exact", "gauss_newton_step", "grad_batch", "ggn_gram"} <= vars(p).keys() for p in model.parameters()
    )
