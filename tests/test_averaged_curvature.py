"""Factors from averaged curvatures, against a recursion over explicit Jacobians; strategies of HBP."""

from functools import partial

import pytest
import torch
from models.networks import LABELS, Custom, make, values
from torch import nn
from truths import close

from backpack import backpack, extend
from backpack.extensions import HBP, KFAC, KFLR, KFRA, BatchGrad


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.scale = nn.Conv1d(2, 2, 3, padding=1), nn.LayerNorm(4), nn.Parameter(torch.rand(2, 1))

    def forward(self, x):
        return x + self.scale * self.norm(self.a(x)).relu_()


def cnn():
    first = nn.Sequential(nn.Conv2d(2, 3, 2, padding=1), nn.Sigmoid(), nn.MaxPool2d(2))
    return nn.Sequential(first, nn.Conv2d(3, 2, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(2, 3))


def mixed():
    block = nn.Sequential(nn.Sequential(nn.Conv1d(2, 2, 2, groups=2), nn.BatchNorm1d(2)), nn.PReLU(), nn.Mish())
    return nn.Sequential(Residual(), block, nn.AvgPool1d(3), nn.Flatten(), nn.Linear(2, 3), nn.Softmax(1)).eval()


def deep(activation):
    return nn.Linear(4, 4), activation()


def words():
    return nn.Sequential(nn.Embedding(5, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))


def pools():
    first = nn.Conv2d(2, 2, 2, padding=1), nn.MaxPool2d((3, 2), (1, 2), padding=1, ceil_mode=True), nn.GELU()
    second = nn.Unflatten(1, (1, 2)), nn.MaxPool3d(2, 1), nn.Flatten(2), nn.MaxPool1d(3, 2, dilation=2, ceil_mode=True)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(2, 3))


def grouped():
    up, around = nn.ConvTranspose1d(4, 2, 2, groups=2), nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")
    middle = nn.ReLU(inplace=True), nn.Dropout(0.3).eval(), up, nn.Identity(), around, nn.ZeroPad1d((1, 0))
    return nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), *middle, nn.AvgPool1d(2), nn.Flatten(), nn.Linear(4, 3))


def hooked():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Flatten(), nn.Linear(4, 3))
    model[1].register_forward_hook(lambda module, args, out: 2 * out)
    model[2].register_forward_pre_hook(lambda module, args: args[0].square())
    model[3].forward = torch.sin
    return model


CHAINS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2), nn.ELU(), nn.Linear(2, 3)), (4, 4)),
    "alone": (lambda: nn.Linear(4, 3), (4, 4)),
    "sequence": (lambda: nn.Sequential(nn.Linear(4, 2), nn.GELU(), nn.Flatten(), nn.Linear(4, 3)), (4, 2, 4)),
    "cnn": (cnn, (4, 2, 3, 3)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.Dropout(0.0), nn.Flatten(), nn.Linear(9, 3)),
        (4, 2, 2),
    ),
    "mixed": (mixed, (4, 2, 4)),
    "pools": (pools, (4, 2, 3, 3)),
    "grouped": (grouped, (4, 2, 4)),
    "hooked": (hooked, (4, 4)),
    "words": (words, None),
    "deep": (lambda: nn.Sequential(*deep(nn.Sigmoid), *deep(nn.Tanh), nn.Linear(4, 3)), (4, 4)),
    "smooth": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3), nn.Softmax(1)), (4, 4)),
}


def flattened(module):
    if type(module) is nn.Sequential:
        return [leaf for child in module for leaf in flattened(child)]
    return [module]


def gradients(modules, X, lossfunc, y):
    """That of the loss in the output of each module."""
    outputs = [X]
    for module in modules:
        outputs.append(module(outputs[-1].clone()))
    return dict(zip(modules, torch.autograd.grad(lossfunc(outputs[-1], y), outputs[1:]), strict=True))


def residual(module, x, g, chosen, curvature):
    """The sum over samples of Hessians of ``<g_n, f(x_n)>``, its eigenvalues changed as the curvature says."""

    def weighed(row, n):
        return (module(row[None].clone())[0] * g[n]).sum()

    d = x[0].numel()
    R = sum(torch.autograd.functional.hessian(partial(weighed, n=n), x[n]).reshape(d, d) for n in chosen)
    values, vectors = torch.linalg.eigh(R)
    changed = {"hessian": values, "pch-abs": values.abs(), "pch-clip": values.clamp(min=0)}[curvature]
    return vectors @ torch.diag(changed) @ vectors.T


