"""A run of ``accumulate`` in parts for the tests of interruption: ``resumed_in_parts.py FOLDER [PAUSE]``."""

import random
import sys
import time
import warnings

import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from backpack import accumulate
from backpack.extensions import EKFAC, KFAC, Variance


class Noisy(Dataset):
    """Samples that are drawn, slowly."""

    def __init__(self, pause):
        self.pause = pause
        self.X = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return 40

    def __getitem__(self, index):
        time.sleep(self.pause)
        return self.X[index] + torch.randn(4), index % 3


def main(folder, pause=0.0):
    warnings.filterwarnings("ignore", "The loader draws its samples|The model is in training mode")  # on purpose
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Dropout(0.2), nn.Linear(20, 9), nn.Tanh(), nn.Linear(9, 3))
    data = DataLoader(Noisy(pause), batch_size=7, shuffle=True)
    accumulate(model, nn.CrossEntropyLoss(), data, EKFAC(2), KFAC(), Variance(), parts=3, store=f"{folder}/store",
               checkpoint=f"{folder}/checkpoint", checkpoint_seconds=0)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:]))
