"""Second derivatives where only values keep samples apart, such as a mask of attention.

A probability of attention belongs to the sample of its row, also where it is zero because the mask hides another
sample's position. The product with the values couples it to that position nonetheless. Columns of several samples share
a pull-back, so such entries must not be among them. They need not be: nothing that arrives there reaches a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack.backward.collector import Prepared
from backpack.curvature.residual_graph import ResidualGraph
from backpack.curvature.residuals.local import LocalHessian
from backpack.curvature.spliced_graph import SplicedGraph
from backpack.graph import variable_of
from backpack.samples import found_layout
from backpack.samples.coded_pass import codes_of


def keep_apart(spliced: SplicedGraph, prepared: Prepared) -> set[Node]:
    """Leave out entries that couple samples if what arrives there has no effect; return nodes that do so still.

    What is left of each input of a node is noted with the owners.
    """
    owners, coded = prepared.owners, set(prepared.owners.coded)  # all others keep samples apart whatever the values are
    graph, coupled = ResidualGraph(spliced, prepared), set[Node]()
    for node in graph.curved if coded and prepared.n > 1 else ():
        if node not in coded:
            continue
        inputs = graph.inputs(node)
        local = LocalHessian(node, inputs.edges, _random_outputs(node, prepared))
        if local.is_zero():
            continue
        known = zip(inputs.layouts, inputs.shapes, strict=True)
        own = [layout.owners(shape, torch.device("cpu")).expand(shape) for layout, shape in known]
        shared = _shared(local, own, prepared.n)
        if not any(bool(hit.any()) for hit in shared):
            continue
        for place, (edge, hit) in enumerate(zip(inputs.edges, shared, strict=True)):
            if hit.any() and _is_without_effect(edge, hit, spliced, prepared):
                own[place] = own[place].masked_fill(hit, -1)
                owners.within[node, edge] = found_layout(prepared.n, own[place], exactly=True)
        if any(bool(hit.any()) for hit in _shared(local, own, prepared.n)):
            coupled.add(node)
    return coupled


def _random_outputs(node: Node, prepared: Prepared) -> dict[int, Tensor]:
    """Random cotangents of those outputs of a node that belong to samples."""
    found = {}
    for number, data in enumerate(node._input_metadata):
        layout = prepared.owners.owned.get((node, number))
        if layout is not None:
            drawn = torch.randn(tuple(data.shape), dtype=torch.float64, generator=torch.Generator().manual_seed(number))
            drawn = drawn.masked_fill(layout.owners(data.shape, drawn.device) < 0, 0)
            found[number] = drawn.to(data.dtype).to(data.device)
    return found


def _shared(local: LocalHessian, owners: Sequence[Tensor], n: int) -> list[Tensor]:
    """For each input, the entries that second derivatives couple to entries of another sample."""
    codes = codes_of(n)[0]
    codes = torch.cat([codes, ~codes])
    parts, generator = [], torch.Generator().manual_seed(0)
    device = local.node._input_metadata[0].device
    for owner in owners:
        takes = codes[:, owner.clamp(min=0)] & (owner >= 0)
        drawn = torch.randn(takes.shape, dtype=torch.float64, generator=generator).masked_fill(~takes, 0)
        parts.append(drawn.to(device))
    found = []
    for owner, product in zip(owners, local.products(parts), strict=True):
        outside = ~codes[:, owner.clamp(min=0)] & (owner >= 0)
        found.append((outside & (product != 0).cpu()).any(0))
    return found


def _is_without_effect(edge: GradientEdge, entries: Tensor, spliced: SplicedGraph, prepared: Prepared) -> bool:
    """Whether no parameter receives anything of what arrives at these entries."""
    meta = spliced.now(edge).node._input_metadata[spliced.now(edge).output_nr]
    drawn = torch.randn(entries.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seed = drawn.masked_fill(~entries, 0).to(meta.dtype).to(meta.device)
    parameters = [variable_of(leaf) for leaf in prepared.plan.expected]
    return not any(grad is not None and bool(grad.any()) for grad in spliced.grad([edge], parameters, [seed]))
