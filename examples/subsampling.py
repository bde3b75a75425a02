"""
Mini-batch sub-sampling
=======================

Individual gradients of a few samples of a batch of real digits, and what it saves to ask for no more.
"""

from time import perf_counter

from torch import allclose, cuda, device, manual_seed
from torch.nn import CrossEntropyLoss, Flatten, Linear, Sequential

from backpack import backpack, extend
from backpack.extensions import BatchGrad
from backpack.utils.examples import load_one_batch_mnist

manual_seed(0)
dev = device("cuda" if cuda.is_available() else "cpu")
X, y = load_one_batch_mnist(batch_size=128)
X, y = X.to(dev), y.to(dev)

model = Sequential(Flatten(), Linear(784, 10)).to(dev)
lossfunc = CrossEntropyLoss().to(dev)
model = extend(model)
lossfunc = extend(lossfunc)

subsampling = [0, 1, 13, 42]

# %%
# All individual gradients, then those of a few samples.
loss = lossfunc(model(X), y)
with backpack(BatchGrad()):
    loss.backward()
naive = [p.grad_batch[subsampling] for p in model.parameters()]
stored = sum(p.grad_batch.nbytes for p in model.parameters())

# %%
# Only those of the few samples.
loss = lossfunc(model(X), y)
with backpack(BatchGrad(subsampling=subsampling)):
    loss.backward()
efficient = [p.grad_batch for p in model.parameters()]

match = all(allclose(g_naive, g_efficient) for g_naive, g_efficient in zip(naive, efficient, strict=True))
print(f"Naive and efficient sub-sampled individual gradients match? {match}")
if not match:
    raise AssertionError("Individual gradients with and without sub-sampling differ.")


# %%
# What that takes.


def milliseconds(*extensions: BatchGrad, repetitions: int = 30) -> float:
    """Median time of one forward and backward pass."""
    times = []
    for _ in range(repetitions):
        start = perf_counter()
        loss = lossfunc(model(X), y)
        with backpack(*extensions):
            loss.backward()
        if dev.type == "cuda":
            cuda.synchronize()
        times.append(perf_counter() - start)
    return 1e3 * sorted(times)[repetitions // 2]


for extension in (BatchGrad(), BatchGrad(subsampling=subsampling)):  # warm up
    milliseconds(extension, repetitions=3)
plain, full, few = milliseconds(), milliseconds(BatchGrad()), milliseconds(BatchGrad(subsampling=subsampling))
saved = sum(g.nbytes for g in efficient)
print(f"gradient alone:                      {plain:6.2f} ms")
print(f"and {len(X):3d} individual gradients:        {full:6.2f} ms, {stored / 2**20:6.2f} MiB stored")
print(f"and {len(subsampling):3d} individual gradients:        {few:6.2f} ms, {saved / 2**20:6.2f} MiB stored")
