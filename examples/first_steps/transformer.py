"""
A transformer of ``transformers``
=================================

GPT-2 as it comes from the package ``transformers``, with dropout, tied embeddings and
fused attention. It learns to predict the letters of scikit-learn's descriptions of data
sets. No part of the model is changed or replaced.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_iris,
    load_wine,
)
from torch import Tensor
from torch.nn import CrossEntropyLoss, Module
from transformers import GPT2Config, GPT2LMHeadModel

from backpack import backpack, extend
from backpack.extensions import BatchL2Grad, DiagGGNMC

torch.manual_seed(0)
text = "".join(
    load().DESCR
    for load in (load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine)
)
letters = sorted(set(text))
codes = torch.tensor([letters.index(letter) for letter in text])
sequences = codes[: len(codes) // 33 * 33].reshape(-1, 33)

# %%
# A sample is a sequence. The loss expects the classes along axis 1, ``[N, C, T]``.
# BackPACK also finds the samples in an output of another form, such as ``[N * T, C]``.


class Language(Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {
            "vocab_size": len(letters),
            "n_positions": 32,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
        }
        self.gpt = GPT2LMHeadModel(
            GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
        )

    def forward(self, index: Tensor) -> Tensor:
        return self.gpt(input_ids=index, use_cache=False).logits.transpose(1, 2)


model, lossfunc = extend(Language()), extend(CrossEntropyLoss())
optimizer = torch.optim.Adam(model.parameters(), 3e-3)
for _ in range(40):
    batch = sequences[torch.randint(len(sequences), (32,))]
    optimizer.zero_grad()
    loss = lossfunc(model(batch[:, :-1]), batch[:, 1:])
    loss.backward()
    optimizer.step()
print(f"loss after 40 steps: {loss.item():.2f}")

# %%
# The norm of each sequence's gradient, and the curvature of each parameter. The
# embedding is used twice, at the input and at the output, and its results include both
# uses.

model.eval()
batch = sequences[::8][:64]
loss = lossfunc(model(batch[:, :-1]), batch[:, 1:])
with backpack(BatchL2Grad(), DiagGGNMC(mc_samples=4)):
    loss.backward()
norms = len(batch) * sum(p.batch_l2 for p in model.parameters()).sqrt()

alone = lossfunc(model(batch[3:4, :-1]), batch[3:4, 1:])
grads = torch.autograd.grad(alone, list(model.parameters()))
assert torch.allclose(
    torch.cat([g.flatten() for g in grads]).norm(), norms[3], rtol=1e-3
)

# %%
# Sequences with large gradients surprise the model.

for title, chosen in (
    ("largest gradients", norms.topk(3).indices),
    ("smallest gradients", (-norms).topk(3).indices),
):
    print(title)
    for n in chosen.tolist():
        shown = "".join(letters[code] for code in batch[n].tolist())
        print(f"  {norms[n]:5.2f}  {shown!r}")

names = [
    name.removeprefix("gpt.transformer.")
    for name, p in model.named_parameters()
    if p.dim() > 1
]
curvature = [p.diag_ggn_mc.mean().item() for p in model.parameters() if p.dim() > 1]
figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
axis.barh(names, curvature)
axis.invert_yaxis()
axis.set(xscale="log", xlabel="mean of the GGN's diagonal")
plt.show()
