"""Complex parameters and activations: PyTorch's conventions, by loops of plain autograd in float64.

A complex parameter is two real ones. Its individual gradients are complex, norms, squares and dot products are those
of the real and imaginary parts.
"""

import random

import pytest
import torch
from torch import nn
from truths import close
from truths.autograd import gradients, individual_gradients
from truths.first_order import OF_GRADIENTS, clipped, quantities
from truths.second_order import block

from backpack import accumulate, backpack, extend, verify
from backpack import extensions as package
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
    BatchDiagHessian,
    BatchGrad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    DiagHessianMC,
    GGNGram,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
)
from backpack.uses.eigenbases import eigenbases_by_name
from backpack.utils.kroneckers import apply_kfac_mat_prod, eigh_kfacs, inv_kfacs, kfac_logdet, kfacs_to_mat, pi_damping

C, R = torch.complex128, torch.float64
N = 4
MAX_NORM = 0.5


def parameter(*shape, dtype=C):
    return nn.Parameter(torch.randn(*shape, dtype=dtype))


def linear(inputs, outputs, dtype=C):
    return nn.Linear(inputs, outputs, dtype=dtype)


def real(z):
    """Not the same for real and imaginary parts."""
    return torch.cat([z.real, 2 * z.imag, z.abs()], -1)


class Net(nn.Module):
    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


MODELS = {
    "linear": (lambda m, x: real(m.b(m.a(x).tanh())), {"a": lambda: linear(3, 4), "b": lambda: linear(4, 2)}, (3,)),
    "positions": (
        lambda m, x: real(m.b(m.a(x).tanh())).sum(1),
        {"a": lambda: linear(3, 4), "b": lambda: linear(4, 2)},
        (5, 3),
    ),
    "wide, few positions": (lambda m, x: real(m.a(x).sin()).sum(1)[:, ::9], {"a": lambda: linear(14, 12)}, (2, 14)),
    "wide, shared": (lambda m, x: real(m.a(m.a(x).sin())).sum(1)[:, ::9], {"a": lambda: linear(12, 12)}, (2, 12)),
    "wide members": (
        lambda m, x: real(torch.bmm(x.transpose(0, 1), m.w)).sum(0)[:, ::9],
        {"w": lambda: parameter(2, 14, 12)},
        (2, 14),
    ),
    "shared": (lambda m, x: real(m.a(m.a(x).sin())), {"a": lambda: linear(3, 3)}, (3,)),
    "scale and shift": (
        lambda m, x: real(m.w * m.a(x) - m.b),
        {"a": lambda: linear(3, 4), "w": lambda: parameter(4), "b": lambda: parameter(4)},
        (3,),
    ),
    "real scale": (
        lambda m, x: real(m.w * m.a(x)),
        {"a": lambda: linear(3, 4), "w": lambda: parameter(4, dtype=R)},
        (3,),
    ),
    "real matrix": (lambda m, x: real(x @ m.w.to(C)), {"w": lambda: parameter(3, 4, dtype=R)}, (3,)),
    "real matrix, positions": (
        lambda m, x: real(x @ m.w.to(C)).sum(1),
        {"w": lambda: parameter(3, 4, dtype=R)},
        (5, 3),
    ),
    "conjugated": (
        lambda m, x: real(x.conj() @ m.w.conj() + m.v.conj()),
        {"w": lambda: parameter(3, 4), "v": lambda: parameter(4)},
        (3,),
    ),
    "adjoint": (
        lambda m, x: real(m.b((x @ m.a.mH).sin())),
        {"a": lambda: parameter(4, 3), "b": lambda: linear(4, 2)},
        (3,),
    ),
    "members": (lambda m, x: real(torch.bmm(x.transpose(0, 1), m.w)).sum(0), {"w": lambda: parameter(5, 3, 4)}, (5, 3)),
    "conv1d": (lambda m, x: real(m.c(x).sin().flatten(1)), {"c": lambda: nn.Conv1d(2, 3, 2, dtype=C)}, (2, 5)),
    "conv2d": (
        lambda m, x: real(m.c(x).sin().flatten(1)),
        {"c": lambda: nn.Conv2d(2, 4, 2, groups=2, padding=1, dtype=C)},
        (2, 4, 3),
    ),
    "transposed": (
        lambda m, x: real(m.c(x).sin().flatten(1)),
        {"c": lambda: nn.ConvTranspose1d(2, 3, 2, dtype=C)},
        (2, 4),
    ),
    "table": (lambda m, x: real(m.w[x.real.abs().argmax(1)] * x), {"w": lambda: parameter(3, 3)}, (3,)),
    "parts": (lambda m, x: x.real @ m.w.real + (x.imag @ m.w.imag).sin(), {"w": lambda: parameter(3, 4)}, (3,)),
    "as complex": (lambda m, x: real(x @ torch.view_as_complex(m.w)), {"w": lambda: parameter(3, 4, 2, dtype=R)}, (3,)),
    "as real": (
        lambda m, x: (torch.view_as_real(x @ m.w) * m.v).flatten(1),
        {"w": lambda: parameter(3, 4), "v": lambda: parameter(4, 2, dtype=R)},
        (3,),
    ),
    "phases": (
        lambda m, x: (x * torch.polar(m.r, m.t)).imag,
        {"r": lambda: parameter(3, dtype=R), "t": lambda: parameter(3, dtype=R)},
        (3,),
    ),
    "spectrum": (
        lambda m, x: torch.fft.irfft(torch.fft.rfft(m.a(x.real)) * m.w),
        {"a": lambda: linear(3, 6, R), "w": lambda: parameter(4)},
        (3,),
    ),
    "Fourier layer": (
        lambda m, x: torch.fft.irfft(torch.einsum("bik,iok->bok", torch.fft.rfft(x.real), m.w)).flatten(1),
        {"w": lambda: parameter(2, 3, 4)},
        (2, 6),
    ),
    "embedding": (
        lambda m, x: real(torch.view_as_complex(m.e(x.real.abs().long().clamp(max=3)).unflatten(-1, (-1, 2)))).sum(1),
        {"e": lambda: nn.Embedding(4, 6, dtype=R)},
        (3,),
    ),
}


