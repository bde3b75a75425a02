"""On several processes, results are those of one process with all samples."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).with_name("in_processes.py"))


def start(count, folder, *mode, meeting="meeting"):
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(count), str(folder / meeting), str(folder), *mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def run(count, folder, *mode, meeting="meeting"):
    processes = start(count, folder, *mode, meeting=meeting)
    return [(process.communicate(timeout=300), process.returncode) for process in processes]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_compute_what_one_does(count, tmp_path):
    done = run(count, tmp_path)
    assert all(code == 0 and out == "done\n" for (out, _), code in done), [error for (_, error), _ in done]


def test_when_a_process_dies_the_others_end_with_a_message(tmp_path):
    (first, second) = run(2, tmp_path, "die")
    assert second[1] == 9
    assert first[1] == 1 and "one of them has probably ended" in first[0][1]


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "store").glob("*.safetensors")}


@pytest.mark.parametrize(("count", "kills"), [(2, 1), pytest.param(4, 5, marks=pytest.mark.slow)])
def test_factors_on_one_process_each_are_the_same_after_all_were_killed(count, kills, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), folder.mkdir()
    assert all(code == 0 for _, code in run(count, whole, "parts", "0"))
    draw = random.Random(count)
    for number in range(kills):
        processes = start(count, folder, "parts", "0.05", meeting=f"meeting {number}")
        while not list(folder.glob("store/run*")) and any(process.poll() is None for process in processes):
            time.sleep(0.01)
        time.sleep(draw.uniform(0.1, 2.0) + 3.0 * (number > 0))
        for process in processes:
            process.kill()
            process.communicate()
    done = run(count, folder, "parts", "0", meeting="last meeting")
    assert all(code == 0 for _, code in done), done
    assert len(contents(whole)) == 4 + count and contents(folder) == contents(whole)
