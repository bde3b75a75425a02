"""Arithmetic with Kronecker factors, against dense matrices."""

import pytest
import torch
from truths import close

from backpack.utils.kroneckers import (
    Eigen,
    apply_inv_kfac_mat_prod,
    apply_kfac_mat_prod,
    eigh_kfacs,
    inv_kfac_mat_prod,
    inv_kfacs,
    is_matrix,
    is_vector,
    kfac_logdet,
    kfac_mat_prod,
    kfacs_to_mat,
    pi_damping,
    two_kfacs_to_mat,
)


def positive(size):
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T + torch.eye(size, dtype=torch.float64)


CASES = {
    "one": lambda: [positive(3)],
    "two": lambda: [positive(2), positive(3)],
    "three": lambda: [positive(2), positive(4), positive(3)],
    "diagonal": lambda: [torch.rand(3, dtype=torch.float64) + 1, positive(2)],
    "diagonals": lambda: [torch.rand(2, dtype=torch.float64) + 1, torch.rand(3, dtype=torch.float64) + 1],
}


def dense(factors):
    full = [torch.diag(f) if f.dim() == 1 else f for f in factors]
    result = full[0].contiguous()
    for factor in full[1:]:
        result = torch.kron(result, factor.contiguous())  # it fails for some strides
    return result


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("columns", [(), (1,), (4,)])
def test_products_are_those_of_the_dense_matrix(name, columns):
    factors = CASES[name]()
    matrix = dense(factors)
    mat = torch.randn(len(matrix), *columns, dtype=torch.float64)
    assert close(kfacs_to_mat(factors), matrix)
    assert close(apply_kfac_mat_prod(factors, mat), matrix @ mat)
    assert torch.equal(kfac_mat_prod(factors)(mat), apply_kfac_mat_prod(factors, mat))
    shifts = [0.5 + k for k in range(len(factors))]
    shifted = [f + s if f.dim() == 1 else f + s * torch.eye(len(f)) for f, s in zip(factors, shifts, strict=True)]
    solved = torch.linalg.solve(dense(shifted), mat)
    assert close(apply_inv_kfac_mat_prod(factors, mat, shift=shifts), solved, rtol=1e-9)
    assert torch.equal(inv_kfac_mat_prod(factors, shifts)(mat), apply_inv_kfac_mat_prod(factors, mat, shifts))
    assert close(kfac_logdet(factors, shifts), torch.logdet(dense(shifted)))
    eigen = eigh_kfacs(factors)
    assert close(eigen.dense(), matrix) and close(eigen.apply(mat), matrix @ mat)
    damped = matrix + 0.3 * torch.eye(len(matrix), dtype=torch.float64)
    assert close(eigen.apply_inverse(mat, 0.3), torch.linalg.solve(damped, mat), rtol=1e-9)
    assert close(eigen.logdet(0.3), torch.logdet(damped))