def random_model(seed):
    """Real and complex layers in a random order, some of their parameters shared."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    tied, steps, parts, is_complex = linear(4, 4), [], nn.ModuleList(), True

    def use(module, function):
        parts.append(module)
        steps.append(function)

    def step(module, function):
        return lambda x: function(module, x)

    for _ in range(draw.randint(3, 6)):
        if is_complex:
            kind = draw.randrange(8)
            if kind == 0:
                use(tied, tied)
            elif kind == 1:
                own = linear(4, 4)
                use(own, own)
            elif kind == 2:
                own = nn.ParameterList([parameter(4)])
                use(own, step(own, lambda m, x: x * m[0].conj() + x.conj()))
            elif kind == 3:
                own = nn.ParameterList([parameter(4, dtype=R)])
                use(own, step(own, lambda m, x: x * m[0]))
            elif kind == 4:
                steps.append(lambda x: torch.fft.ifft(x.tanh()))
            elif kind == 5:
                own = nn.Conv1d(1, 2, 3, padding=1, dtype=C)
                use(own, step(own, lambda m, x: m(x.unsqueeze(1)).sin().sum(1)))
            elif kind == 6:
                own = nn.ParameterList([parameter(4, dtype=R)])
                use(own, step(own, lambda m, x: x * torch.exp(1j * m[0])))
            else:
                steps.append(lambda x: x.real + x.angle())
                is_complex = False
        else:
            kind = draw.randrange(4)
            if kind < 2:
                own = linear(4, 4, R)
                use(own, step(own, lambda m, x: m(x).tanh()))
            elif kind == 2:
                steps.append(lambda x: torch.fft.fft(x))
                is_complex = True
            else:
                own = linear(4, 8, R)
                use(own, step(own, lambda m, x: torch.view_as_complex(m(x).reshape(-1, 4, 2))))
                is_complex = True

    def forward(m, x):
        for one in steps:
            x = one(x)
        return real(m.last(x if x.is_complex() else x.to(C)))

    return Net(forward, parts=parts, last=linear(4, 2))


def case(name):
    if isinstance(name, int):
        return random_model(name), torch.randn(N, 4, dtype=C)
    function, parts, shape = MODELS[name]
    return Net(function, **{key: make() for key, make in parts.items()}), torch.randn(N, *shape, dtype=C)


NAMES = [*MODELS, *range(12)]


def pairs(tensor):
    """Real and imaginary parts of ``[..., p]`` as further entries."""
    return torch.view_as_real(tensor.resolve_conj()).flatten(-2) if tensor.is_complex() else tensor


def size(tensor):
    return tensor.abs().square()


def equal(found, true, scale=0.0, rtol=1e-9):
    return found.dtype == true.dtype and close(found, true, scale, rtol)


def terms(out):
    weight = torch.arange(out.shape[-1], dtype=out.dtype).cos()
    return (out * weight + out.tanh()).flatten(1).sum(1)


def individual(model, x):
    named = dict(model.named_parameters())
    return dict(zip(named, individual_gradients(terms(model(x)), named.values()), strict=True))


def first_order(grads):
    of_clipped = clipped(grads, MAX_NORM)
    for name, g in grads.items():
        for field, value in {**quantities(g), "grad_clipped": of_clipped[name]}.items():
            yield name, field, value


def extensions():
    return [*(getattr(package, name)() for name in OF_GRADIENTS), ClippedGrad(MAX_NORM)]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_first_order_is_that_of_a_loop(name, alone):
    model, x = case(name)
    extend(model)
    true = individual(model, x)
    used = {name: g for name, g in true.items() if g.any()}
    for own in [[one] for one in extensions()] if alone else [extensions()]:
        model.zero_grad()
        with backpack(*own):
            terms(model(x)).sum().backward()
        fields = {extension.savefield for extension in own}
        for key, field, value in first_order(used):
            p = model.get_parameter(key)
            if field in fields:
                assert equal(getattr(p, field), value, size(used[key]).max()), (key, field)
            if field == "grad_batch" and field in fields:
                assert close(p.grad_batch.sum(0), p.grad, used[key].abs().max())


@pytest.mark.parametrize("name", ["linear", "conv1d", "real scale", "spectrum", 3])
def test_selected_samples_and_a_whole_data_set_are_those_of_a_loop(name):
    model, x = case(name)
    extend(model)
    true = individual(model, x)
    with backpack(BatchGrad(subsampling=[2, 0]), SumGradSquared(subsampling=[2, 0])):
        terms(model(x)).sum().backward()
    for key, g in true.items():
        assert equal(model.get_parameter(key).grad_batch, g[[2, 0]], g.abs().max())
        assert equal(model.get_parameter(key).sum_grad_squared, size(g[[2, 0]]).sum(0), size(g).max())

    class Terms(nn.Module):
        reduction = "sum"

        def forward(self, out, target):
            return terms(out).sum()

    y = torch.zeros(N)
    found = accumulate(model, extend(Terms()), [(x[:1], y[:1]), (x[1:], y[1:])], *extensions())
    for key, field, value in first_order(true):
        assert equal(found[field][key], value, size(true[key]).max()), (key, field)


@pytest.mark.filterwarnings("ignore:(?s)Using backward.. with create_graph=True")
def test_gradients_of_create_graph_are_differentiable():
    model, x = case("linear")
    extend(model)
    parameters = list(model.parameters())
    with backpack(BatchGrad(), SumGradSquared()):
        terms(model(x)).sum().backward(create_graph=True)
    total = sum(p.sum_grad_squared.sum() + pairs(p.grad_batch.flatten(1)).sin().sum() for p in parameters)
    found = torch.autograd.grad(total, parameters)
    rows = [torch.autograd.grad(t, parameters, create_graph=True) for t in terms(model(x))]
    plain = sum(size(g).sum() + pairs(g.flatten()).sin().sum() for row in rows for g in row)
    for one, other in zip(found, torch.autograd.grad(plain, parameters), strict=True):
        assert close(one, other, rtol=1e-8)
    for p in parameters:
        p.grad = None


def roots(model, x):
    """Of the mean squared error: a root of the GGN by plain autograd, ``[C, N, *p]``."""
    out = model(x).flatten(1)
    scale = (2 / out.numel()) ** 0.5
    named = dict(model.named_parameters())
    jacobians = individual_gradients(scale * out.T.flatten(), named.values())
    return {name: J.unflatten(0, out.T.shape) for name, J in zip(named, jacobians, strict=True)}


@pytest.mark.parametrize("name", NAMES)
def test_the_ggn_is_that_of_explicit_jacobians(name):
    model, x = case(name)
    lossfunc = extend(nn.MSELoss())
    extend(model)
    true = roots(model, x)
    y = torch.randn(model(x).shape, dtype=R)
    with backpack(DiagGGNExact(), BatchDiagGGNExact(), SqrtGGNExact(), GGNGram(), GGNMP()):
        lossfunc(model(x), y).backward()
    for key, v in true.items():
        p = model.get_parameter(key)
        if not v.any() and not hasattr(p, "sqrt_ggn_exact"):
            continue
        flat = pairs(v.flatten(2)).flatten(0, 1)
        largest = size(v).max()
        assert equal(p.sqrt_ggn_exact, v, v.abs().max())
        assert equal(p.diag_ggn_exact, size(v).sum((0, 1)), largest)
        assert equal(p.diag_ggn_exact_batch, size(v).sum(0), largest)
        assert equal(p.ggn_gram, flat @ flat.T, largest)
        vector = torch.randn_like(p)
        product = flat.T @ (flat @ pairs(vector.flatten()[None])[0])
        assert close(pairs(p.ggnmp(vector).flatten()[None])[0], product, largest, 1e-8)


@pytest.mark.parametrize("name", ["linear", "conv1d", "real scale", "Fourier layer"])
def test_sampled_columns_of_the_ggn_have_it_as_their_expectation(name):
    model, x = case(name)
    lossfunc = extend(nn.MSELoss())
    extend(model)
    true, count = roots(model, x), 2000
    y = torch.randn(model(x).shape, dtype=R)
    with backpack(DiagGGNMC(count), SqrtGGNMC(count)):
        lossfunc(model(x), y).backward()
    for key, v in true.items():
        p = model.get_parameter(key)
        squares = count * size(p.sqrt_ggn_mc).sum(1)
        error = squares.std(0) / count**0.5
        assert close(squares.mean(0), p.diag_ggn_mc) or bool(
            ((p.diag_ggn_mc - size(v).sum((0, 1))).abs() <= 6 * error).all()
        )
        assert bool(((squares.mean(0) - size(v).sum((0, 1))).abs() <= 6 * error + 1e-12).all())


@pytest.mark.parametrize("name", NAMES)
def test_products_with_the_hessian_are_those_of_two_derivatives(name):
    model, x = case(name)
    lossfunc = extend(nn.MSELoss())
    extend(model)
    y = torch.randn(model(x).shape, dtype=R)
    with backpack(HMP()):
        lossfunc(model(x), y).backward()
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(lossfunc(model(x), y), list(named.values()), create_graph=True, allow_unused=True)
    for p, grad in zip(named.values(), grads, strict=True):
        if grad is None:
            continue
        vector, found = torch.randn_like(p), None
        if grad.requires_grad:
            (found,) = torch.autograd.grad(grad, p, vector, retain_graph=True, allow_unused=True)
        assert close(p.hmp(vector), torch.zeros_like(p) if found is None else found, 1e-3, 1e-8)


def diagonals(model, x, y, p):
    """Of the Hessian of each sample's term of the mean squared error, ``[N, *p]``."""
    terms = (model(x) - y).square().flatten(1).sum(1) / y.numel()
    grads = [gradients(term, [p], create_graph=True)[0] for term in terms]
    return torch.stack([block(grad, p).diagonal().reshape(p.shape) for grad in grads])


