"""Models for Kronecker factors."""

from torch import nn


class Rest(nn.Module):
    """From the output of a layer to a prediction, mixing positions."""

    def __init__(self, size):
        super().__init__()
        self.out = nn.Linear(size, 3)

    def forward(self, z):
        return self.out(z.tanh().flatten(1))


class Words(nn.Module):
    """An embedding, by itself or the output layer as well, by either of two ways to write a product."""

    def __init__(self, tied):
        super().__init__()
        self.words, self.tied = nn.Embedding(5, 3, padding_idx=1), tied

    def forward(self, index):
        h = self.words(index).sum(1).tanh()
        if self.tied == "linear":
            return nn.functional.linear(h, self.words.weight)
        return h @ self.words.weight.T if self.tied == "matmul" else h