def test_rectangular_factors_multiply():
    factors = [torch.randn(2, 3), torch.randn(4, 5)]
    mat = torch.randn(15, 2)
    assert torch.allclose(two_kfacs_to_mat(*factors) @ mat, apply_kfac_mat_prod(factors, mat), atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_inverse_times_matrix_is_the_identity(name):
    factors = CASES[name]()
    identity = torch.eye(len(dense(factors)), dtype=torch.float64)
    assert close(dense(inv_kfacs(factors)) @ dense(factors), identity)


def test_inverse_of_an_indefinite_factor_is_its_inverse():
    factor = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    assert torch.allclose(inv_kfacs([factor])[0] @ factor, torch.eye(2), atol=1e-6)


def test_nearly_singular_float32_factors_are_inverted_in_float64():
    """Relative to the exact inverse, the result is right to the precision of float32."""
    root = torch.randn(20, 10)
    factor = (root @ root.T).contiguous()
    factor = (factor + factor.T) / 2
    found = inv_kfacs([factor], shift=1e-5)[0]
    truth = torch.linalg.inv(factor.double() + 1e-5 * torch.eye(20, dtype=torch.float64))
    assert found.dtype == torch.float32
    assert (found - truth).abs().max() <= 1e-6 * truth.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_pi_damping_splits_the_damping_in_the_ratio_of_the_mean_eigenvalues(name):
    factors = CASES[name]()
    shifts = pi_damping(factors, 0.01)
    means = [f.mean() if f.dim() == 1 else f.trace() / len(f) for f in factors]
    assert torch.stack(shifts).prod() == pytest.approx(0.01)
    assert [float(s / m) for s, m in zip(shifts, means, strict=True)] == pytest.approx(
        [float(shifts[0] / means[0])] * len(means)
    )


def test_pi_damping_of_a_factor_that_is_zero_can_be_inverted():
    factors = [torch.zeros(2, 2), torch.eye(3)]
    assert all(f.isfinite().all() for f in inv_kfacs(factors, pi_damping(factors, 1e-3)))


@pytest.mark.parametrize("factor", [torch.ones(2, 2), torch.zeros(2, 2), torch.tensor([1.0, 0.0])])
def test_singular_factors_are_refused(factor):
    with pytest.raises(ValueError, match=r"singular.*positive shift"):
        inv_kfacs([factor])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 shifts for 1 factors"):
        inv_kfacs([torch.eye(2)], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"2 \* 3 columns"):
        apply_kfac_mat_prod([torch.eye(2), torch.eye(3)], torch.ones(5))
    with pytest.raises(ValueError, match="no factors"):
        kfacs_to_mat([])
    with pytest.raises(ValueError, match="damping must be positive"):
        pi_damping([torch.eye(2)], 0.0)
    with pytest.raises(ValueError, match="eigenvalue zero"):
        eigh_kfacs([torch.tensor([0.0, 1.0])]).apply_inverse(torch.ones(2))
    with pytest.raises(ValueError, match="two axes"):
        kfacs_to_mat([torch.ones(2, 2, 2)])
    assert is_matrix(torch.eye(2)) and not is_matrix(torch.ones(2)) and is_vector(torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["orthogonal", "softmax", "two factors"])
def test_what_is_singular_up_to_rounding_is_not_inverted(kind, dtype):
    p = torch.tensor([0.2, 0.5, 0.3], dtype=dtype)
    softmax = torch.diag(p) - torch.outer(p, p)  # rows add up to zero
    v = torch.linspace(1, 2, 5, dtype=dtype)
    orthogonal = torch.eye(5, dtype=dtype) - torch.outer(v, v) / (v @ v)
    factors = {"orthogonal": [orthogonal], "softmax": [softmax], "two factors": [torch.eye(4, dtype=dtype), softmax]}
    decomposed, size = eigh_kfacs(factors[kind]), kfacs_to_mat(factors[kind]).shape[0]
    with pytest.raises(ValueError, match="eigenvalue zero, up to rounding: add a positive damping"):
        decomposed.apply_inverse(torch.ones(size, dtype=dtype))
    assert decomposed.logdet() == -torch.inf
    damped = kfacs_to_mat(factors[kind]) + 0.1 * torch.eye(size, dtype=dtype)  # the remedy
    vector = torch.ones(size, dtype=dtype)
    assert close(decomposed.apply_inverse(vector, 0.1), torch.linalg.solve(damped, vector), rtol=1e-5)
    assert close(decomposed.logdet(0.1), torch.linalg.slogdet(damped).logabsdet, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-3, 1e-6, 1e-9, 1e-20])
@pytest.mark.parametrize("smallest", [0.0, 1e-8])
def test_any_positive_damping_makes_a_semidefinite_matrix_regular(smallest, damping, dtype):
    generator = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=dtype)).Q for n in (40, 5)]
    values = torch.rand(40, 5, generator=generator, dtype=dtype)
    values[:20] = smallest
    eigen = Eigen(bases, values)
    damped = values.double().flatten() + damping
    within = torch.kron(*bases).double()  # vectors along the eigenvectors, large and small
    for row in (0, 199):
        vector = within[:, row]
        expected = vector / damped[row]
        error = (eigen.apply_inverse(vector.to(dtype), damping) - expected).norm()
        assert error < 1e-5 * expected.norm() + torch.finfo(dtype).eps * 200 / damped.min()
    assert close(eigen.logdet(damping), damped.log().sum().to(dtype), rtol=1e-6)


@pytest.mark.parametrize("values", [[-1e-9, 1e-9, 1.0], [-0.5, 0.2, 1.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
def test_the_damping_that_a_message_calls_enough_is_enough(values):
    eigenvalues = torch.tensor(values, dtype=torch.float64)
    eigen = Eigen([torch.eye(3, dtype=torch.float64)], eigenvalues)
    damping = max(0.0, -values[0])
    with pytest.raises(ValueError, match=f"instead of {damping:.3g}; .* is enough") as error:
        eigen.apply_inverse(torch.ones_like(eigenvalues), damping)
    enough = float(str(error.value).split("; ")[1].split()[0])
    assert close(eigen.apply_inverse(torch.ones_like(eigenvalues), enough), 1 / (eigenvalues + enough))
