"""The page of error messages and the source say the same."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTES = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
FILES = sorted((ROOT / "backpack").rglob("*.py"))
HOLE = "\0"

INTERNAL = {
    "Not a version 1.0 .npy array of uint8 in C order.",
    f"{HOLE} bytes that are no idx array of unsigned bytes",
}
"""Of errors that are caught and raised anew in other words."""


def text(node: ast.AST, names: dict[str, str]) -> str:
    """What an expression says, with holes where values go."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text(node.value, names)
    if isinstance(node, ast.BinOp):
        return text(node.left, names) + text(node.right, names)
    if isinstance(node, ast.Name):
        return names.get(node.id, HOLE)
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.List):  # "\n".join([...])
        return text(node.args[0].elts[0], names)
    return HOLE


def says(node: ast.AST, names: dict[str, str]) -> Iterator[str]:
    """The messages of errors and warnings that a node of the source makes."""
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]
        if name.endswith("Error") or name in ("NotCompared", "warn"):
            yield from [text(argument, names) for argument in node.args][:2]
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith(".notice"):
        yield text(node.value, names)


def messages(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    names = {
        node.targets[0].id: value
        for node in nodes
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and (value := text(node.value, {})) != HOLE
    }
    found = {message for node in nodes for message in says(node, names)}
    return {message for message in found if len(re.sub(r"\W", "", message)) > 8} - INTERNAL


SOURCE = {message: path for path in FILES for message in messages(path.read_text())}


def begins(message: str, quote: str) -> bool:
    """Whether a message begins as the quote says; ``…`` stands for anything."""
    pattern = "".join(".*?" if part == "…" else re.escape(part) for part in re.split("(…)", quote.replace(" …", "…")))
    message = message.replace(f" {HOLE}", HOLE)
    return re.match(pattern, message, re.DOTALL) is not None


def test_the_messages_of_the_source_are_found():
    assert messages("def f(x):\n    raise ValueError(f'{x} is not right, got {x}.')") == {"\0 is not right, got \0."}
    assert messages("def f():\n    m = 'to the user'\n    warnings.warn(m, stacklevel=2)") == {"to the user"}
    assert len(SOURCE) > 130


def test_each_message_on_the_page_is_one_of_the_source():
    assert not [quote for quote in QUOTES if len(quote.replace("…", "").strip()) < 6]
    found = {quote: [message for message in SOURCE if begins(message, quote)] for quote in QUOTES}
    assert not {quote: own for quote, own in found.items() if not 1 <= len(own) <= 2}  # more: it says too little


def test_each_message_of_the_source_is_on_the_page():
    assert not {message: path for message, path in SOURCE.items() if not any(begins(message, q) for q in QUOTES)}


def test_internal_messages_are_still_there():
    everything = "\n".join(path.read_text() for path in FILES)
    assert not [message for message in INTERNAL if message.replace(f"{HOLE} ", "") not in everything]
