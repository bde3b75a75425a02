"""
Newton steps by conjugate gradients
===================================

A Newton step solves ``(G + damping) step = -gradient``, where ``G`` is the generalized
Gauss-Newton matrix (GGN). The method of conjugate gradients needs only products with
``G``, not the matrix itself. This is Hessian-free optimization (`Martens, 2010
<https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf>`_), on a smaller
version of the autoencoder in that paper.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import Linear, MSELoss, Sequential, Tanh

from backpack.hessianfree.ggnvp import ggn_vector_product
from backpack.utils.convert_parameters import vector_to_parameter_list
from backpack.utils.examples import load_one_batch_mnist

torch.manual_seed(0)
images, _ = load_one_batch_mnist(batch_size=500)
X = torch.nn.functional.avg_pool2d(images * 0.3081 + 0.1307, 2).flatten(
    1
)  # 14 x 14, from 0 to 1
lossfunc = MSELoss()


def make_model() -> Sequential:
    torch.manual_seed(0)
    sizes = (196, 100, 50, 12, 50, 100, 196)
    layers = [
        layer
        for i, o in zip(sizes, sizes[1:], strict=False)
        for layer in (Linear(i, o), Tanh())
    ]
    return Sequential(*layers[:-1])


# %%
# Conjugate gradients start from zero. A few iterations are enough.


def conjugate_gradients(multiply, b: Tensor, iterations: int) -> Tensor:
    x, residual = torch.zeros_like(b), b.clone()
    direction, square = residual.clone(), residual @ residual
    for _ in range(iterations):
        product = multiply(direction)
        rate = square / (direction @ product)
        x += rate * direction
        residual -= rate * product
        before, square = square, residual @ residual
        direction = residual + square / before * direction
    return x


# %%
# A quadratic model of the loss predicts by how much each step lowers it. If the loss
# falls by less than a quarter of that, the damping grows. If it falls by more than
# three quarters, the damping shrinks (Levenberg-Marquardt).


def newton(model: Sequential, steps: int, damping: float = 0.03) -> list[float]:
    parameters, losses = list(model.parameters()), []
    for _ in range(steps):
        output = model(X)
        loss = lossfunc(output, X)
        losses.append(loss.item())
        grad = torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(loss, parameters, retain_graph=True)
            ]
        )

        def curvature(
            v: Tensor, loss: Tensor = loss, output: Tensor = output
        ) -> Tensor:
            product = ggn_vector_product(
                loss, output, model, vector_to_parameter_list(v, parameters)
            )
            return torch.cat([part.flatten() for part in product])

        step = conjugate_gradients(
            lambda v, d=damping: curvature(v) + d * v, -grad, iterations=15
        )
        predicted = grad @ step + step @ curvature(step) / 2
        with torch.no_grad():
            for p, s in zip(
                parameters, vector_to_parameter_list(step, parameters), strict=True
            ):
                p += s
            ratio = (lossfunc(model(X), X) - loss) / predicted
            if ratio < 0:  # worse than before: back
                for p, s in zip(
                    parameters, vector_to_parameter_list(step, parameters), strict=True
                ):
                    p -= s
        damping *= 1.5 if ratio < 0.25 else 2 / 3 if ratio > 0.75 else 1
    return losses


# %%
# For comparison, gradient descent with momentum. Its rate is the best of 1, 3, 6 and
# 10.


def gradient_descent(model: Sequential, steps: int, rate: float) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), rate, momentum=0.9), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = lossfunc(model(X), X)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


STEPS, PRODUCTS = 12, 16
by_newton = newton(make_model(), STEPS)
by_descent = gradient_descent(make_model(), 2 * STEPS * PRODUCTS, rate=6.0)
print(
    f"loss {by_newton[-1]:.4f} after {STEPS} Newton steps, "
    f"{by_descent[-1]:.4f} after {len(by_descent)} gradient steps"
)
assert by_newton[-1] < min(by_descent[:STEPS])

# %%
# A product with the GGN costs about as much as two gradients. The picture compares by
# that work. Newton's method is far ahead step by step, but on a problem of this size
# well-tuned gradient descent needs less work.

figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
work = [2 * PRODUCTS * step for step in range(STEPS)]
axis.plot(work, by_newton, "o-", label="Newton, one dot a step")
axis.plot(by_descent, label="gradient descent")
axis.set(xlabel="work [gradients]", ylabel="loss", yscale="log")
axis.set_yticks([0.02, 0.05, 0.1], ["0.02", "0.05", "0.10"])
axis.minorticks_off()
axis.legend()
plt.show()