def recursion(model, X, lossfunc, y, chosen, curvature="ggn"):
    """For each parameter the mean over the chosen samples of its curvature, ``[p, p]``, and the outputs' of modules."""
    modules, inputs = flattened(model), [X]
    for module in modules:
        inputs.append(module(inputs[-1].clone()).detach())
    out = inputs[-1]
    hessian = torch.autograd.functional.hessian(lambda o: lossfunc(o, y), out)
    H = sum(hessian[n, :, n] for n in chosen)
    grads = {} if curvature == "ggn" else gradients(modules, X, lossfunc, y)
    curvatures, outputs = {}, {}
    for module, x in zip(reversed(modules), reversed(inputs[:-1]), strict=True):
        outputs[module] = H
        for name, parameter in module.named_parameters():

            def of_parameter(p, module=module, name=name, x=x):
                return torch.func.functional_call(module, {name: p}, (x.clone(),))

            J = torch.autograd.functional.jacobian(of_parameter, parameter.detach()).reshape(len(x), len(H), -1)
            curvatures[parameter] = sum(J[n].T @ H @ J[n] for n in chosen) / len(chosen)
        if x.is_floating_point():

            def of_input(x, module=module):
                return module(x[None].clone())[0]

            Js = [torch.autograd.functional.jacobian(of_input, x[n]).reshape(len(H), -1) for n in chosen]
            H = sum(J.T @ H @ J for J in Js) / len(Js)
            if curvature != "ggn":
                H = H + residual(module, x, grads[module], chosen, curvature)
    return curvatures, outputs


def output_factor(module, H, approx):
    """The blocks of the curvature in the outputs of a linear map, of pairs of positions, summed."""
    transposed = isinstance(module, nn.ConvTranspose1d)
    o = module.weight.shape[1 if transposed or isinstance(module, nn.Embedding) else 0]
    o = o * getattr(module, "groups", 1) if transposed else o
    s = len(H) // o
    pairs = H.reshape(s, o, s, o).permute(1, 3, 0, 2)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d)):
        pairs = H.reshape(o, s, o, s).permute(0, 2, 1, 3)
    B = pairs.diagonal(dim1=2, dim2=3).sum(2) if approx == "expand" else pairs.sum((2, 3))
    groups = B.chunk(getattr(module, "groups", 1))
    groups = [rows[:, k * len(rows) : (k + 1) * len(rows)] for k, rows in enumerate(groups)]
    return sum(groups) / len(groups) if transposed else torch.block_diag(*groups)


def problem(name, loss):
    build, shape = CHAINS[name]
    model = build().double()
    X = values(*shape) if shape else torch.randint(0, 5, (4, 2))
    lossfunc, y = (nn.CrossEntropyLoss(), LABELS) if loss == "cross_entropy" else (Custom(), values(4, 3))
    return model, X, lossfunc, y


def extended(model, apart):
    """As one, or module by module."""
    for module in flattened(model) if apart else [model]:
        extend(module)
    return model


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("name", "loss"), [*((n, "cross_entropy") for n in CHAINS), ("mlp", "custom")])
def test_kfra_is_the_averaged_recursion(name, loss, apart):
    model, X, lossfunc, y = problem(name, loss)
    for chosen in (None, [3, 1]):
        curvatures, outputs = recursion(model, X, lossfunc, y, chosen or range(4))
        extended(model, apart)
        expand = HBP("ggn", "sum", "average", "E[J^T E(H) J]", approx="expand", subsampling=chosen)
        exact = KFAC(fisher="exact", approx="expand", subsampling=chosen)
        with backpack(KFRA(subsampling=chosen), expand, KFLR(subsampling=chosen), exact):
            extend(lossfunc)(model(X), y).backward()
        size = 1e-6 * max(c.abs().max() for c in curvatures.values())
        for parameter, truth in curvatures.items():
            assert len(parameter.kfra) == len(parameter.kflr)
            if len(parameter.kfra) == 1:
                assert close(parameter.kfra[0], truth, size, 1e-9)
        for module, H in outputs.items():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.Embedding)):
                place = int(isinstance(module, nn.Embedding))
                for factors, approx in ((module.weight.kfra, None), (module.weight.hbp, "expand")):
                    assert close(factors[place], output_factor(module, H, approx), size, 1e-9)
                assert close(module.weight.kfra[1 - place], module.weight.kflr[1 - place], size, 1e-12)
                assert close(module.weight.hbp[1 - place], module.weight.kfac[1 - place], size, 1e-12)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("curvature", ["hessian", "pch-abs", "pch-clip"])
