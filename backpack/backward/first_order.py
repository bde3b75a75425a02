"""The backward pass of first order: cotangents are taken where they reach uses, results are computed as they complete.

A prehook of each node that uses a parameter receives the complete cotangents of the node's outputs just before the node
runs, while its saved tensors are still there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.backward.arrivals import Arrival, Contributions
from backpack.backward.plan import Plan, PlannedUse
from backpack.backward.region import pull_through
from backpack.bystanders import undisturbed
from backpack.compat import pull_back
from backpack.engine import HERE, Block, without_autocast
from backpack.graph import Graph, count_outputs, kind, variable_of
from backpack.landmarks import MARK
from backpack.nodes import FORMS, GeneralUse, Place, PlacedUse, use_of
from backpack.quantities import Quantity
from backpack.samples import Subset
from backpack.samples.owners import Edge, Owners
from backpack.uses import Cotangents, Explicit, Use
from backpack.watched import watched, without_rules


class FirstOrderPass:
    """What has arrived in one backward pass.

    Args:
        block: Whose extensions are computed.
        graph: All that the pass may visit.
        owners: Whose rows the cotangents are.
        plan: The uses of parameters.

    A pass ``is_partial`` that ends before some leaves. A node that runs by itself inside of one gives only what the
    pass needs: such calls are ``deferred`` to its end, and the graph has to be kept until then.
    """

    def __init__(self, block: Block, graph: Graph, owners: Owners, plan: Plan) -> None:
        self.block, self.graph, self.owners, self.plan = block, graph, owners, plan
        self.found: dict[Node, Contributions] = {}
        self.complete: set[Node] = set()
        self.entering: dict[Node, dict[int, Contributions]] = {}
        self.postponed: list[tuple[Quantity, Contributions, Tensor]] = []
        self.handles: list[Any] = []
        self.places: dict[Node, int] = {}
        self.is_partial = False
        self.deferred: list[tuple[PlannedUse, Arrival]] = []
        extensions = block.first_order
        self.is_simple = not (
            block.debug or any(e.rules or e.has_rules_only or e.needs_all_parameters for e in extensions)
        )
        self.groups = [(group[0].subset, [name for e in group for name in e.reads], group) for group in block.groups]
        devices = {variable_of(leaf).device.type for leaf in plan.expected}
        self.under_autocast = any(map(torch.is_autocast_enabled, devices))

    @property
    def may_defer(self) -> bool:
        """Whether some use may have no normal form."""
        uses = ((kind(node), planned) for node, uses in self.plan.uses.items() for planned in uses)
        return any(planned.leaf is None or planned.sent is not None or name not in FORMS for name, planned in uses)

    def attach(self) -> None:
        """Put the prehooks on."""
        for node in self.plan.uses:
            self.handles.append(node.register_prehook(partial(self._arrived, node)))
        for node in self.plan.entries:
            self.handles.append(node.register_prehook(partial(self._entered, node)))

    def detach(self) -> None:
        """Take the prehooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _arrived(self, node: Node, grads: Sequence[Tensor | None]) -> None:
        """The cotangents of a node's outputs are complete."""
        if HERE.muted or HERE.inner is not None:
            return
        self.block.enter_pass()
        cotangents = Cotangents({number: grad[None] for number, grad in enumerate(grads) if grad is not None})
        if not cotangents:
            return
        if self.under_autocast:
            with without_autocast(next(iter(cotangents.values())).device):
                self._receive(node, cotangents)
        else:
            self._receive(node, cotangents)

    def _receive(self, node: Node, cotangents: Cotangents) -> None:
        """Take the cotangents of a node's outputs to all that the node uses."""
        simple = self.is_simple and not self.is_partial
        for planned in self.plan.uses[node]:
            arrival = self._arrival(node, planned, cotangents)
            if simple and planned.is_alone and not arrival.turned:
                self._compute_alone(planned.leaf, arrival)  # type: ignore[arg-type]
            elif self.is_partial and isinstance(arrival.use, (GeneralUse, PlacedUse)):
                self.deferred.append((planned, arrival))
            else:
                self._take_in(planned, arrival)

    def _compute_alone(self, leaf: Node, arrival: Arrival) -> None:
        """The results of a parameter of which this is the only use, in the shortest way."""
        block, parameter = self.block, variable_of(leaf)
        fields = vars(parameter)
        block.seen.add(id(parameter))
        for subset, names, extensions in self.groups:
            for extension in extensions:
                fields.pop(extension.savefield, None)  # its memory is needed for the new result
            grads = arrival.individual(subset, parameter.shape, parameter.dtype)
            grads.prepare(names)
            for extension in extensions:
                block.store(parameter, extension.savefield, extension.compute(grads))
        self.complete.add(leaf)
        block.finished.add(id(parameter))
        block.owners_done(parameter, block.finished)

    def _of(self, leaf: Node) -> Contributions:
        """What has arrived at a parameter."""
        if leaf not in self.found:
            parameter = variable_of(leaf)
            self.found[leaf] = Contributions(parameter.shape, parameter.dtype, parameter.device, parameter)
        return self.found[leaf]

    def _take_in(self, planned: PlannedUse, arrival: Arrival) -> None:
        if planned.leaf is not None:
            contributions = self._of(planned.leaf)
            self.block.seen.add(id(contributions.tensor))
            self._note(contributions, arrival, self._is_last(planned.leaf))
            self._count(planned.leaf)
            return
        assert planned.entry is not None
        entry, number = planned.entry
        entered = self.entering.setdefault(entry, {})
        if number not in entered:
            entered[number] = Contributions(*form_of(entry, number))
        self._note(entered[number], arrival, at_once=False)

    def _is_last(self, leaf: Node) -> bool:
        """Whether one more arrival completes a parameter whose results are computed at once."""
        postponed = any(extension.needs_all_parameters for extension in self.block.first_order)
        return self._of(leaf).count + 1 == self.plan.expected[leaf] and not postponed

    def _note(self, contributions: Contributions, arrival: Arrival, at_once: bool) -> None:
        """Note an arrival; of what can't be computed any more when the node has run, the individual gradients."""
        if at_once or not isinstance(arrival.use, (GeneralUse, PlacedUse)):
            contributions.arrivals.append(arrival)
            return
        for key, subset in self.subsets.items():
            pulled = Explicit(arrival.individual(subset, contributions.shape, contributions.dtype).dense())
            contributions.pulled.setdefault(key, []).append(pulled)

    def _arrival(self, node: Node, planned: PlannedUse, cotangents: Cotangents) -> Arrival:
        if planned.sent is not None:
            use: Use | None = PlacedUse(node, planned.k, planned.sent, count_outputs(node))
            return Arrival(use, cotangents, planned.sent, planned.turned)  # type: ignore[arg-type]
        use = None
        if planned.number == 0 and len(cotangents) == 1 and 0 in cotangents:
            use = use_of(Place(node, planned.k, 0, planned.layout))
        if use is None:
            layouts = [self.owners.owned.get((node, number)) for number in range(count_outputs(node))]
            is_mixed = planned.entry is not None and planned.entry[0] in self.plan.mixed
            use = GeneralUse(node, planned.k, layouts, is_mixed)
        return Arrival(use, cotangents, planned.layout, planned.turned)

    @property
    def subsets(self) -> dict[Any, Subset]:
        """Those of all extensions, by key."""
        return {extension.subset.key: extension.subset for extension in self.block.first_order}

    def _entered(self, node: Node, _: Any) -> None:
        """All that enters a region through a node has arrived: pull it on to the parameters while all is there."""
        if not (HERE.muted or HERE.inner is not None or self.is_partial or node not in self.entering):
            self.enter(node)

    def enter(self, node: Node) -> None:
        """Pull what entered a region through a node on to the parameters behind it."""
        if not self.places:
            self.places.update({node: place for place, node in enumerate(self.graph.order)})
        entered = self.entering.pop(node)
        with without_autocast(next(iter(entered.values())).device):
            for key, subset in self.subsets.items():
                grads = {number: found.individual(subset).dense()[0] for number, found in entered.items()}
                one_by_one = node in self.plan.mixed
                for leaf, grad in pull_through(self.graph, self.places, node, grads, one_by_one).items():
                    if leaf in self.plan.expected:
                        self._of(leaf).pulled.setdefault(key, []).append(Explicit(grad[None]))
            for leaf in self.plan.entries[node]:
                self.block.seen.add(id(variable_of(leaf)))
                self._count(leaf)

    def _count(self, leaf: Node) -> None:
        contributions = self._of(leaf)
        contributions.count += 1
        if contributions.count == self.plan.expected[leaf]:
            self.complete.add(leaf)
            self._complete(contributions)
            if not any(extension.needs_all_parameters for extension in self.block.first_order):
                contributions.arrivals, contributions.pulled = [], {}

    def _complete(self, contributions: Contributions) -> None:
        """All uses have contributed: compute the results."""
        block, parameter = self.block, contributions.tensor
        assert parameter is not None
        name = name_of(parameter)
        if contributions.arrivals or contributions.pulled:
            for group in block.groups:
                extensions = without_rules(group, parameter, name)
                if extensions:
                    self._compute(contributions, name, extensions)
        block.finished.add(id(parameter))
        block.owners_done(parameter, block.finished)

    def _compute(self, contributions: Contributions, name: str, extensions: list[Quantity]) -> None:
        block, parameter = self.block, contributions.tensor
        for extension in extensions:
            vars(parameter).pop(extension.savefield, None)  # its memory is needed for the new result
        grads = contributions.individual(extensions[0].subset)
        grads.prepare([name for extension in extensions for name in extension.reads])
        for extension in extensions:
            if block.debug:
                print(f"[DEBUG] {type(extension).__name__} on parameter {name} {list(parameter.shape)}")
            if extension.needs_all_parameters:
                self.postponed.append((extension, contributions, extension.measure(grads)))
            else:
                block.store(parameter, extension.savefield, extension.compute(grads))

    @contextmanager
    def continued(self) -> Iterator[None]:
        """Cotangents that arrive inside belong to the pass that has just ended."""
        self.block.is_continued = True
        try:
            yield
        finally:
            self.block.is_continued = False

    def take(self, targets: Sequence[GradientEdge], found: Sequence[Tensor | None]) -> None:
        """Cotangents that reached outputs of nodes which do not run."""
        arrived: dict[Node, list[Tensor | None]] = {}
        for target, grad in zip(targets, found, strict=True):
            count = count_outputs(target.node)
            arrived.setdefault(target.node, [None] * count)[target.output_nr] = grad
        for node, grads in arrived.items():
            self._arrived(node, grads)

    def pull_on(self, ends: dict[Edge, Tensor]) -> None:
        """Send cotangents on to the uses below edges at which the pass has ended, without gradients of parameters."""
        targets = self.outputs_of(self.lowest_uses([node for node, _ in ends]))
        if not targets:
            return
        edges = [GradientEdge(node, number) for node, number in ends]
        tensors: list[Any] = []
        for node, number in ends:
            metadata: Any = node.metadata
            tensors += metadata[MARK, number].tensors if (MARK, number) in metadata else []
        with undisturbed(tensors):
            self.take(targets, pull_back(edges, targets, list(ends.values()), torch.is_grad_enabled()))

    def outputs_of(self, nodes: Sequence[Node]) -> list[GradientEdge]:
        """The outputs of nodes' functions that belong to samples."""
        counts = [(node, range(count_outputs(node))) for node in nodes]
        owned = self.owners.owned
        return [GradientEdge(node, number) for node, count in counts for number in count if (node, number) in owned]

    def lowest_uses(self, starts: Sequence[Node], among: set[Node] | None = None) -> list[Node]:
        """From these nodes on, those that use parameters and have no other such node below them.

        ``among``: those that count.
        """
        below: set[Node] = set()
        seen = set(starts)
        pending = list(starts)
        while pending:
            for other, _ in self.graph.edges[pending.pop()]:
                if other is not None and other not in seen:
                    seen.add(other)
                    pending.append(other)
        lowest = []
        for node in reversed(self.graph.order):
            if node not in seen:
                continue
            if any(other in below for other, _ in self.graph.edges[node] if other is not None):
                below.add(node)
            elif node in (self.plan.uses if among is None else among):
                below.add(node)
                lowest.append(node)
        return lowest

    def finish(self) -> None:
        """What had to wait for the end of the pass, regions that it did not run, and what needs all parameters."""
        deferred, self.deferred, self.is_partial = self.deferred, [], False
        for planned, arrival in deferred:
            self._take_in(planned, arrival)
        order = {node: place for place, node in enumerate(self.graph.order)} if self.entering else {}
        for node in sorted(self.entering, key=order.__getitem__):
            self.enter(node)
        for extension in self.block.first_order:
            own = [(found, measure) for other, found, measure in self.postponed if other is extension]
            if own:
                joint = extension.combine([measure for _, measure in own])
                for found, _ in own:
                    with without_autocast(found.tensor.device):
                        value = extension.compute_jointly(found.individual(extension.subset), joint)
                    self.block.store(found.tensor, extension.savefield, value)
        self.postponed.clear()

    @property
    def missed(self) -> list[Tensor]:
        """Parameters of which not all uses were reached."""
        return [variable_of(leaf) for leaf in self.plan.expected if leaf not in self.complete]


def form_of(node: Node, number: int) -> tuple[torch.Size, torch.dtype, torch.device]:
    """Shape, data type and device of an output of a node's function."""
    metadata = node._input_metadata[number]
    return torch.Size(metadata.shape), metadata.dtype, metadata.device


def name_of(parameter: Tensor) -> str:
    """The path of a parameter in the model that was extended."""
    known = watched(parameter)
    return "of an extended module" if known is None else known.name
