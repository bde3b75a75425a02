"""Powers of matrices in Kronecker form, and samples whose covariance is their inverse, against dense matrices."""

from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from truths import close

from backpack import backpack, extend
from backpack.extensions import EKFAC, KFAC
from backpack.utils.kroneckers import (
    Eigen,
    apply_kfac_mat_prod,
    eigh_kfacs,
    inv_kfacs,
    inv_sqrt_kfacs,
    kfacs_to_mat,
    pi_damping,
)

R, C = torch.float64, torch.complex128


def positive(size, rank=None, dtype=R):
    root = torch.randn(size, size if rank is None else rank, dtype=dtype)
    return root @ root.mH


def dense(factors):
    return reduce(torch.kron, [(torch.diag(f) if f.dim() == 1 else f).resolve_conj().contiguous() for f in factors])


def eye(size, dtype=R):
    return torch.eye(size, dtype=dtype)


def powered(matrix, exponent):
    """By the dense eigendecomposition."""
    values, basis = torch.linalg.eigh(matrix)
    return (basis * values**exponent) @ basis.mH


CASES = {
    "one": lambda: [positive(4)],
    "two": lambda: [positive(3), positive(2)],
    "three": lambda: [positive(2), positive(3), positive(2)],
    "diagonals": lambda: [torch.rand(3, dtype=R), positive(2), torch.rand(2, dtype=R)],
    "singular": lambda: [positive(4, 2), positive(3, 1)],
    "zero": lambda: [torch.zeros(2, 2, dtype=R), torch.tensor([0.0, 1.0, 2.0], dtype=R)],
    "hermitian": lambda: [positive(3, dtype=C), positive(2, 1, dtype=C)],
    "hermitian and diagonal": lambda: [torch.rand(2, dtype=R).to(C), positive(3, 2, dtype=C)],
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shift", [0.1, "each", "pi"])
def test_the_square_of_the_inverse_root_of_a_factor_is_its_inverse(name, shift):
    factors = CASES[name]()
    shifts = {"each": [0.3 + k for k in range(len(factors))], "pi": pi_damping(factors, 0.2)}.get(shift, shift)
    for root, inverse in zip(inv_sqrt_kfacs(factors, shifts), inv_kfacs(factors, shifts), strict=True):
        assert root.dtype == inverse.dtype and root.shape == inverse.shape
        assert close(kfacs_to_mat([root]), kfacs_to_mat([root]).mH)
        assert close(root * root if root.dim() == 1 else root @ root, inverse, rtol=1e-9)
        assert torch.linalg.eigvalsh(kfacs_to_mat([root])).min() > 0


@pytest.mark.parametrize("name", ["one", "two", "three", "diagonals"])
def test_regular_factors_need_no_shift(name):
    factors = CASES[name]()
    found = dense(inv_sqrt_kfacs(factors))
    assert close(found @ dense(factors) @ found, eye(len(found)), rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("exponent", [-1, -0.5, -0.25, 0, 0.5, 1, 2, 1.7])
def test_powers_are_those_of_the_dense_damped_matrix(name, exponent):
    factors, damping = CASES[name](), 0.3
    matrix = dense(factors)
    true = powered(matrix + damping * eye(len(matrix)), exponent)
    power = eigh_kfacs(factors).power(exponent, damping)
    assert isinstance(power, Eigen) and power.eigenvalues.dtype == R
    assert close(power.dense(), true, rtol=1e-9)
    mat = torch.randn(len(matrix), 3, dtype=true.dtype)
    assert close(power.apply(mat), true @ mat, rtol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**20), st.floats(-2, 2, allow_subnormal=False), st.floats(-2, 2), st.sampled_from(["two", "three"])
)
def test_exponents_of_powers_add_up(seed, a, b, name):
    torch.manual_seed(seed)
    eigen = eigh_kfacs(CASES[name]())
    product = eigen.power(a, 0.5).dense() @ eigen.power(b, 0.5).dense()
    assert close(product, eigen.power(a + b, 0.5).dense(), rtol=1e-8)


def test_powers_of_what_has_no_inverse_but_a_root_are_right_without_damping():
    factors = CASES["singular"]()
    assert close(eigh_kfacs(factors).power(2).dense(), dense(factors) @ dense(factors))
    root = eigh_kfacs(factors).power(0.5).dense()
    assert close(root @ root, dense(factors))


def test_whole_powers_of_an_indefinite_matrix_are_right():
    matrix = torch.diag(torch.tensor([-1.0, 2.0], dtype=R))
    assert close(eigh_kfacs([matrix]).power(-2).dense(), torch.linalg.inv(matrix @ matrix))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [None, 1, 5])
def test_the_damped_matrix_makes_noise_of_a_sample(name, count):
    """``x^H (M + damping I) x`` is the squared norm of the noise that it was made of."""
    eigen, damping = eigh_kfacs(CASES[name]()), 0.3
    matrix = eigen.dense() + damping * eye(len(eigen.dense()))
    sample = eigen.sample(count, damping, torch.Generator().manual_seed(3))
    size = [len(matrix)] if count is None else [len(matrix), count]
    noise = torch.randn(size, dtype=matrix.dtype, generator=torch.Generator().manual_seed(3))
    assert sample.shape == noise.shape and sample.dtype == matrix.dtype
    assert close((sample.conj() * (matrix @ sample)).sum(0).real, noise.abs().square().sum(0))