REAL = [name for name in NAMES if any(not p.is_complex() for p in case(name)[0].parameters())]


@pytest.mark.parametrize("name", REAL)
def test_the_hessian_of_real_parameters_behind_complex_activations_is_explicit(name):
    model, x = case(name)
    for p in model.parameters():
        p.requires_grad_(not p.is_complex())
    lossfunc = extend(nn.MSELoss())
    extend(model)
    y = torch.randn(model(x).shape, dtype=R)
    with backpack(DiagHessian(), BatchDiagHessian(), DiagHessianMC(2)):
        lossfunc(model(x), y).backward()
    for p in model.parameters():
        if p.requires_grad and p.grad is not None:
            true = diagonals(model, x, y, p)
            assert equal(p.diag_h_batch, true, 1e-3, 1e-8)
            assert equal(p.diag_h, true.sum(0), 1e-3, 1e-8)
            assert p.diag_h_mc.isfinite().all()


def curved(seed):
    """Real layers, some of whose activations are complex for a while."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    between = [
        lambda x: x.tanh(),
        lambda x: torch.fft.rfft(x).abs().sum(1, keepdim=True) + x,
        lambda x: torch.polar(x.exp(), x).real,
        lambda x: (x.to(C) * torch.tensor([1j, 2, 1 + 1j, -1j]) + 1).abs(),
        lambda x: torch.complex(x, x.sin() + 2).angle(),
        lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(-1, 2, 2)) * (0.6 + 0.8j)).flatten(1),
        lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.tensor([1j, 2, 1]), n=4),
        lambda x: (x * torch.exp(1j * x)).imag,
        lambda x: x.to(C).conj().mul(1j).imag.sigmoid(),
        lambda x: torch.complex(x, x.cos()).sgn().real,
    ]
    chosen = [draw.choice(between) for _ in range(draw.randint(1, 3))]

    def forward(m, x):
        for layer, function in zip(m.layers, chosen, strict=False):
            x = function(layer(x))
        return m.layers[-1](x)

    return Net(forward, layers=nn.ModuleList(linear(4, 4, R) for _ in range(len(chosen) + 1)))


@pytest.mark.parametrize("seed", range(16))
def test_the_hessian_of_real_layers_with_complex_numbers_between_is_explicit(seed):
    model, x = curved(seed), torch.randn(3, 4, dtype=R)
    lossfunc = extend(nn.MSELoss())
    extend(model)
    y = torch.randn(model(x).shape, dtype=R)
    with backpack(DiagHessian(), BatchDiagHessian()):
        lossfunc(model(x), y).backward()
    for p in model.parameters():
        true = diagonals(model, x, y, p)
        assert equal(p.diag_h_batch, true, 1e-3, 1e-8)
        assert equal(p.diag_h, true.sum(0), 1e-3, 1e-8)


@pytest.mark.parametrize("extension", [DiagHessian, BatchDiagHessian, DiagHessianMC])
def test_the_hessian_of_complex_parameters_is_an_error_that_names_them(extension):
    model, x = case("linear")
    lossfunc = extend(nn.MSELoss())
    extend(model)
    model.b.requires_grad_(False)
    y = torch.randn(model(x).shape, dtype=R)
    message = r"complex parameters, as a\.(bias|weight).*view_as_complex"
    with pytest.raises(RuntimeError, match=message), backpack(extension()):
        lossfunc(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())


# Kronecker factors


@pytest.mark.parametrize("name", [name for name in NAMES if "members" not in str(name)])
def test_single_factors_are_the_hermitian_block_and_all_factors_are_hermitian(name):
    model, x = case(name)
    lossfunc = extend(nn.MSELoss())
    extend(model)
    true = roots(model, x)
    y = torch.randn(model(x).shape, dtype=R)
    with backpack(KFLR(), EKFAC(fisher="exact"), KFAC(2)):
        lossfunc(model(x), y).backward()
    for key, v in true.items():
        p = model.get_parameter(key)
        if not v.any():
            continue
        flat = v.flatten(2).flatten(0, 1)
        block = flat.T @ flat.conj()
        scale = size(v).max()
        for factor in [*p.kflr, *p.kfac]:
            assert factor.dim() == 1 or close(factor, factor.mH, 1e-9)
        if len(p.kflr) == 1:
            assert equal(p.kflr[0], block, scale)
            assert close(p.ekfac.dense(), block, scale)
        basis = kfacs_to_mat(p.ekfac.bases)
        assert equal(p.ekfac.eigenvalues.flatten(), (basis.mH @ block @ basis).diagonal().real, scale, 1e-8)


def test_the_factors_of_a_linear_layer_are_those_of_their_definition():
    """For one sample they are the block itself."""
    layer, x = linear(3, 2), torch.randn(1, 3, dtype=C)
    model, lossfunc = extend(nn.Sequential(layer, Parts())), extend(nn.MSELoss())
    (v,) = [v for name, v in roots(model, x).items() if name.endswith("weight")]
    with backpack(KFLR()):
        lossfunc(model(x), torch.randn(1, 4, dtype=R)).backward()
    flat = v.flatten(2).flatten(0, 1)
    assert close(kfacs_to_mat(layer.weight.kflr), flat.T @ flat.conj())
    assert close(layer.weight.kflr[1], x.conj().T @ x)


class Parts(nn.Module):
    def forward(self, z):
        return torch.cat([z.real, z.imag], -1)


def test_arithmetic_with_hermitian_factors():
    factors = [torch.randn(n, 5, dtype=C) for n in (2, 3)]
    factors = [f @ f.mH for f in factors]
    whole, vector = kfacs_to_mat(factors), torch.randn(6, dtype=C)
    shifts = pi_damping(factors, 0.1)
    assert all(not shift.is_complex() for shift in shifts)
    assert close(apply_kfac_mat_prod(factors, vector), whole @ vector)
    assert close(kfacs_to_mat(inv_kfacs(factors)), torch.linalg.inv(whole), rtol=1e-8)
    eigen = eigh_kfacs(factors)
    assert not eigen.eigenvalues.is_complex()
    assert close(eigen.dense(), whole)
    assert close(eigen.apply(vector), whole @ vector)
    damped = whole + 0.1 * torch.eye(6, dtype=C)
    assert close(eigen.apply_inverse(vector, 0.1), torch.linalg.solve(damped, vector), rtol=1e-8)
    assert close(kfac_logdet(factors), torch.linalg.slogdet(whole).logabsdet, rtol=1e-8)
    shifted = [f + s * torch.eye(len(f), dtype=C) for f, s in zip(factors, shifts, strict=True)]
    assert close(kfacs_to_mat(inv_kfacs(factors, shifts)), torch.linalg.inv(kfacs_to_mat(shifted)), rtol=1e-8)


@pytest.mark.parametrize("make", [KFRA, lambda: HBP("ggn", "exact", "average", "E[J^T E(H) J]")])
def test_averaged_curvature_of_complex_numbers_is_an_error(make):
    model, lossfunc = extend(nn.Sequential(linear(3, 2), Parts())), extend(nn.MSELoss())
    with pytest.raises(RuntimeError, match="complex.*KFLR"), backpack(make()):
        lossfunc(model(torch.randn(2, 3, dtype=C)), torch.randn(2, 4, dtype=R)).backward()


def test_positive_curvature_of_complex_functions_that_are_not_linear_is_an_error():
    model, lossfunc = extend(curved(0)), extend(nn.MSELoss())
    model.function = lambda m, x: m.layers[0](x).to(C).add(1j).abs()
    with pytest.raises(RuntimeError, match="complex numbers that is not linear"), backpack(PCHMP()):
        lossfunc(model(torch.randn(2, 4, dtype=R)), torch.randn(2, 4, dtype=R)).backward()
        model.layers[0].weight.pchmp(torch.randn(4, 4, dtype=R))


@pytest.mark.parametrize("name", ["positions", "real scale", "conv1d", "spectrum", "real matrix, positions", "table"])
def test_verify_compares_complex_parameters(name):
    model, x = case(name)
    y = torch.randn(model(x).shape, dtype=R)
    own = [*extensions(), DiagGGNExact(), BatchDiagGGNExact(), SqrtGGNExact(), SqrtGGNMC(3), GGNGram(), HMP(), GGNMP()]
    assert verify(model, nn.MSELoss(), x, y, *own).passed


def test_verify_finds_a_conjugate_that_is_missing():
    class Wrong(BatchGrad):
        def compute(self, grads):
            return super().compute(grads).conj()

    model, x = case("linear")
    assert not verify(model, nn.MSELoss(), x, torch.randn(model(x).shape, dtype=R), Wrong()).passed


def test_bases_of_equal_factors_have_the_data_types_of_their_parameters():
    factor = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    found = eigenbases_by_name({"matrix": [factor.to(torch.complex128)], "bias": [factor], "scale": [factor]})
    assert [basis.dtype for (basis,) in found.values()] == [torch.complex128, torch.float64, torch.float64]
    assert found["scale"][0] is found["bias"][0]
