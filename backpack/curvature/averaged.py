"""Second order, averaged: the mean curvature over the batch is pulled back through a chain of modules, one by one.

With ``H`` the curvature in the output of a module, that in its input is ``1/N sum_n J_n^T H J_n`` (Botev, Ritter &
Barber, 2017, section 4). Many modules are passed in closed form (``mean_curvature.py``). Anything else pulls back the
rows of a root of ``H`` for each sample, and so do parameters other than those of linear maps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Module, Sequential

from backpack.curvature.columns import Columns
from backpack.curvature.loss_term import PASSES
from backpack.curvature.mean_curvature import (
    AFFINE,
    CONVOLUTIONS,
    ELEMENTWISE,
    MAPS,
    SAME,
    Mean,
    in_closed_form,
    is_one_of,
)
from backpack.curvature.rerun import agree, is_observed, run_again
from backpack.curvature.seeds import WIDEST, SeedPass
from backpack.curvature.spliced_graph import SplicedGraph
from backpack.extensions.interface import Curvature
from backpack.graph import Edge, edge_of, is_complex, is_recomputed, shape_of, variable_of
from backpack.graph.users_hooks import forget_retained
from backpack.modules.calls import Note
from backpack.modules.loss_calls import LossCall
from backpack.modules.module_io import module_io_of
from backpack.modules.thread_state import muted
from backpack.nodes import Place, use_of
from backpack.samples import Layout, Subset
from backpack.torch_internals import pull_back
from backpack.uses import Cotangents, DenseUse, Individual
from backpack.uses.base import accumulate
from backpack.uses.kronecker import averaged_factors
from backpack.uses.second_moments import second_moment

LARGEST = 2**14
"""Entries of one sample's output up to which the curvature in it is formed."""


