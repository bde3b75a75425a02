"""
What sub-sampling saves
=======================

Individual gradients of a few samples cost little more than the gradient itself: time and memory go with the number of
samples that are asked for. This measures both, for a small convolutional network on 128 handwritten digits.
"""

from time import perf_counter

import matplotlib.pyplot as plt
from torch import allclose, manual_seed
from torch.nn import Conv2d, CrossEntropyLoss, Flatten, Linear, MaxPool2d, ReLU, Sequential

from backpack import backpack, extend
from backpack.extensions import BatchGrad
from backpack.utils.examples import load_one_batch_mnist

manual_seed(0)
X, y = load_one_batch_mnist(batch_size=128)
layers = [Conv2d(1, 8, 5, 2), ReLU(), Conv2d(8, 16, 3), ReLU(), MaxPool2d(2), Flatten(), Linear(400, 128), ReLU()]
model = extend(Sequential(*layers, Linear(128, 10)))
lossfunc = extend(CrossEntropyLoss())

# %%
# A forward and a backward pass, several times; the median.


def milliseconds(*extensions: BatchGrad, repetitions: int = 9) -> float:
    times = []
    for _ in range(repetitions):
        start = perf_counter()
        loss = lossfunc(model(X), y)
        with backpack(*extensions):
            loss.backward()
        times.append(perf_counter() - start)
    return 1e3 * sorted(times)[repetitions // 2]


milliseconds(BatchGrad())  # warm up
sizes = [1, 2, 4, 8, 16, 32, 64, 128]
plain = milliseconds()
times, stored, results = [], [], {}
for size in sizes:
    times.append(milliseconds(BatchGrad(subsampling=range(size))))
    results[size] = [p.grad_batch for p in model.parameters()]
    stored.append(sum(g.nbytes for g in results[size]) / 2**20)

# %%
# The gradients of the first four samples are those that a block without ``subsampling`` gives.

assert all(allclose(few, every[:4], atol=1e-7) for few, every in zip(results[4], results[128], strict=True))

# %%
# Time is flat until the products for individual gradients cost as much as the rest of the pass.

figure, (left, right) = plt.subplots(2, 1, figsize=(5, 5.6), layout="constrained")
left.plot(sizes, times, "o-", label="gradient and individual gradients")
left.axhline(plain, color="black", linestyle="--", label="gradient alone")
left.set(xscale="log", xlabel="samples selected (of 128)", ylabel="time [ms]", ylim=(0, None))
left.legend()
right.plot(sizes, stored, "o-")
right.set(xscale="log", yscale="log", xlabel="samples selected (of 128)", ylabel="memory of the results [MiB]")
for axis in (left, right):
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
plt.show()
