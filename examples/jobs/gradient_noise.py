"""
Gradient noise scale and diagnostics of each layer
==================================================

How large should a batch be? About as large as the gradient noise scale: the variance of
the samples' gradients, divided by the squared norm of their mean (`McCandlish et al.,
2018 <https://arxiv.org/abs/1812.06162>`_). Far below it, twice the batch size saves
nearly half of the steps; far above it, hardly any. The same numbers of a single layer
tell where the gradient is mostly noise.

This script measures them while it trains: first in a plain loop, then in the
``Trainer`` of ``transformers``.
"""

import tempfile
from contextlib import ExitStack

import matplotlib.pyplot as plt
import torch
from torch.nn import (
    Conv2d,
    CrossEntropyLoss,
    Flatten,
    Linear,
    MaxPool2d,
    Module,
    ReLU,
    Sequential,
)
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from backpack import backpack, extend
from backpack.extensions import BatchL2Grad, Variance
from backpack.utils.examples import load_one_batch_mnist

torch.manual_seed(0)
X, y = load_one_batch_mnist(batch_size=1000)

# %%
# The estimate
# ------------
#
# ``batch_l2`` has the squared norms of the samples' gradients, and ``variance`` their
# mean squared distance to their mean. Both carry the factor ``1/N`` of the loss, which
# is taken out. Both estimates below are unbiased. They are averaged over steps before
# they are divided, since the mean of a ratio is not the ratio of means.


class NoiseScale:
    """Running estimates, one for each parameter."""

    def __init__(self, model: Module, memory: float = 0.98) -> None:
        self.parameters = dict(model.named_parameters())
        self.memory, self.weight, self.history = memory, 0.0, []
        self.noise = dict.fromkeys(self.parameters, 0.0)
        self.signal = dict.fromkeys(self.parameters, 0.0)

    def update(self) -> None:
        """Read the results of a backward pass."""
        self.weight = self.memory * self.weight + 1 - self.memory
        for name, p in self.parameters.items():
            n = len(p.batch_l2)
            spread = n**2 * p.variance.sum().item()
            square = n * p.batch_l2.sum().item() - spread  # norm of the mean
            noise = spread * n / (n - 1)
            self.noise[name] += (1 - self.memory) * (noise - self.noise[name])
            signal = square - noise / n
            self.signal[name] += (1 - self.memory) * (signal - self.signal[name])
        self.history.append(self.of(*self.parameters))

    def of(self, *names: str) -> float:
        """The noise scale of some parameters together, in samples."""
        signal = sum(self.signal[name] for name in names)
        noise = sum(self.noise[name] for name in names)
        return noise / signal if signal > 0 else float("inf")

    def table(self) -> str:
        """Noise scale, and root of the gradient's squared norm, of each matrix."""
        rows = ["noise scale  gradient  parameter"]
        for name, p in self.parameters.items():
            if p.dim() > 1:
                norm = max(self.signal[name] / self.weight, 0.0) ** 0.5
                rows.append(f"{self.of(name):11.0f} {norm:9.4f}  {name}")
        return "\n".join(rows)


# %%
# A plain loop
# ------------

N, EPOCHS = 50, 10
layers = [Conv2d(1, 8, 5, 2), ReLU(), MaxPool2d(2), Flatten()]
layers += [Linear(288, 32), ReLU(), Linear(32, 10)]
model, lossfunc = extend(Sequential(*layers)), extend(CrossEntropyLoss())
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
of_cnn = NoiseScale(model)
for _ in range(EPOCHS):
    for batch in torch.randperm(len(X)).split(N):
        optimizer.zero_grad()
        loss = lossfunc(model(X[batch]), y[batch])
        with backpack(Variance(), BatchL2Grad()):
            loss.backward()
        of_cnn.update()
        optimizer.step()
print(of_cnn.table())

# %%
# A callback of the ``Trainer``
# -----------------------------
#
# The callback opens the block when a step begins and closes it after the backward pass.
# Nothing in the model or the ``Trainer`` changes, and the loss is the one that the
# model computes itself. Each backward pass overwrites the results: with gradient
# accumulation, they are read after each of its passes, in ``on_substep_end``.
#
# The estimates do not read ``p.grad``, which the ``Trainer`` clips.


class NoiseScaleCallback(TrainerCallback):
    def __init__(self, model: Module) -> None:
        self.scale, self.block = NoiseScale(extend(model)), ExitStack()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.block.enter_context(backpack(Variance(), BatchL2Grad()))

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        self.scale.update()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.block.close()
        self.scale.update()


torch.manual_seed(0)
config = ViTConfig(
    image_size=28,
    patch_size=7,
    num_channels=1,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    num_labels=10,
)
vit = ViTForImageClassification(config)
callback = NoiseScaleCallback(vit)
digits = [
    {"pixel_values": x, "labels": int(label)} for x, label in zip(X, y, strict=True)
]
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=N,
        num_train_epochs=EPOCHS,
        learning_rate=3e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    trainer = Trainer(vit, arguments, train_dataset=digits, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
print(callback.scale.table())

# %%
# The noise scale tends to grow while training: the better a model fits, the less the
# samples agree on what to change. The estimates average over about 50 steps.

figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
for name, scale in (("convolutional net", of_cnn), ("ViT, Trainer", callback.scale)):
    axis.plot(range(20, len(scale.history)), scale.history[20:], label=name)
    print(
        f"{name}: noise scale {scale.history[20]:.0f} samples after 20 steps, "
        f"{scale.history[-1]:.0f} after {len(scale.history)}"
    )
axis.axhline(N, color="black", linestyle="--", label="batch size")
axis.set(xlabel="step", ylabel="gradient noise scale [samples]", yscale="log")
axis.set_yticks([20, 50, 100, 200], ["20", "50", "100", "200"])
axis.minorticks_off()
axis.legend()
plt.show()
