"""
Sub-sampling a mini-batch
=========================

Often a few samples of a batch are enough: to look at their gradients, or to estimate
their variance. With ``subsampling``, an extension computes its result for these samples
only. The gradient is still that of the whole batch.

``make demo`` runs this script.
"""

from importlib.util import find_spec
from statistics import median
from time import perf_counter

import torch
from torch import cuda
from torch.nn import (
    Conv2d,
    CrossEntropyLoss,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
)

from backpack import backpack, extend
from backpack.extensions import BatchGrad
from backpack.utils.examples import load_one_batch_mnist

torch.manual_seed(0)
device = "cuda" if cuda.is_available() else "cpu"
X, y = load_one_batch_mnist(batch_size=128)
X, y = X.to(device), y.to(device)
layers = [Conv2d(1, 8, 5, 2), ReLU(), Conv2d(8, 16, 3), ReLU(), MaxPool2d(2), Flatten()]
layers += [Linear(400, 128), ReLU(), Linear(128, 10)]
model = extend(Sequential(*layers).to(device))
lossfunc = extend(CrossEntropyLoss())


def run(*extensions: BatchGrad) -> None:
    """One forward and one backward pass."""
    model.zero_grad()
    loss = lossfunc(model(X), y)
    with backpack(*extensions):
        loss.backward()


# %%
# Four samples
# ------------
#
# The results are the rows that ``BatchGrad()`` has for these samples.

SAMPLES = [0, 1, 13, 42]
run(BatchGrad())
expected = [p.grad_batch[SAMPLES] for p in model.parameters()]
run(BatchGrad(subsampling=SAMPLES))
match = True
print(f"{'parameter':12} {'shape':16} grad_batch of {len(SAMPLES)} samples")
for (name, p), rows in zip(model.named_parameters(), expected, strict=True):
    match = match and torch.allclose(p.grad_batch, rows, atol=1e-6)
    print(f"{name:12} {list(p.shape)!s:16} {list(p.grad_batch.shape)}")
print(f"The same as those rows of all individual gradients? {match}")

# %%
# What it saves
# -------------
#
# Memory for results is proportional to the number of samples. Time is measured in
# turns, so that other load on the machine hits all settings alike; the median of all
# rounds is printed.

SIZES, ROUNDS = (4, 16, 64, 128), 25
settings = {0: (), **{size: (BatchGrad(subsampling=range(size)),) for size in SIZES}}
times: dict[int, list[float]] = {size: [] for size in settings}
stored: dict[int, float] = {0: 0.0}
for number in range(-3, ROUNDS):  # three rounds to warm up
    for size, extensions in settings.items():
        start = perf_counter()
        run(*extensions)
        if device == "cuda":
            cuda.synchronize()
        if number >= 0:
            times[size].append(1e3 * (perf_counter() - start))
        if size:
            stored[size] = sum(p.grad_batch.nbytes for p in model.parameters()) / 2**20

print("\nindividual gradients    memory of the results    time of a pass")
for size, measured in times.items():
    what = f"of {size} samples" if size else "none"
    print(f"{what:23} {stored[size]:12.2f} MiB {median(measured):18.2f} ms")
print(
    f"\nFour samples take {1 - stored[4] / stored[128]:.0%} less memory than all 128."
)

# %%
# The script runs without Matplotlib; the picture needs it.

if find_spec("matplotlib"):
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
    axis.bar([str(size) for size in SIZES], [stored[size] for size in SIZES])
    axis.set(xlabel="samples selected, of 128", ylabel="memory of the results [MiB]")
    plt.show()
