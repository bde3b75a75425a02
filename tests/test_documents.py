"""What the documents show runs."""

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import backpack.hessianfree
from backpack.utils import convert_parameters, examples, kroneckers, subsampling

ROOT = Path(__file__).parent.parent
GRAPHS = ["-W", "ignore:`torch.jit.script`:DeprecationWarning"]  # when torch_geometric is imported
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
PAGES = {path.stem: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL) for name, path in PAGES.items()}
BLOCKS = {name: blocks for name, blocks in BLOCKS.items() if blocks}


def gallery_pages():
    """What ``docs/tables.py`` says of the groups, read without importing it."""
    order = next(
        node
        for node in ast.walk(ast.parse((ROOT / "docs" / "tables.py").read_text()))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PAGES"
    )
    return ast.literal_eval(order.value)


def run(*arguments, folder):
    environment = {**os.environ, "MPLBACKEND": "agg"}
    quiet = ["-W", "error", "-W", "ignore:FigureCanvasAgg is non-interactive", *GRAPHS]
    done = subprocess.run(
        [sys.executable, *quiet, *arguments], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"\? False$", done.stdout, re.MULTILINE), done.stdout
    return done.stdout


@pytest.mark.parametrize("page", BLOCKS)
def test_the_blocks_of_a_page_run_one_after_another_from_any_directory(page, tmp_path):
    printed = run("-c", "\n".join(BLOCKS[page]), folder=tmp_path)
    assert page != "README" or printed in PAGES[page].read_text()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example, tmp_path):
    run(str(example), folder=tmp_path)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_has_a_title_for_the_gallery(example):
    assert re.match(r'"""\n(.+)\n=+\n\n', example.read_text())


@pytest.mark.parametrize(
    "page", ["CONTRIBUTING.md", *(f"docs/{name}.md" for name in ("architecture", "adding", "testing"))]
)
def test_files_that_pages_for_developers_name_exist(page):
    named = re.findall(r"`([\w/.]+(?:/|\.py|\.md|\.toml|\.txt))`", (ROOT / page).read_text())
    places = [ROOT, ROOT / "backpack", *(folder for folder in (ROOT / "backpack").iterdir() if folder.is_dir())]
    assert named and not [name for name in named if not any((place / name).exists() for place in places)]


def test_every_page_of_the_gallery_that_is_named_first_exists():
    named = {f"{group}/{page}.py" for group, pages in gallery_pages().items() for page in pages}
    assert named <= {path.relative_to(ROOT / "examples").as_posix() for path in EXAMPLES}


def test_every_example_is_in_a_group_of_the_gallery():
    assert {path.parent.relative_to(ROOT / "examples").as_posix() for path in EXAMPLES} == set(gallery_pages())


def test_private_training_says_which_package_is_missing(tmp_path):
    script = ROOT / "examples" / "jobs" / "dp_sgd.py"
    without = f"import runpy, sys; sys.modules['dp_accounting'] = None; runpy.run_path({str(script)!r})"
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("python -m pip install dp-accounting\n") and "Traceback" not in done.stderr


DOCTESTS = [path for path in sorted((ROOT / "backpack").rglob("*.py")) if ">>>" in path.read_text()]


@pytest.mark.parametrize("path", DOCTESTS, ids=lambda path: path.stem)
def test_examples_in_docstrings_print_what_they_say(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed


PUBLIC = {
    "backpack": [*backpack.__all__],
    "backpack.extensions": [*backpack.extensions.__all__],
    "backpack.hessianfree": [*backpack.hessianfree.__all__],
    **{
        module.__name__: getattr(module, "__all__", None)
        or [
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
        ]
        for module in (convert_parameters, examples, kroneckers, subsampling)
    },
}
REFERENCE = "\n".join(path.read_text() for path in (ROOT / "docs").glob("reference_*.md"))


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_in_the_reference(module):
    single = re.findall(rf"auto(?:class|function):: {module}[\w.]*?\b(\w+)$", REFERENCE, re.MULTILINE)
    listed = re.search(rf"automodule:: {module}\n   :members:(.*)", REFERENCE)
    members = [] if listed is None else re.findall(r"\w+", listed[1]) or PUBLIC[module]  # no list: all of them
    assert PUBLIC[module] and not {*PUBLIC[module]} - {*single, *members, "extensions"}


def test_there_is_something_to_run():
    assert BLOCKS["README"] and EXAMPLES and DOCTESTS
