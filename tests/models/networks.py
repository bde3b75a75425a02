"""Small networks, and losses with positive semidefinite Hessians, for batches of four samples and three classes."""

import torch
from torch import nn

from backpack import extend


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.out = nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(2, 2), nn.Linear(2, 3)

    def forward(self, x):
        h = x + self.norm(self.a(x)).relu_()
        return self.out((h + self.a(h)).mean((2, 3)))


class Sequences(nn.Module):
    """A tiny transformer with a tied output, whose logits are ``[N, C, T]`` or ``[N * T, C]``."""

    def __init__(self, flat):
        super().__init__()
        self.words, self.places = nn.Embedding(6, 4), nn.Embedding(5, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.flat = flat

    def forward(self, index):
        h = self.layer(self.words(index) + self.places(torch.arange(index.shape[1])))
        out = h @ self.words.weight.T
        return out.reshape(-1, 6) if self.flat else out.transpose(1, 2)


class Last(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.out = layer(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.layer(x)[0][:, -1])


class Custom(nn.Module):
    def forward(self, out, target):
        return (out.logsumexp(1) * target.sum(1)).mean() + ((out - target) ** 4).mean()


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


def cnn():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3))


def values(*shape):
    return torch.rand(shape, dtype=torch.float64)


LABELS = torch.tensor([0, 2, 1, 2])
WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
LOSSES = {
    "cross_entropy": (nn.CrossEntropyLoss(), lambda: LABELS),
    "cross_entropy_sum": (nn.CrossEntropyLoss(reduction="sum"), lambda: LABELS),
    "cross_entropy_options": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1, ignore_index=1),
        lambda: LABELS,
    ),
    "cross_entropy_probabilities": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
        lambda: values(4, 3).softmax(1),
    ),
    "mse": (nn.MSELoss(), lambda: values(4, 3)),
    "mse_sum": (nn.MSELoss(reduction="sum"), lambda: values(4, 3)),
    "bce_logits": (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT), lambda: values(4, 3).round()),
    "huber": (nn.HuberLoss(), lambda: values(4, 3)),
    "smooth_l1": (nn.SmoothL1Loss(beta=2.0), lambda: values(4, 3)),
    "poisson": (nn.PoissonNLLLoss(), lambda: values(4, 3)),
    "custom": (Custom(), lambda: values(4, 3)),
}
NETWORKS = {
    "mlp": (mlp, lambda: values(4, 4)),
    "cnn": (cnn, lambda: values(4, 2, 6, 6)),
    "tied": (Tied, lambda: values(4, 2, 4, 4)),
    "lstm": (lambda: Last(nn.LSTM), lambda: values(4, 3, 4)),
    "gru": (lambda: Last(nn.GRU), lambda: values(4, 3, 4)),
    "weight_norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.ELU(), nn.Linear(5, 3)),
        lambda: values(4, 4),
    ),
    "sigmoid_bce": (lambda: nn.Sequential(mlp(), nn.Sigmoid()), lambda: values(4, 4)),
}


def make(network, loss):
    torch.manual_seed(0)
    build, data = NETWORKS[network]
    lossfunc, target = (nn.BCELoss(), lambda: values(4, 3).round()) if loss == "bce" else LOSSES[loss]
    return extend(build().double()), data(), extend(lossfunc), target()
