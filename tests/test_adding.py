"""What ``docs/adding.md`` shows is all that it takes: its diffs, applied to a copy of the source, pass the tests."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECTIONS = {
    title: (diff, commands)
    for title, diff, commands in re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?^```diff\n(.*?)^```\n\n```console\n(.*?)```",
        (ROOT / "docs" / "adding.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
}


def hunks(diff):
    """The file, the old lines and the new ones of each hunk; a line that the page has empty is one of both."""
    for file, body in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", diff, re.DOTALL | re.MULTILINE):
        for hunk in body.split("@@\n")[1:]:
            lines = [line or " " for line in hunk.splitlines()]
            yield file, *("".join(f"{line[1:]}\n" for line in lines if line[0] in signs) for signs in (" -", " +"))


def apply(diff, root, folder):
    """The part of a diff that is for one folder."""
    for file, old, new in hunks(diff):
        if file.startswith(f"{folder}/"):
            path = root / file
            text = path.read_text() if path.exists() else ""
            assert text.count(old) == 1 if old else not text, f"{file} does not have these lines once:\n{old}"
            path.write_text(text.replace(old, new) if old else new)


@pytest.fixture
def copied(tmp_path):
    for folder in ("backpack", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(command, root):
    program, *arguments = shlex.split(command)
    assert program == "python"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments, "-q", "-x", "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        cwd=root,
        env={**environment, "PYTHONPATH": str(root)},
        check=False,
    )


@pytest.mark.parametrize("title", SECTIONS)
def test_a_diff_touches_at_most_two_files_of_the_package_and_a_table_of_tests(title):
    files = {file for file, *_ in hunks(SECTIONS[title][0])}
    assert len([file for file in files if file.startswith("backpack/")]) <= 2
    assert len([file for file in files if file.startswith("tests/")]) == 1
    assert len(files) <= 3


@pytest.mark.parametrize("title", SECTIONS)
def test_the_commands_pass_with_a_diff_and_fail_without_what_it_adds_to_the_package(title, copied):
    diff, commands = SECTIONS[title]
    apply(diff, copied, "tests")
    without = [run(command, copied).stdout.splitlines()[-1] for command in commands.splitlines()]
    assert any(" failed" in last and " error" not in last for last in without), without
    apply(diff, copied, "backpack")
    for command in commands.splitlines():
        done = run(command, copied)
        assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_diffs():
    assert len(SECTIONS) == 3
