"""The layout: who imports whom, when a module is loaded."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import backpack

ROOT = Path(backpack.__file__).parent
FILES = {
    ".".join(["backpack", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def statements(body):
    """What runs when a module is loaded: not the bodies of functions, nor what is there for type checkers."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
            yield from statements(node.body)


def imported(name):
    """The files of the package that a file imports, without the packages around them."""
    for node in statements(ast.parse(FILES[name].read_text()).body):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("backpack"):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [one for one in inner if one in FILES]
            yield from found or [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)


def test_imports_go_in_no_circle():
    TopologicalSorter({name: set(imported(name)) - {name} for name in FILES}).prepare()


def files(*names):
    """Those of the package with these names, and all below them."""
    own = tuple(f"backpack.{name}" for name in names)
    return [file for file in FILES if file in own or file.startswith(tuple(f"{name}." for name in own))]


def test_what_computes_knows_no_quantity_node_nor_loss():
    passes = files("engine", "backward", "curvature", "nodes", "graph", "samples", "uses", "twice")
    needed = ("engine", "backward.collector", "curvature.seeds", "curvature.hessian")
    assert {f"backpack.{name}" for name in needed} <= set(passes)
    assert not [one for name in passes for one in imported(name) if one.startswith("backpack.extensions")]
    passes = files("engine", "curvature.hessian", "graph", "samples", "uses")  # the others know the registries
    assert not [one for name in passes for one in imported(name) if one.startswith("backpack.nodes")]
    passes += files("backward")
    assert not [one for name in passes for one in imported(name) if one.startswith("backpack.losses")]


def test_uses_import_neither_passes_nor_quantities():
    allowed = ("backpack.uses", "backpack.samples", "backpack.memory", "backpack.compat")
    for name in FILES:
        if name.startswith("backpack.uses"):
            assert all(one.startswith(allowed) for one in imported(name)), (name, list(imported(name)))
