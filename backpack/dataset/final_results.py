"""The results of all processes, merged after the last batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from backpack.dataset.collection import GRAD, MODEL, Collection
from backpack.dataset.processes import Form, Processes, bundles
from backpack.dataset.sample_rows import FileRows, Rows
from backpack.modules.parameters import name_of

Key = tuple[str, str]


def merged(
    collection: Collection,
    processes: Processes,
    factor: float,
    selected: dict[str, int],
    gather: bool,
    owners: Mapping[str, int] | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Merge the results of all processes, and store them on the parameters.

    Args:
        collection: What this process has collected; it is empty afterwards.
        processes: The processes whose results are merged.
        factor: A factor of the loss of all that the results do not have yet.
        selected: How many samples of all processes each extension selects, by ``savefield``.
        gather: Whether to bring results of single samples to all processes.
        owners: By name, the only process that has a parameter's sums in the end; ``None``: all processes have all.

    Returns:
        The results by ``savefield`` and name of the parameter; and by ``savefield`` the places of those samples whose
        results stay on this process.
    """
    joined = collection.joined
    found: dict[str, dict[str, Any]] = {savefield: {} for savefield in (*collection.merging, *joined)}
    places: dict[str, Tensor] = {}
    for (name, savefield), state in _sums(collection, processes, owners or {}):
        merging = collection.merging[savefield]
        found[savefield][name] = merging.finish(state, factor, selected.get(savefield, 0))
    for (_, savefield), store in collection.rows.items():  # parameters that all batches use have all places
        if isinstance(store, Rows):
            known = torch.cat(store.places)
            if len(known) > len(places.get(savefield, ())):
                places[savefield] = known
    of_whole = {e.savefield for e in collection.extensions if e.reads_all_rows}
    wanted = {e.savefield for e in collection.extensions if gather or processes.count == 1} | of_whole
    for (name, savefield), rows in _files(collection, processes):
        found[savefield][name] = joined[savefield].finish(rows, 1.0)  # the factor was known before
    for (name, savefield), store in _gathered(collection, processes, wanted):
        found[savefield][name] = joined[savefield].finish(store.finish(torch.arange(selected[savefield])), factor)
        places.pop(savefield, None)
    for (name, savefield), store in collection.rows.items():
        assert isinstance(store, Rows)
        found[savefield][name] = joined[savefield].finish(store.finish(places[savefield]), factor)
    collection.rows.clear()
    for extension in collection.extensions:
        results = found[extension.savefield]
        if MODEL in results:
            results.update(dict.fromkeys(collection.parameters, results.pop(MODEL)))
        for name, value in results.items():
            parameter = collection.parameters[name]
            results[name] = extension.of_whole(name_of(parameter), value)
            setattr(parameter, extension.savefield, results[name])
    return found, places


def _sums(
    collection: Collection, processes: Processes, owners: Mapping[str, int]
) -> Iterator[tuple[Key, list[Tensor]]]:
    """The sums over all processes that this process keeps; one message carries many small ones."""
    forms: dict[Key, list[Form]] = {}
    if processes.count > 1:
        for other in processes.all_objects({key: [*map(Form.of, state)] for key, state in collection.sums.items()}):
            forms |= other
    receivers = {key: None if key[1] == GRAD else owners.get(key[0]) for key in forms or collection.sums}
    keys = sorted(receivers, key=lambda key: (-1 if receivers[key] is None else receivers[key], *key))
    for bundle in bundles([sum(form.nbytes for form in forms.get(key, ())) for key in keys]):
        states = {}
        for key in keys[bundle]:
            nothing = [form.zeros() for form in forms.get(key, ())] if key not in collection.sums else []
            states[key] = collection.sums.pop(key, nothing)
        if processes.count > 1:
            _reduce(collection, states, processes, receivers)
        for key, state in states.items():
            if receivers[key] in (None, processes.rank):
                yield key, state


def _reduce(
    collection: Collection, states: dict[Key, list[Tensor]], processes: Processes, receivers: Mapping[Key, int | None]
) -> None:
    """Run the reductions of all states step by step, with one message for each step."""
    merging = collection.merging
    running = [(key, merging[key[1]].reduce(state)) for key, state in states.items()]
    asked = [next(reduction) for _, reduction in running]
    while running:
        to = [receivers[key] if merging[key[1]].is_one_sum else None for key, _ in running]
        owners = [owner for owner, tensors in zip(to, asked, strict=True) for _ in tensors]
        answers = iter(processes.all_sums([tensor for tensors in asked for tensor in tensors], owners))
        still, given, asked = running, [[next(answers) for _ in tensors] for tensors in asked], []
        running = []
        for (key, reduction), own in zip(still, given, strict=True):
            try:
                asked.append(reduction.send(own))
                running.append((key, reduction))
            except StopIteration as end:
                states[key] = end.value


def _files(collection: Collection, processes: Processes) -> Iterator[tuple[Key, Tensor]]:
    """Results of single samples from files that all processes have written to."""
    own = {key: store for key, store in collection.rows.items() if isinstance(store, FileRows)}
    for store in own.values():
        store.flush()
    processes.all_objects(None)  # the others have written theirs as well
    for key, store in own.items():
        del collection.rows[key]
        if store.path.exists():
            yield key, store.finish()


def _gathered(collection: Collection, processes: Processes, wanted: set[str]) -> Iterator[tuple[Key, Rows]]:
    """Results of single samples of all processes, for ``wanted`` extensions; one message carries many small ones."""
    own = {key: store for key, store in collection.rows.items() if isinstance(store, Rows) and key[1] in wanted}
    packed = {key: store.pack() for key, store in own.items()}
    for key in own:
        del collection.rows[key]
    forms = processes.all_objects(
        {key: (len(rows), rows.shape[1:], rows.dtype, rows.device.type) for key, (rows, _) in packed.items()}
    )
    known = {key: form for other in forms for key, form in other.items()}
    keys = sorted(known)
    counts = [[other[key][0] if key in other else 0 for key in keys] for other in forms]
    sizes = [max(n) * prod(known[key][1]) * known[key][2].itemsize for key, *n in zip(keys, *counts, strict=True)]
    for bundle in bundles(sizes):
        tensors: list[Tensor] = []
        for key in keys[bundle]:
            _, shape, dtype, device = known[key]
            nothing = torch.zeros(0, *shape, dtype=dtype, device=device), torch.zeros(0, dtype=torch.int64)
            tensors += packed.pop(key, nothing)
        twice = [[n for n in own[bundle] for _ in range(2)] for own in counts]
        found = processes.all_rows(tensors, twice)
        for key, rows, places in zip(keys[bundle], found[::2], found[1::2], strict=True):
            yield key, Rows([rows], [places], [1.0])