@pytest.mark.parametrize("name", ["two", "diagonals", "hermitian"])
@pytest.mark.parametrize("damping", ["factored", "exact"])
def test_the_covariance_of_samples_is_the_inverse(name, damping):
    """Within six standard errors, estimated from the draws; of complex samples, without correlation to conjugates."""
    factors, draws = CASES[name](), 20_000
    if damping == "exact":
        sample = eigh_kfacs(factors).sample(draws, 0.5)
        covariance = powered(dense(factors) + 0.5 * eye(len(sample)), -1)
    else:
        shifts = pi_damping(factors, 0.5)
        noise = torch.randn(len(dense(factors)), draws, dtype=factors[0].dtype)
        sample = apply_kfac_mat_prod(inv_sqrt_kfacs(factors, shifts), noise)
        covariance = dense(inv_kfacs(factors, shifts))
    for other, expected in [(sample.conj(), covariance), (sample, covariance * (not covariance.is_complex()))]:
        products = sample[:, None] * other[None]
        difference = torch.view_as_real((products.mean(-1) - expected).to(C))
        error = torch.view_as_real(products.to(C)).std(2) / draws**0.5
        assert bool((difference.abs() <= 6 * error + 1e-12).all())


@pytest.mark.parametrize("extension", [KFAC(mc_samples=2), EKFAC(mc_samples=2)])
def test_samples_of_a_layer_have_the_size_and_type_of_its_parameters(extension):
    model = extend(nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3)))
    with backpack(extension):
        extend(nn.CrossEntropyLoss())(model(torch.rand(4, 2, 3, 3)), torch.arange(4) % 3).backward()
    for parameter in model.parameters():
        result = extension.result(parameter)
        eigen = result if isinstance(result, Eigen) else eigh_kfacs(result)
        sample = eigen.sample(damping=1e-2)
        assert sample.reshape(parameter.shape).dtype == torch.float32
        assert eigen.sample(7, 1e-2).shape == (parameter.numel(), 7)
        largest = eigen.eigenvalues.max() + 1e-2
        assert sample.isfinite().all() and eigen.power(-0.5, 1e-2).eigenvalues.min() >= 0.99 * largest**-0.5


def test_nearly_singular_float32_factors_are_computed_in_float64():
    root = torch.randn(20, 10)
    factor = (root @ root.T).contiguous()
    factor = (factor + factor.T) / 2
    (found,) = inv_sqrt_kfacs([factor], shift=1e-3)
    truth = powered(factor.double() + 1e-3 * eye(20), -0.5)
    assert found.dtype == torch.float32
    assert (found - truth).abs().max() <= 1e-6 * truth.abs().max()


SOFTMAX = torch.diag(torch.tensor([0.2, 0.5, 0.3])) - torch.outer(*[torch.tensor([0.2, 0.5, 0.3])] * 2)


@pytest.mark.parametrize("factor", [torch.ones(2, 2), torch.zeros(2, 2), torch.tensor([1.0, 0.0]), SOFTMAX])
@pytest.mark.parametrize("shift", [None, 0.0, [0.0]])
def test_singular_factors_have_no_inverse_root(factor, shift):
    with pytest.raises(ValueError, match=r"singular.*positive shift"):
        inv_sqrt_kfacs([factor], shift)
    assert inv_sqrt_kfacs([factor], 0.1)[0].isfinite().all()  # the remedy


def test_what_has_no_inverse_root_is_refused():
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(ValueError, match="negative eigenvalue -1: .* larger shift"):
        inv_sqrt_kfacs([indefinite])
    with pytest.raises(ValueError, match="negative eigenvalue -0.5: .* larger shift"):
        inv_sqrt_kfacs([indefinite], 0.5)
    assert close(
        kfacs_to_mat(inv_sqrt_kfacs([indefinite], 2.0)), powered(indefinite + 2 * torch.eye(2), -0.5), rtol=1e-5
    )
    with pytest.raises(ValueError, match="negative eigenvalue -1, so that its power -0.5 is not real: add a larger"):
        eigh_kfacs([indefinite]).sample()
    with pytest.raises(ValueError, match=r"power 0\.5 is not real"):
        eigh_kfacs([indefinite]).power(0.5, 0.2)
    with pytest.raises(ValueError, match="eigenvalue zero, up to rounding: add a positive damping"):
        eigh_kfacs([SOFTMAX]).power(-0.5)
    with pytest.raises(ValueError, match="eigenvalue zero, up to rounding: add a positive damping"):
        eigh_kfacs([SOFTMAX]).sample(3)
    with pytest.raises(ValueError, match="2 shifts for 1 factors"):
        inv_sqrt_kfacs([torch.eye(2)], [1.0, 2.0])
    with pytest.raises(ValueError, match="no factors"):
        inv_sqrt_kfacs([])
