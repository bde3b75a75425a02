"""Runs over a data set that are killed go on and end as if they had not been."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from truths.data_sets import problem

from backpack import accumulate
from backpack.extensions import EKFAC, BatchGrad, DiagGGNMC, SumGradSquared, Variance

SCRIPT = str(Path(__file__).with_name("resumed.py"))


def start(folder, *pause):
    names = (str(folder / "checkpoint"), str(folder / "stream"), str(folder / "result"))
    return subprocess.Popen([sys.executable, "-W", "error", SCRIPT, *names, *map(str, pause)])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder).wait() == 0
    return (folder / "result").read_bytes()


def kill_and_resume(folder, undisturbed, kills):
    """Killed at random moments after the first checkpoint is there, until the result is."""
    killed, draw = 0, random.Random(str(folder))
    while not (folder / "result").exists():
        process = start(folder, 0.02 if killed < kills else 0.0)
        if killed < kills:
            while not (folder / "checkpoint").exists() and process.poll() is None:
                time.sleep(0.01)
            with_import = 2.0 if killed else 0.0
            time.sleep(with_import + draw.uniform(0, 2.0))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
        process.wait()
        assert process.returncode in (0, -signal.SIGKILL)
    assert killed == kills
    assert (folder / "result").read_bytes() == undisturbed


def test_killed_and_resumed_is_bit_identical(tmp_path, undisturbed):
    kill_and_resume(tmp_path, undisturbed, 1)


@pytest.mark.slow
def test_killed_twenty_times_and_resumed_is_bit_identical(tmp_path, undisturbed):
    kills = 0
    for run in range(5):
        folder = tmp_path / str(run)
        folder.mkdir()
        kill_and_resume(folder, undisturbed, 4)
        kills += 4
    assert kills == 20


class Stop(Exception):
    pass


def interrupted(X, y, after, draws):
    for number, batch in enumerate(zip(X.split(4), y.split(4), strict=True)):
        if number == after:
            raise Stop
        draws.append(number)
        yield batch


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_exception_in_the_data_loses_nothing(after, tmp_path):
    model, lossfunc, X, y = problem()
    extensions = [DiagGGNMC(2), BatchGrad(), Variance()]
    torch.manual_seed(3)
    whole = accumulate(model, lossfunc, list(zip(X.split(4), y.split(4), strict=True)), *extensions)
    torch.manual_seed(3)
    data = [*zip(X.split(4), y.split(4), strict=True)]

    class Failing:
        fail = True

        def __iter__(self):
            return interrupted(X, y, after if self.fail else None, [])

        def __len__(self):
            return len(data)

    failing = Failing()
    with pytest.raises(Stop):
        accumulate(model, lossfunc, failing, *extensions, checkpoint=tmp_path / "c", checkpoint_seconds=0)
    torch.manual_seed(99)  # the state of the generators is that of the checkpoint
    failing.fail = False
    found = accumulate(model, lossfunc, failing, *extensions, checkpoint=tmp_path / "c", checkpoint_seconds=0)
    for extension in extensions:
        for name, value in whole[extension.savefield].items():
            assert torch.equal(value, found[extension.savefield][name])
    assert torch.equal(found.loss, whole.loss)
    again = accumulate(model, lossfunc, failing, *extensions, checkpoint=tmp_path / "c")
    assert torch.equal(again["diag_ggn_mc"]["0.weight"], whole["diag_ggn_mc"]["0.weight"])


class Failing(Dataset):
    """Samples that are drawn; after so many, there is an error."""

    def __init__(self, X, y):
        self.X, self.y, self.left = X, y, -1

    def __len__(self):
        return len(self.X)

    def __getitem__(self, index):
        if self.left == 0:
            raise Stop
        self.left -= 1
        return self.X[index] + torch.rand(4, dtype=torch.float64), self.y[index]


@pytest.mark.filterwarnings("ignore:The loader draws its samples in an order of its own")
@pytest.mark.parametrize("after", [0, 6, 11, 13, 25])
def test_a_run_of_two_passes_goes_on_in_either(after, tmp_path):
    model, lossfunc, X, y = problem()
    samples = Failing(X, y)
    data = DataLoader(samples, batch_size=4, shuffle=True)
    extensions = [EKFAC(2), BatchGrad()]
    torch.manual_seed(3)
    whole = accumulate(model, lossfunc, data, *extensions, stream=tmp_path / "undisturbed")
    samples.left = after
    where = {"checkpoint": tmp_path / "c", "checkpoint_seconds": 0, "stream": tmp_path / "stream"}
    torch.manual_seed(3)
    with pytest.raises(Stop):
        accumulate(model, lossfunc, data, *extensions, **where)
    assert not any(hasattr(p, "ekfac") for p in model.parameters())
    samples.left = -1
    torch.manual_seed(99)
    found = accumulate(model, lossfunc, data, *extensions, **where)
    for name, eigen in whole["ekfac"].items():
        assert torch.equal(found["grad_batch"][name], whole["grad_batch"][name])
        for one, other in zip((*eigen.bases, eigen.eigenvalues), tree_leaves(found["ekfac"][name]), strict=True):
            assert torch.equal(one, other)
    (tmp_path / "c.beforehand").unlink()
    torch.manual_seed(4)  # other draws, so other bases
    with pytest.raises(ValueError, match="another run: its extensions was .*SecondMoments"):
        accumulate(model, lossfunc, data, *extensions, **where)


def other_weights(given):
    with torch.no_grad():
        given["model"][0].weight[0, 0] += 1


DIFFERENCES = {
    "weights of the model": other_weights,
    "model was": lambda given: given.update(model=nn.Sequential(nn.Linear(4, 3)).double()),
    "training mode": lambda given: given["model"].eval(),
    "loss": lambda given: given.update(lossfunc=nn.CrossEntropyLoss(reduction="sum")),
    "number of batches": lambda given: given.update(data=given["data"][:1]),
    "extensions": lambda given: given.update(extensions=[SumGradSquared([0])]),
    "no checkpoint": lambda given: given["path"].write_bytes(b"something else"),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(what, tmp_path):
    model, lossfunc, X, y = problem()
    given = {
        "model": model,
        "lossfunc": lossfunc,
        "data": list(zip(X.split(4), y.split(4), strict=True)),
        "extensions": [SumGradSquared()],
        "path": tmp_path / "checkpoint",
    }

    def run():
        return accumulate(
            given["model"], given["lossfunc"], given["data"], *given["extensions"], checkpoint=given["path"]
        )

    run()
    DIFFERENCES[what](given)
    with pytest.raises(ValueError, match=what):
        run()


def test_a_checkpoint_that_cannot_be_written_is_an_error_before_the_first_batch(tmp_path):
    model, lossfunc, X, y = problem()
    with pytest.raises(OSError, match="could not be written.*Nothing was computed"):
        accumulate(model, lossfunc, interrupted(X, y, 0, []), Variance(), checkpoint=tmp_path / "nowhere" / "file")


def test_a_disk_that_becomes_full_leaves_the_last_checkpoint(tmp_path):
    """By a limit on the size of files, which the system reports in the same way."""
    model, lossfunc, X, y = problem()
    path, draws = tmp_path / "checkpoint", []
    extensions = [BatchGrad()]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def batches(limit):
        for number, batch in enumerate(interrupted(X, y, None, draws)):
            if number == 2 and limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
            yield batch

    try:
        with pytest.raises(OSError, match="What was saved before is intact"):
            accumulate(model, lossfunc, batches(True), *extensions, checkpoint=path, checkpoint_seconds=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert os.listdir(tmp_path) == ["checkpoint"]
    found = accumulate(model, lossfunc, batches(False), *extensions, checkpoint=path)
    whole = accumulate(model, lossfunc, list(zip(X.split(4), y.split(4), strict=True)), *extensions)
    assert torch.equal(found["grad_batch"]["2.weight"], whole["grad_batch"]["2.weight"])
