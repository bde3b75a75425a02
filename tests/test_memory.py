"""Many classes take bounded memory, measured in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import torch
from pathlib import Path
from torch import nn
from backpack import backpack, extend
from backpack.extensions import *

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def step(extensions):
    with backpack(*extensions):
        lossfunc(model(X), y).backward()

torch.manual_seed(0)
{setup}
model, lossfunc = extend(model), extend(nn.CrossEntropyLoss())
step([])
Path("/proc/self/clear_refs").write_text("5")
step([])
plain = status("VmHWM")
step([{extension}])
print(status("VmHWM") - plain)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux counts it")
@pytest.mark.parametrize(
    ("setup", "extension", "mebibytes"),
    [
        # all seeds at once, [C, N, C], are 1 GB, and take several times as much to be made
        (
            "model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1000))\n"
            "X, y = torch.randn(256, 32), torch.arange(256)",
            "DiagGGNExact()",
            400,
        ),
        # logits are 25.6 MB; a root of their Hessian is 50,000 times as large
        (
            "model = nn.Sequential(nn.Embedding(50_000, 8), nn.Tanh(), nn.Linear(8, 50_000, bias=False),"
            " nn.Flatten(0, 1))\n"
            "X = torch.randint(50_000, (8, 16)); y = X.flatten()",
            "DiagGGNMC(2)",
            400,
        ),
    ],
    ids=["1000 classes", "50000 words"],
)
def test_many_classes_take_bounded_memory(setup, extension, mebibytes):
    code = MEASURE.format(setup=setup, extension=extension)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < mebibytes * 2**20
