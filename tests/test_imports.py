"""The layout: which folders there are, and who imports whom."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import backpack

ROOT = Path(backpack.__file__).parent
FILES = {
    ".".join(["backpack", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}

FLOORS = [
    ["inspection", "custom_module"],
    ["dataset", "hessianfree"],
    ["context"],
    ["curvature"],
    ["backward"],
    ["nodes", "extensions"],
    ["utils"],
    ["uses"],
    ["samples"],
    ["modules"],
    ["graph"],
    ["torch_internals", "memory", "core"],
]
"""What is at the package's root, from the top down: each imports what is below it, and nothing beside or above it."""

PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"

HEIGHTS = {room: height for height, rooms in enumerate(reversed(FLOORS)) for room in rooms}


def when_loaded(body):
    """What runs when a module is loaded: not the bodies of functions, nor what is there for type checkers."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
            yield from when_loaded(node.body)


def imported(name, statements=None):
    """The files of the package that a file imports, or that some statements do, without the packages around them."""
    for node in ast.walk(ast.parse(FILES[name].read_text())) if statements is None else statements:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            if (node.module or "").split(".")[0] == "backpack":
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from [one for one in inner if one in FILES] or [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)


def imported_when_loaded(name):
    return imported(name, when_loaded(ast.parse(FILES[name].read_text()).body))


def room_of(name):
    """The file or folder at the package's root that a file is in."""
    return name.split(".")[1] if "." in name else "the package itself"


def test_a_reader_who_opens_the_package_sees_few_entries():
    entries = {path.name for path in ROOT.iterdir()} - {"__init__.py", "__pycache__", "py.typed"}
    assert len(entries) <= 18
    assert {entry.removesuffix(".py") for entry in entries} == {*HEIGHTS, "data"}


def test_the_page_on_the_architecture_shows_the_floors():
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [line.split() for line in shown.splitlines()] == FLOORS


@pytest.mark.parametrize("room", HEIGHTS)
def test_nothing_imports_what_is_beside_or_above_it(room):
    found = {(name, one) for name in FILES if room_of(name) == room for one in imported(name)}
    assert not [
        f"{name} imports {one}"
        for name, one in found
        if room_of(one) != room and HEIGHTS.get(room_of(one), len(FLOORS)) >= HEIGHTS[room]
    ]


def test_imports_go_in_no_circle():
    TopologicalSorter({name: set(imported_when_loaded(name)) - {name} for name in FILES}).prepare()


def within_functions(name):
    for function in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from ast.walk(function)


def test_no_import_of_the_package_waits_for_a_call():
    """Inside of functions, imports would hide circles."""
    assert not [(name, one) for name in FILES for one in imported(name, within_functions(name))]


def files(*names):
    """Those of the package with these names, and all below them."""
    own = tuple(f"backpack.{name}" for name in names)
    return [file for file in FILES if file in own or file.startswith(tuple(f"{name}." for name in own))]


def test_passes_know_extensions_by_their_interface_only():
    passes = files("backward", "curvature")
    assert {"backpack.backward.collector", "backpack.curvature.seeds", "backpack.curvature.hessian"} <= set(passes)
    known = {one for name in passes for one in imported(name) if room_of(one) == "extensions"}
    assert known == {"backpack.extensions.interface"}
