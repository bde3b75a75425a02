"""
Influence of training samples: find wrong labels in padded sequences
====================================================================

Some labels of a data set are wrong. Which? The model cannot learn a wrong label from
the other samples, only from this sample itself, so that the sample has a large
influence on its own loss. Influence functions (`Koh & Liang, 2017
<https://arxiv.org/abs/1703.04730>`_) compute the influence of sample ``n`` on the loss
of sample ``m`` as ``g_m^T (G + damping)^-1 g_n``, with individual gradients ``g`` and
the curvature ``G`` of the training loss. Nothing has to be trained again.

The samples are sequences of different lengths. In the transformer that reads them, an
attention mask hides the padding.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import (
    CrossEntropyLoss,
    Embedding,
    Linear,
    Module,
    TransformerEncoderLayer,
)
from torch.utils.data import DataLoader, TensorDataset

from backpack import accumulate, extend
from backpack.extensions import EKFAC, BatchGrad

# %%
# The data
# --------
#
# Each digit is the list of its dark pixels, numbered from 1 to 64. Zeros fill the lists
# up to the longest. One label in ten is replaced by a wrong one.

torch.manual_seed(0)
data = load_digits()
chosen = torch.randperm(len(data.target))[:500]
dark = torch.tensor(data.data)[chosen] >= 8
truth = torch.tensor(data.target)[chosen]
sequences = [pixels.nonzero().flatten() + 1 for pixels in dark]
ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
lengths = (ids > 0).sum(1)

N = len(ids)
wrong = torch.rand(N) < 0.1
given = torch.where(wrong, (truth + torch.randint(1, 10, (N,))) % 10, truth)
print(
    f"{N} sequences of {lengths.min()} to {lengths.max()} pixels, "
    f"{int(wrong.sum())} with a wrong label"
)

# %%
# Train
# -----
#
# The mask also keeps the padding out of the mean over positions. Training stops before
# the model has memorized the wrong labels.


class Reader(Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = Embedding(65, 32, padding_idx=0)
        self.layer = TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.classifier = Linear(32, 10)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        padding = ids == 0
        hidden = self.layer(hidden, src_key_padding_mask=padding)
        hidden = hidden.masked_fill(padding[..., None], 0.0)
        return self.classifier(hidden.sum(1) / (~padding).sum(1, keepdim=True))


model, lossfunc = extend(Reader()), extend(CrossEntropyLoss())
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
for _ in range(30):
    for batch in torch.randperm(N).split(50):
        optimizer.zero_grad()
        loss = lossfunc(model(ids[batch]), given[batch])
        loss.backward()
        optimizer.step()
with torch.no_grad():
    output = model(ids)
    right = (output.argmax(1) == truth).float().mean()
    losses = torch.nn.functional.cross_entropy(output, given, reduction="none")
print(f"{right:.0%} of the training sequences are read as what they truly are")

# %%
# Gradients and curvature of the training set
# -------------------------------------------
#
# ``EKFAC`` approximates the curvature by its eigenbases and the values along them.
# The individual gradients carry the factor ``1/N`` of the loss, which is taken out.

loader = DataLoader(TensorDataset(ids, given), batch_size=100)
quantities = BatchGrad(), EKFAC()
found = accumulate(model, lossfunc, loader, *quantities)
gradients = {name: N * g for name, g in found["grad_batch"].items()}

# %%
# Padding does not change a gradient: it is that of the sequence alone, without padding.

n = int(lengths.argmin())
alone = lossfunc(model(sequences[n][None]), given[n : n + 1])
names, parameters = zip(*model.named_parameters(), strict=True)
expected = torch.autograd.grad(alone, parameters)
pairs = [(gradients[name][n], g) for name, g in zip(names, expected, strict=True)]
difference = sum((ours - own).square().sum() for ours, own in pairs).sqrt()
assert difference < 1e-4 * sum(own.square().sum() for _, own in pairs).sqrt()

# %%
# Influence
# ---------
#
# The damping bounds the inverse along directions in which the loss hardly curves.

DAMPING = 0.1
influence = torch.zeros(N, N)
for name, g in gradients.items():
    flat = g.flatten(1)
    influence += flat @ found["ekfac"][name].apply_inverse(flat.T, damping=DAMPING)
on_itself = influence.diagonal()

# %%
# Whoever looks for wrong labels looks at the most suspicious samples first. Sorting by
# the loss is the simple alternative.

figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
looked_at = 100 * torch.arange(1, N + 1) / N
count = int(wrong.sum())
for name, score in {"influence on itself": on_itself, "loss": losses}.items():
    order = score.argsort(descending=True)
    hits = 100 * wrong[order].float().cumsum(0) / count
    axis.plot(looked_at, hits, label=f"by {name}")
    print(f"by {name}: {hits[count - 1]:.0f} % of them are among the first {count}")
axis.plot([0, 100], [0, 100], "k--", label="in random order")
axis.set(xlabel="sequences looked at [%]", ylabel="wrong labels found [%]")
axis.legend()
plt.show()

# %%
# Both find most of the wrong labels early. What the loss cannot tell is which other
# samples taught the model a prediction.
#
# What taught the model this?
# ---------------------------
#
# For each sample, these are the five others that lower its loss most.

helpers = (influence - torch.diag(torch.full((N,), torch.inf))).topk(5).indices
same = (given[helpers] == truth[:, None])[~wrong].float().mean()
print(f"of the 5 samples that helped a sample most, {same:.0%} have its class")
