"""Type checkers know the types of results, and accept a user's script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).with_name("typed_script.py")


@pytest.mark.parametrize(
    "checker",
    [["mypy", "--strict", "--follow-imports=silent", "--no-incremental"], ["pyright", "--pythonpath", sys.executable]],
    ids=lambda command: command[0],
)
def test_a_users_script_has_the_types_that_it_claims(checker, tmp_path):
    copied = tmp_path / "script.py"  # outside of the project, whose settings do not count
    copied.write_text(SCRIPT.read_text())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)}
    command = [sys.executable, "-m", *checker, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_script_runs():
    done = subprocess.run([sys.executable, "-W", "error", SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
