"""On several processes, results are those of one process with all samples."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).with_name("in_processes.py"))


def run(count, folder, *mode):
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(count), str(folder / "meeting"), str(folder), *mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    return [(process.communicate(timeout=300), process.returncode) for process in processes]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_compute_what_one_does(count, tmp_path):
    done = run(count, tmp_path)
    assert all(code == 0 and out == "done\n" for (out, _), code in done), [error for (_, error), _ in done]


def test_when_a_process_dies_the_others_end_with_a_message(tmp_path):
    (first, second) = run(2, tmp_path, "die")
    assert second[1] == 9
    assert first[1] == 1 and "one of them has probably ended" in first[0][1]
