"""
Trace and spectrum of the Hessian
=================================

Which directions does the loss curve in, and how much? The largest eigenvalues and the
trace of a classifier's Hessian need only products of the Hessian with vectors. SciPy's
solver for eigenvalues takes such products as they are.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn import CrossEntropyLoss, Flatten, Linear, Sequential, Tanh

from backpack import backpack, extend
from backpack.extensions import DiagHessian
from backpack.hessianfree import hessian_vector_product
from backpack.utils.convert_parameters import vector_to_parameter_list
from backpack.utils.examples import load_one_batch_mnist

torch.manual_seed(0)
X, y = load_one_batch_mnist(batch_size=128)
model = extend(Sequential(Flatten(), Linear(784, 16), Tanh(), Linear(16, 10)).double())
lossfunc = extend(CrossEntropyLoss())
loss = lossfunc(model(X.double()), y)
parameters = list(model.parameters())
size = sum(p.numel() for p in parameters)

# %%
# The graph of the gradient is made once and used for all products.

grads = torch.autograd.grad(loss, parameters, create_graph=True)


def multiply(vector: np.ndarray) -> np.ndarray:
    parts = vector_to_parameter_list(torch.from_numpy(vector).flatten(), parameters)
    return torch.cat(
        [h.flatten() for h in hessian_vector_product(loss, parameters, parts, grads)]
    ).numpy()


hessian = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
largest, vectors = eigsh(hessian, k=20, which="LA")
top = ", ".join(f"{value:.4f}" for value in largest[:-4:-1])
print(f"Largest of {size} eigenvalues: {top}")

# %%
# The exact trace is the sum of ``DiagHessian``. Hutchinson's method estimates it from
# products with random signs. These need the graph again, hence ``retain_graph``.
with backpack(DiagHessian()):
    loss.backward(retain_graph=True)
trace = sum(p.diag_h.sum().item() for p in parameters)
signs = np.random.default_rng(0).choice([-1.0, 1.0], (100, size))
draws = np.array([sign @ multiply(sign) for sign in signs])
error = draws.std(ddof=1) / len(draws) ** 0.5
print(f"The 20 largest eigenvalues sum to {largest.sum() / trace:.0%} of the trace.")
print(f"Trace: {trace:.4f}; estimated: {draws.mean():.4f} +- {error:.4f}")

residuals = [
    np.linalg.norm(multiply(v) - value * v)
    for value, v in zip(largest, vectors.T, strict=True)
]
match = max(residuals) < 1e-6 and abs(draws.mean() - trace) < 5 * error
print(f"Do eigenvalues and trace match? {match}")
if not match:
    raise AssertionError("Eigenvalues or trace are wrong.")

# %%
# A few directions carry a large part of the trace.

figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
axis.bar(range(1, 21), largest[::-1])
axis.set(
    xlabel="rank",
    ylabel="eigenvalue",
    title=f"The 20 largest of {size}",
    xticks=range(1, 21, 2),
)
plt.show()