@pytest.mark.parametrize("name", ["mlp", "deep", "cnn", "smooth", "words", "hooked"])
def test_second_derivatives_of_modules_are_added_to_the_averaged_recursion(name, curvature, apart):
    model, X, lossfunc, y = problem(name, "cross_entropy")
    for chosen in (None, [3, 1]):
        curvatures, _ = recursion(model, X, lossfunc, y, chosen or range(4), curvature)
        extended(model, apart)
        extension = HBP(curvature, "sum", "average", "E[J^T E(H) J]", subsampling=chosen)
        with backpack(extension, KFRA(subsampling=chosen)):
            extend(lossfunc)(model(X), y).backward()
        size = 1e-6 * max(c.abs().max() for c in curvatures.values())
        for parameter, truth in curvatures.items():
            if len(parameter.hbp) == 1:
                assert close(parameter.hbp[0], truth, size, 1e-9)
        for layer in model.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                assert close(layer.weight.hbp[0], layer.bias.hbp[0], size, 1e-9)
                assert close(layer.weight.hbp[1], layer.weight.kfra[1], size, 1e-12)
        first = next(model.parameters())
        assert not all(close(a, b, rtol=1e-3) for a, b in zip(first.hbp, first.kfra, strict=True))


@pytest.mark.parametrize("chosen", [None, [3, 1]])
def test_dropout_between_linear_layers_is_that_of_the_forward_pass(chosen):
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.4), nn.Linear(5, 3)).double()
    X, lossfunc, masks = values(4, 4), nn.CrossEntropyLoss(), []
    handle = model[1].register_forward_hook(lambda module, args, out: masks.append(out.detach() / args[0].detach()))
    extend(model)
    out = model(X)
    handle.remove()
    with backpack(KFRA(subsampling=chosen)):
        extend(lossfunc)(out, LABELS).backward()
    rows = list(range(4)) if chosen is None else chosen
    hessian = torch.autograd.functional.hessian(lambda o: lossfunc(o, LABELS), out.detach())
    weight = model[2].weight.detach()
    H = weight.T @ sum(hessian[n, :, n] for n in rows) @ weight
    H = sum(torch.diag(masks[0][n]) @ H @ torch.diag(masks[0][n]) for n in rows) / len(rows)
    assert masks[0].eq(0).any()
    assert close(model[0].bias.kfra[0], H, rtol=1e-9)


@pytest.mark.parametrize("between", [lambda h: 2 * h, lambda h: h.softmax(1), lambda h: h[:, [1, 0, 2, 3]]])
def test_what_lies_between_the_modules_of_a_chain_is_not_overlooked(between):
    first, last, lossfunc = nn.Linear(4, 4), nn.Linear(4, 3), extend(nn.CrossEntropyLoss())
    extend(first), extend(last)
    with pytest.raises(RuntimeError, match="no torch.nn.Sequential|another output"), backpack(KFRA()):
        lossfunc(last(between(first(torch.rand(4, 4)))), LABELS).backward()


def test_kfra_equals_kflr_for_one_sample():
    model, X, lossfunc, y = make("mlp", "cross_entropy")
    with backpack(KFRA(), KFLR()):
        lossfunc(model(X[:1]), y[:1]).backward()
    for parameter in model.parameters():
        for a, b in zip(parameter.kfra, parameter.kflr, strict=True):
            assert close(a, b, rtol=1e-9)