class AveragedPass(SeedPass):
    """For extensions whose curvature is averaged over the batch after each module.

    ``wanted``: whether a module before the present one has parameters; ``sign``: of the root that is pulled back;
    ``curvature``: that in the output of a linear map, ``[p, c, q, p, c, q]`` with its channels ``c``, if there is one.
    """

    wanted = True
    sign = 1
    curvature: Tensor | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.modules: list[Module] = []
        self.linked: list[Note] = []
        """Of those that have left one, the last one first."""
        self.learn: list[bool] = []
        """Which of them have trainable parameters."""
        self.maps: list[Node | None] = []
        """The nodes of those whose parameters are those of a linear map."""
        self.inputs: list[Tensor] = []
        """Of the modules, where the model had to run again."""
        self.between: dict[int, tuple[Tensor, GradientEdge]] | None = None
        """Otherwise, what each elementwise function returned, and where its graph ends."""

    def run(self) -> None:
        """Pull back the mean curvature and store the results.

        Raises:
            RuntimeError: The model is no chain of modules, losses have different inputs, or running the model once
                more gives something else.
            ValueError: A module has too many outputs for a dense curvature matrix.
        """
        ids = self.block.ids
        if ids is not None and prod(ids.shape) != self.n:
            raise RuntimeError(
                f"{type(self.extensions[0]).__name__} averages the curvature over the rows of a module's output, so "
                f"that each row must be a sample of its own: leave sample_ids out, or use KFLR."
            )
        self.loss = self._common()
        rows = self.extensions[0].subset.rows(self.n, self.device)
        self.modules = self._chain()
        self.learn = [any(p.requires_grad for p in module.parameters()) for module in self.modules]
        self.maps = [self._map(module) for module in self.modules]
        first = self.learn.index(True)
        self.between = self._between(first)
        if self.between is None:
            self._forward(first, rows)
        first_term, *others = self._seeds(0, self.columns)
        seeds = sum(others, start=first_term)
        columns = (seeds if rows is None else seeds[:, rows]).flatten(0, 1)
        columns = columns if len(columns) else columns.new_zeros(1, columns.shape[1])  # of a loss without curvature
        mean = Mean(columns, True)
        mean = mean if len(mean.given) <= mean.given.shape[1] else Mean(mean.matrix)
        try:
            for place in reversed(range(first, len(self.modules))):
                self.wanted = place > first
                mean = self._step(place, mean)
        finally:
            self._clear()

    def _common(self) -> LossCall:
        """The call of a loss; the others, if there are any, have the same input."""
        first, *others = [term.call for term in self.terms]
        if any(other.place != first.place for other in others):
            raise RuntimeError(
                f"{type(self.extensions[0]).__name__} averages the curvature after each module of a chain, but the "
                f"losses of this backward pass, {' and '.join(type(term.call.loss).__name__ for term in self.terms)}, "
                f"have different inputs. Call backward() for each loss by itself, or use KFLR."
            )
        return first

    def _chain(self) -> list[Module]:
        """The modules of the model."""
        name = type(self.extensions[0]).__name__
        modules = list(self._links())[::-1]
        roots = [note.module() for note in self.linked]
        unused = {id(note.arguments) for note in self.notes.values()} - {id(note.arguments) for note in self.linked}
        is_one = len(roots) == 1 and roots[0] is not None and roots[0]._modules and not _is_sequential(roots[0])
        if unused or not roots or is_one:
            raise RuntimeError(
                f"{name} averages the curvature after each module of a chain, but the model, a {self._model_name}, "
                f"is no torch.nn.Sequential of one input whose output is that of the loss, nor a chain of modules "
                f"that were extended one by one. Write it as a Sequential, of any modules, or use KFLR."
            )
        parameters = [id(p) for module in modules for p in module.parameters()]
        if len(set(parameters)) < len(parameters):
            raise RuntimeError(f"{name}: two modules of the chain share a parameter. Use KFLR for such a model.")
        if any(map(is_complex, self.spliced.nodes)):
            raise RuntimeError(
                f"{name} averages the curvature of real numbers, but the model has complex ones. Use KFLR."
            )
        if torch.is_grad_enabled():
            raise RuntimeError(f"{name}: its results cannot be differentiated, as create_graph=True asks for.")
        return modules

    def _links(self) -> Iterator[Module]:
        """The modules of a chain of extended ones, from the last one on, as far as each is called with one tensor.

        Those with parameters have left a note of this tensor. Of those without, the graph leads to the next output.
        """
        calls: dict[Edge, list[Module]] = {}
        for node, module_io in module_io_of(self.prepared.graph).items():
            for io in module_io:
                for number in io.numbers:
                    calls.setdefault((node, number), []).append(io.module)
        edge: Edge | None = self.loss.place
        while edge is not None and (edge in calls or edge in self.notes):
            note = self.notes.get(edge)
            if note is None:
                yield from reversed(calls[edge])
                edge = self._first_below(self.prepared.graph.edges[edge[0]], calls)
                continue
            root, (args, kwargs) = note.module(), note.arguments
            if not note.is_complete or root is None or len(args) != 1 or kwargs:
                return
            self.linked.append(note)
            yield from reversed(list(_chain(root)))
            (x,) = args if note.attached is None else note.attached[0]
            if not isinstance(x, Tensor) or not x.requires_grad:
                return
            edge = self._first_below([edge_of(get_gradient_edge(x))], calls)

    def _first_below(self, edges: Sequence[Edge], calls: Mapping[Edge, Any]) -> Edge | None:
        """The only output of a module that all ways along these edges come to first."""
        found, seen, pending = set[Edge](), set[Node](), list(edges)
        while pending:
            edge = pending.pop()
            if edge in calls or edge in self.notes:
                found.add(edge)
            elif edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                pending += self.prepared.graph.edges[edge[0]]
        return found.pop() if len(found) == 1 else None

    @property
    def _model_name(self) -> str:
        modules = [type(module).__name__ for note in self.notes.values() if (module := note.module()) is not None]
        return " after a ".join(dict.fromkeys(modules))

    def _between(self, first: int) -> dict[int, tuple[Tensor, GradientEdge]] | None:
        """What is known of elementwise functions without running the model again; ``None``: it has to run.

        It has not where, from the first module with parameters on, linear layers follow each other, with one
        elementwise function between two of them: its slopes are what the graph makes of ones.
        """
        modules = self._root_module.modules()
        if len(self.linked) > 1 or any(is_observed(module) or "forward" in vars(module) for module in modules):
            return None
        found: dict[int, tuple[Tensor, GradientEdge]] = {}
        function, x = -1, None
        for place in reversed(range(first, len(self.modules))):
            module = self.modules[place]
            node = self.maps[place] if place == first or is_one_of(module, (nn.Linear,)) else None
            if node is not None and self.prepared.owners.owned[node, 0] == Layout(self.n):
                shape = torch.Size(shape_of(node, 0))
                if x is None and node is not self.loss.edge.node:
                    return None
                if x is not None and (len(x) != shape[0] or x.numel() != shape.numel()):
                    return None
                if x is not None and function >= 0:
                    found[function] = x, GradientEdge(node, 0)
                own = self._input_of(node)
                if own is None:
                    return None
                function, x = -1, own
                self._check_size(module, shape)
            elif x is not None and function < 0 and x.requires_grad and is_one_of(module, ELEMENTWISE):
                function = place
            elif x is None or not is_one_of(module, SAME):
                return None
        return found

    def _input_of(self, node: Node) -> Tensor | None:
        """What a linear map is applied to."""
        for planned in self.prepared.plan.uses[node]:
            use = use_of(Place(node, planned.k, planned.number, planned.layout))
            if isinstance(use, DenseUse):
                return use.inputs[0]
        return None

    @property
    def _root_module(self) -> Module:
        """All modules of the chain."""
        return Sequential(*self.modules)

    def _check_size(self, module: Module, shape: torch.Size) -> None:
        size = shape[1:].numel()
        if size > LARGEST:
            raise ValueError(
                f"{type(self.extensions[0]).__name__} needs the curvature in the output of {type(module).__name__}, of "
                f"shape {list(shape)}: a matrix of {size} rows. At most {LARGEST} are formed. Use KFAC."
            )

    def _forward(self, first: int, rows: Tensor | None) -> None:
        """Run the model again, of the selected samples, and note the inputs of its modules."""
        name, root = type(self.extensions[0]).__name__, self._root_module
        args = self.linked[-1].arguments
        if any(module.training and module._buffers for module in root.modules()):
            raise RuntimeError(f"{name} runs the model once more, which would update running statistics: call eval().")
        x = args[0][0] if rows is None else args[0][0].index_select(0, rows)
        n = len(x)
        with torch.no_grad(), torch.random.fork_rng(enabled=root.training), run_again(root):
            for place, module in enumerate(self.modules):
                self.inputs.append(x)
                x = module(x if is_one_of(module, AFFINE) else x.clone())  # it may work in place
                if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != n:
                    raise RuntimeError(
                        f"{name}: {type(module).__name__} in the chain returns no tensor whose first axis counts the "
                        f"{n} samples."
                    )
                if place >= first:
                    self._check_size(module, x.shape)
        expected = self.loss.input if rows is None else self.loss.input.index_select(0, rows)
        if not agree(x, expected):
            raise RuntimeError(
                f"{name} runs the model once more, module by module, and that gave another output than the forward "
                f"pass: is there dropout in training mode? Call eval() first."
            )

    def _step(self, place: int, mean: Mean) -> Mean:
        """The curvature in a module's output to that in its input; parameters on the way."""
        module = self.modules[place]
        if self.learn[place]:
            node = self.maps[place]
            if node is None:
                return self._root(module, self.inputs[place], mean)
            self._factors(module, node, mean)
        return self._through(place, mean) if self.wanted else mean

    def _through(self, place: int, mean: Mean) -> Mean:
        """To the input of a module without parameters, or of which they are done."""
        module = self.modules[place]
        if is_one_of(module, ELEMENTWISE):
            slope = self._slope(place).to(mean.given.dtype)
            return Mean(second_moment(slope, 1 / len(slope)).mul_(mean.matrix))
        found = in_closed_form(module, self.inputs[place] if self.inputs else None, mean)
        return self._root(module, self.inputs[place], mean) if found is None else found

    def _slope(self, place: int) -> Tensor:
        """The derivative of an elementwise function, ``[n, d]``."""
        if self.between is not None:
            out, edge = self.between[place]
            with muted():
                (slope,) = pull_back([out], [edge], [torch.ones_like(out)])
            forget_retained()
            rows = self.extensions[0].subset.rows(self.n, slope.device)
            slope = slope.reshape(self.n, -1)
            return slope if rows is None else slope.index_select(0, rows)
        module, x = self.modules[place], self.inputs[place].detach().requires_grad_()
        with torch.enable_grad(), muted(), run_again(module):
            out = module(x.clone())
            (slope,) = torch.autograd.grad(out, x, torch.ones_like(out))
        return slope.flatten(1)

    def _map(self, module: Module) -> Node | None:
        """The node that used a module's parameters, if these are those of one linear map."""
        if not is_one_of(module, MAPS) or getattr(module, "padding_idx", None) is not None:
            return None
        plan = self.prepared.plan
        own = {id(p) for p in module._parameters.values() if p is not None and p.requires_grad}
        nodes = {
            node: [planned.leaf for planned in uses]
            for node, uses in plan.uses.items()
            if any(planned.leaf is not None and id(variable_of(planned.leaf)) in own for planned in uses)
        }
        if len(nodes) != 1:
            return None
        (node, leaves), *_ = nodes.items()
        found = {id(variable_of(leaf)) for leaf in leaves if leaf is not None}
        return node if found == own and None not in leaves and not is_recomputed(node) else None

    def _factors(self, module: Module, node: Node, mean: Mean) -> None:
        """Those of a linear map, from the curvature itself; of its cotangents, no values are needed."""
        size, last, shape = len(mean.matrix), not is_one_of(module, CONVOLUTIONS), shape_of(node, 0)
        channels = shape[-1 if last else 1]
        axes = (size // channels, channels, 1) if last else (1, channels, size // channels)
        self.curvature, self.subset = mean.matrix.reshape(*axes, *axes), self.extensions[0].subset
        self.final = True
        columns, cotangents = Columns(self, self.spliced), Cotangents({0: mean.given.new_zeros(()).expand(1, *shape)})
        for planned in self.prepared.plan.uses[node]:
            columns.take_in(planned, columns.arrival(node, planned, cotangents))
        self.curvature = None

    def _value(self, extension: Curvature, grads: Individual) -> Any:
        if self.curvature is not None:
            return averaged_factors(grads, self.curvature, extension.approx)  # type: ignore[attr-defined]
        found = super()._value(extension, grads)
        return found if self.sign > 0 else [-factor for factor in found]

    def _root(self, module: Module, x: Tensor, mean: Mean) -> Mean:
        """By the rows of a root, for each sample; parameters on the way."""
        n, size = len(x), mean.given.shape[1]
        step = max(1, WIDEST // (n * max(x[0].numel(), size)))
        pieces = [(sign, rows) for sign, root in mean.roots() for rows in root.split(step)]
        terms: list[Tensor] = []
        for number, (self.sign, rows) in enumerate(pieces, start=1):
            seeds = rows[:, None].expand(-1, n, -1) / n**0.5
            pulled = self._pull_back(module, x, seeds, final=number == len(pieces))
            if self.wanted:
                accumulate(terms, self.sign * second_moment(pulled.flatten(0, 1).flatten(1)))
        self.sign = 1
        return Mean(terms[0]) if terms else mean

    def _pull_back(self, module: Module, x: Tensor, seeds: Tensor, final: bool = True) -> Tensor:
        """Cotangents ``[v, n, ...]`` of a module's output to those of its input; its parameters are computed.

        ``final``: these are the last ones for this module.
        """
        x = x.detach().requires_grad_(x.is_floating_point() and self.wanted)
        with torch.enable_grad(), run_again(module):
            out = module(x.clone())  # it may work in place
        if not out.requires_grad:
            return seeds.new_zeros(len(seeds), *x.shape)
        edge = get_gradient_edge(out)
        prepared, spliced = self.prepared, self.spliced
        self.subset = Subset()
        self._go_over(SplicedGraph([edge]), [Layout(len(out))])
        ends = [get_gradient_edge(x)] if x.requires_grad else []
        pieces = seeds.reshape(len(seeds), *out.shape).split(1 if self.spliced.must_loop else len(seeds))
        found = []
        for number, piece in enumerate(pieces, start=1):
            self.final = final and number == len(pieces)
            columns = Columns(self, self.spliced, ends)
            columns.pull([edge], [piece])
            grads = columns.reached
            found.append(grads[0] if ends and grads[0] is not None else seeds.new_zeros(len(piece), *x.shape))
            columns.finish()
        self.prepared, self.spliced = prepared, spliced
        return torch.cat(found)


PASSES["average"] = AveragedPass


def _is_sequential(module: Module) -> bool:
    return isinstance(module, Sequential) and type(module).forward is Sequential.forward


def _chain(module: Module) -> Iterator[Module]:
    """The modules that a sequential one, however nested, runs one after the other."""
    if not _is_sequential(module):
        yield module
        return
    for child in module._modules.values():
        yield from _chain(child)  # type: ignore[arg-type]
