"""The modules of a model that run one after the other, each on what the one before returned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Module, Sequential

from backpack.graph import Edge, Graph, edge_of
from backpack.modules.calls import Note
from backpack.modules.module_io import module_io_of


@dataclass(eq=False)
class Link:
    """A module of a chain.

    ``node``: the one that used the module's parameters, if these are the parameters of one linear map; ``x``: the
    module's input, where the model ran again; ``between``: otherwise, what an elementwise function returned, and the
    edge of its input.
    """

    module: Module
    node: Node | None
    x: Tensor | None = None
    between: tuple[Tensor, GradientEdge] | None = None

    @cached_property
    def learns(self) -> bool:
        """Whether the module has trainable parameters."""
        return any(p.requires_grad for p in self.module.parameters())

    @property
    def input(self) -> Tensor:
        """The module's input, of a model that ran again."""
        assert self.x is not None
        return self.x


class ModuleChain:
    """The chain of the modules that lead to an edge of a graph, as far as each is called with one tensor.

    ``modules``: the first one first; ``calls``: those that left a note, the last one first.
    """

    def __init__(self, graph: Graph, notes: Mapping[Edge, Note], end: Edge) -> None:
        self._graph, self._notes = graph, notes
        self._without_notes: dict[Edge, list[Module]] = {}
        for node, module_io in module_io_of(graph).items():
            for io in module_io:
                for number in io.numbers:
                    self._without_notes.setdefault((node, number), []).append(io.module)
        self.calls: list[Note] = []
        self.modules = list(self._backwards_from(end))[::-1]

    @property
    def is_one_module(self) -> bool:
        """Whether it is a single module that runs others in a way of its own."""
        root = self.calls[0].module() if len(self.calls) == 1 else None
        return root is not None and bool(root._modules) and not _is_sequential(root)

    @property
    def has_all_calls(self) -> bool:
        """Whether each call of an extended module is part of it."""
        return {id(note.arguments) for note in self._notes.values()} <= {id(note.arguments) for note in self.calls}

    def _backwards_from(self, end: Edge) -> Iterator[Module]:
        """The modules from the last one on.

        Modules with parameters have left a note of their input. From others, the graph leads to the next output.
        """
        edge: Edge | None = end
        while edge is not None and (edge in self._without_notes or edge in self._notes):
            note = self._notes.get(edge)
            if note is None:
                yield from reversed(self._without_notes[edge])
                edge = self._first_below(self._graph.edges[edge[0]])
                continue
            root, (args, kwargs) = note.module(), note.arguments
            if not note.is_complete or root is None or len(args) != 1 or kwargs:
                return
            self.calls.append(note)
            yield from reversed(list(_in_order(root)))
            (x,) = args if note.attached is None else note.attached[0]
            if not isinstance(x, Tensor) or not x.requires_grad:
                return
            edge = self._first_below([edge_of(get_gradient_edge(x))])

    def _first_below(self, edges: Sequence[Edge]) -> Edge | None:
        """The only output of a module that all ways along these edges come to first."""
        found, seen, pending = set[Edge](), set[Node](), list(edges)
        while pending:
            edge = pending.pop()
            if edge in self._without_notes or edge in self._notes:
                found.add(edge)
            elif edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                pending += self._graph.edges[edge[0]]
        return found.pop() if len(found) == 1 else None


def _is_sequential(module: Module) -> bool:
    return isinstance(module, Sequential) and type(module).forward is Sequential.forward


def _in_order(module: Module) -> Iterator[Module]:
    """The modules that a sequential one, however nested, runs one after the other."""
    if not _is_sequential(module):
        yield module
        return
    for child in module._modules.values():
        yield from _in_order(child)  # type: ignore[arg-type]
