"""A run of ``accumulate`` for the tests of interruption: ``resumed.py CHECKPOINT STREAM RESULT [PAUSE]``."""

import random
import sys
import time
import warnings
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from backpack import accumulate
from backpack.extensions import BatchL2Grad, ClippedGrad, DiagGGNMC, SqrtGGNMC, SumGradSquared, Variance


class Noisy(Dataset):
    """Samples that draw from all generators, slowly."""

    def __init__(self, pause):
        self.pause = pause
        self.X = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return 60

    def __getitem__(self, index):
        time.sleep(self.pause)
        return self.X[index] + torch.randn(4) + random.random() + numpy.random.rand(), index % 3


def main(checkpoint, stream, result, pause=0.0):
    warnings.filterwarnings("ignore", "The loader draws its samples|The model is in training mode")  # on purpose
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Dropout(0.2), nn.Linear(50, 3))
    data = DataLoader(Noisy(pause), batch_size=7, shuffle=True)
    extensions = [SumGradSquared(), Variance(), BatchL2Grad([59, 1, 30]), DiagGGNMC(), ClippedGrad(0.001)]
    common = {"checkpoint": checkpoint, "checkpoint_seconds": 0}
    one = accumulate(model, nn.CrossEntropyLoss(), data, *extensions, **common)
    two = accumulate(model, nn.CrossEntropyLoss(), data, SqrtGGNMC(2), stream=stream, checkpoint=checkpoint + ".second",
                     checkpoint_seconds=0)  # fmt: skip
    tensors = {
        f"{f} {n}": value.clone() for f, found in {**one.results, **two.results}.items() for n, value in found.items()
    }
    tensors |= {f"grad {n}": value for n, value in one.grad.items()} | {"loss": one.loss}
    save_file({name: value.contiguous() for name, value in tensors.items()}, result + ".new")
    Path(result + ".new").rename(result)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(float, sys.argv[4:]))