@pytest.mark.parametrize(
    ("strategies", "other"),
    [
        (("exact", "sqrt"), KFLR()),
        (("sampling", "sqrt"), KFAC(mc_samples=3)),
        (("sum", "average"), KFRA()),
        (("exact", "average"), KFRA()),
    ],
)
def test_hbp_is_the_general_form(strategies, other):
    model, X, lossfunc, y = make("cnn", "cross_entropy")
    for extension in (HBP("ggn", *strategies, "E[J^T E(H) J]", mc_samples=3), other):
        torch.manual_seed(0)
        with backpack(extension):
            lossfunc(model(X), y).backward()
    for parameter in model.parameters():
        assert all(torch.equal(a, b) for a, b in zip(parameter.hbp, getattr(parameter, other.savefield), strict=True))


def test_columns_know_no_second_derivatives_of_the_model():
    model, X, lossfunc, y = make("mlp", "cross_entropy")
    with pytest.warns(UserWarning, match='factors of "ggn"'):
        extension = HBP("pch-abs", "exact", "sqrt", "E[J^T E(H) J]")
    with backpack(extension, KFLR()):
        lossfunc(model(X), y).backward()
    for parameter in model.parameters():
        assert all(torch.equal(a, b) for a, b in zip(parameter.hbp, parameter.kflr, strict=True))


def test_second_derivatives_within_a_module_of_modules_are_refused():
    model, lossfunc, X = extend(nn.Sequential(Residual(), nn.Flatten())), extend(nn.MSELoss()), torch.rand(4, 2, 4)
    extension = HBP("hessian", "sum", "average", "E[J^T E(H) J]")
    with pytest.raises(RuntimeError, match="Residual in the chain holds modules"), backpack(extension):
        lossfunc(model(X), torch.rand(4, 8)).backward()


def test_sampled_hessians_can_be_averaged():
    model, X, lossfunc, y = make("mlp", "mse")
    draws = []
    for _ in range(30):
        with backpack(HBP("ggn", "sampling", "average", "E[J^T E(H) J]", mc_samples=20), KFRA()):
            lossfunc(model(X), y).backward()
        draws.append([p.hbp[0] for p in model.parameters()])
    for place, parameter in enumerate(model.parameters()):
        each = torch.stack([draw[place] for draw in draws])
        error = 5 * each.std(0) / len(draws) ** 0.5 + 1e-12
        assert bool(((each.mean(0) - parameter.kfra[0]).abs() <= error).all())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fisher", "exact", "sqrt", "E[J^T E(H) J]"), "curv_type"),
        (("ggn", "all", "sqrt", "E[J^T E(H) J]"), "loss_hessian_strategy"),
        (("ggn", "exact", "mean", "E[J^T E(H) J]"), "backprop_strategy"),
        (("ggn", "exact", "sqrt", "E(J^T) E(H) E(J)"), "ea_strategy"),
        (("ggn", "sum", "sqrt", "E[J^T E(H) J]"), "no columns"),
    ],
)
def test_strategies_that_do_not_go_together_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        HBP(*arguments)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        return self.a(x).tanh()


def shared():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


@pytest.mark.parametrize(
    ("build", "words", "error"),
    [
        (Functional, "Functional, is no torch.nn.Sequential", RuntimeError),
        (shared, "share a parameter", RuntimeError),
        (
            lambda: nn.Sequential(nn.Linear(4, 30), nn.Softmax(1), nn.Dropout(0.5), nn.Linear(30, 3)),
            "dropout",
            RuntimeError,
        ),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Unflatten(0, (2, 2)), nn.Flatten(0, 1)), "first axis", RuntimeError),
        (lambda: nn.Sequential(nn.Linear(4, 16385), nn.Linear(16385, 3)), "16385 rows", ValueError),
    ],
)
def test_what_is_no_chain_is_refused_and_nothing_is_left_behind(build, words, error):
    model = extend(build())
    lossfunc, X, y = extend(nn.CrossEntropyLoss()), torch.rand(4, 4), LABELS
    with pytest.raises(error, match=words), backpack(KFRA()):
        lossfunc(model(X), y).backward()
    assert not any(hasattr(p, "kfra") for p in model.parameters())
    with backpack(BatchGrad()):
        lossfunc(model(X), y).backward()
    assert all(hasattr(p, "grad_batch") for p in model.parameters())
