"""Before a pass: where the samples begin, which uses of parameters there are, and what cannot be computed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from math import prod
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import Module

from backpack.backward.block import Block
from backpack.backward.collector import Prepared
from backpack.backward.plan import make_plan
from backpack.graph import LEAF, Edge, Graph, count_outputs, shape_of, variable_of
from backpack.modules.calls import Note
from backpack.modules.loss_calls import LossCall, losses_in
from backpack.modules.parameters import SHARDED, info_of, listed, name_of
from backpack.modules.thread_state import muted
from backpack.samples import AnyLayout, SampleIds
from backpack.samples.mixing import mixed_data
from backpack.samples.mixing_proofs import holds_computed_values, possible_mixer
from backpack.samples.owners import Owners, find_owners
from backpack.samples.where_samples_begin import decide


def prepare(
    graph: Graph, notes: Mapping[Edge, Note], calls: Sequence[Note], ids: SampleIds | None = None
) -> Prepared | None:
    """Find the samples and the uses of parameters; ``None``: there are none."""
    if not calls:
        return None
    generator = torch.Generator()

    def sweep(begin: dict[Edge, AnyLayout]) -> Owners:
        return find_owners(graph, begin, generator)

    wanted = wanted_leaves(graph)
    with muted():
        begin, owners = decide(graph, dict(notes), calls, sweep, wanted, ids, _of_one_sample(graph))
    counts = {layout.n for edge, layout in begin.items() if owners.owned.get(edge) is layout}
    if len(counts) > 1:
        raise RuntimeError(
            f"Outputs of extended modules have {' and '.join(map(str, sorted(counts)))} samples: which of them belong "
            f"together cannot be told. Let one call of the extended module see the whole batch."
        )
    if not counts:
        return None
    (n,) = counts
    rows = n if ids is None else None
    found = planned(graph, begin, owners, wanted, calls, n, rows)
    with muted():
        if found.plan.mixed or (ids is not None and holds_computed_values(graph, found.plan.entries, notes)):
            # Perhaps samples are kept apart by values: masks, weights that are zero.
            owners = find_owners(graph, begin, generator, thoroughly=True)
            found = planned(graph, begin, owners, wanted, calls, n, rows)
    return found if found.plan.expected else None


def planned(
    graph: Graph,
    begin: Mapping[Edge, AnyLayout],
    owners: Owners,
    wanted: set[Node],
    calls: Sequence[Note],
    n: int,
    rows: int | None,
) -> Prepared:
    """Plan a pass: the uses of the wanted parameters, and where samples are mixed.

    ``rows``: how many rows of the inputs are samples; ``None``: samples are no rows of the inputs.
    """
    plan = make_plan(graph, owners, n, wanted)
    if n > 1 and plan.entries:
        with muted():
            plan.mixed, plan.for_all = mixed_data(graph, owners, plan.entries, calls, rows)
    return Prepared(graph, begin, owners, plan)


def _of_one_sample(graph: Graph) -> set[Edge]:
    """The inputs of losses that have no axis of samples, but of classes alone."""
    return {
        call.place
        for _, _, call in losses_in(graph)
        if isinstance(call.loss, (torch.nn.CrossEntropyLoss, torch.nn.NLLLoss)) and call.input.dim() == 1
    }


def wanted_leaves(graph: Graph) -> set[Node]:
    """The nodes of parameters of extended modules."""
    return {node for node in graph.order if node.name() == LEAF and is_wanted(variable_of(node))}


def is_wanted(leaf: Tensor) -> bool:
    """Whether a leaf is a parameter of an extended module."""
    return info_of(leaf) is not None or (bool(SHARDED) and leaf in SHARDED)


def _passes(block: Block, prepared: Prepared) -> float:
    """How many backward passes it costs to pull samples through mixed regions, for one column.

    The cost is estimated by the entries of the tensors. Each subset of samples is pulled by itself.
    """
    graph, plan = prepared.graph, prepared.plan
    size = {node: sum(prod(shape_of(node, number)) for number in range(count_outputs(node))) for node in graph.order}
    below = set(graph.behind(plan.mixed))
    subsets = {extension.subset.key: extension.subset for extension in block.extensions}
    rows = [subset.rows(plan.n, torch.device("cpu")) for subset in subsets.values()]
    samples = sum(plan.n if own is None else len(own) for own in rows)
    return samples * sum(size[node] for node in below) / max(1, sum(size.values()))


def samples_averaged(block: Block, losses: Sequence[tuple[Node, int, LossCall]], n: int) -> int | None:
    """How many samples the loss is a mean over, ``n`` unless some entries belong to none; ``None`` for a sum.

    Raises:
        RuntimeError: It is not known.
    """
    reductions = {getattr(call.loss, "reduction", None) for *_, call in losses}
    if reductions == {"sum"}:
        return None
    if reductions == {"mean"}:
        return n if block.ids is None else block.ids.count
    names = ", ".join(type(extension).__name__ for extension in block.extensions if extension.needs_own_losses)
    raise RuntimeError(
        f"{names}(per_sample=True) must know whether the loss is a mean or a sum: write lossfunc = extend(lossfunc), "
        f"with reduction='mean' or 'sum', before the forward pass. For any other loss, leave per_sample out and divide "
        f"the bound yourself, by the number of samples if the loss is a mean over them."
    )


def refuse_other_losses(block: Block) -> None:
    """Say that second order needs an extended loss.

    Raises:
        RuntimeError: Always.
    """
    names = ", ".join(type(extension).__name__ for extension in block.second_order)
    raise RuntimeError(
        f"{names}: the backward pass did not start from an extended loss. Write lossfunc = extend(lossfunc) before the "
        f"forward pass, and call backward() on its output. The model's output is the first argument of the loss. In "
        f"place of a function such as F.cross_entropy, take the module, torch.nn.CrossEntropyLoss()."
    )


def refuse_complex(block: Block, prepared: Prepared) -> None:
    """Say which extensions are not defined for complex parameters.

    Raises:
        RuntimeError: There are both.
    """
    extensions = [extension for extension in block.second_order if extension.needs_real_parameters]
    leaves = map(variable_of, prepared.plan.expected if extensions else ())
    names = [name_of(parameter) for parameter in leaves if parameter.is_complex()]
    for extension in extensions:
        if names:
            raise RuntimeError(
                f"{type(extension).__name__} is not defined for complex parameters, as {listed(names)}: "
                f"each of their entries has four second derivatives. Hold their real and imaginary parts in a real "
                f"parameter and take torch.view_as_complex of it in forward(); or freeze these parameters with "
                f"requires_grad_(False); or take an extension of the GGN."
            )


_told: WeakKeyDictionary[Module, set[str]] = WeakKeyDictionary()
"""For each model, what mixes its samples, as far as the user was warned of it."""


WAYS_OUT = (
    "Call .eval() on layers that normalize by statistics of the batch, or replace them by GroupNorm, InstanceNorm "
    "or LayerNorm, or say with sample_ids= where the samples are, if they are no rows of the output"
)


def look_for_mixed(block: Block, prepared: Prepared, notes: Mapping[Edge, Note], calls: Sequence[Note]) -> None:
    """Warn once of the cost if samples are mixed.

    Raises:
        RuntimeError: An extension is not defined then.
    """
    plan = prepared.plan
    if plan.n == 1 or not block.extensions:
        return
    where = ", ".join(dict.fromkeys(plan.mixed.values()))
    _refuse_mixed(block, prepared, notes, where)
    module = next((module for note in calls if (module := note.module()) is not None), None)
    if where and module is not None and where not in _told.setdefault(module, set()):
        _told[module].add(where)
        warnings.warn(
            f"Samples are mixed by {where}: what is computed of one depends on others. The gradient of each of the "
            f"{plan.n} samples is pulled through the layers below by itself, in second order for each column, which "
            f"costs about {_passes(block, prepared):.2g} times a backward pass. {WAYS_OUT}, or let subsampling= select "
            f"fewer samples.",
            stacklevel=6,
        )


def _refuse_mixed(block: Block, prepared: Prepared, notes: Mapping[Edge, Note], where: str) -> None:
    """Raise if an extension of a block is not defined where samples are mixed; ``where``: by these nodes."""
    plan = prepared.plan
    for extension in block.first_order:
        if not extension.bounds_influence:
            continue
        with muted():
            n = plan.n if block.ids is None else None
            mixer = where or possible_mixer(prepared.graph, prepared.owners, plan.entries, notes, n, plan.for_all)
        if mixer:
            raise RuntimeError(
                f"{type(extension).__name__}: samples are mixed by {mixer}. A sample changes what is computed of "
                f"others, so that clipping its gradient does not bound its influence. {WAYS_OUT}."
            )
    inside = dict.fromkeys(name_of(variable_of(leaf)) for entry in plan.mixed for leaf in plan.entries[entry])
    for extension in block.second_order:
        if extension.needs_samples_apart and inside:
            raise RuntimeError(
                f"{type(extension).__name__}: samples are mixed by {where}, and for parameters below, as "
                f"{listed(list(inside))}, Kronecker factors are not defined. {WAYS_OUT}; or freeze these parameters "
                f"with requires_grad_(False), or take an extension that is diagonal in them."
            )
