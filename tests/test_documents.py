"""What the documents show runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(*arguments, folder):
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments], capture_output=True, text=True, cwd=folder, check=False
    )


@pytest.mark.parametrize("block", BLOCKS)
def test_block_of_a_page_runs_from_any_directory(block, tmp_path):
    done = run("-c", block, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("True")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example, tmp_path):
    done = run(str(example), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\? True$", done.stdout, re.MULTILINE), done.stdout


def test_there_is_something_to_run():
    assert BLOCKS and EXAMPLES
