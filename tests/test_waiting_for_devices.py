"""First order leaves work for a device without waiting for it, and its kernels are not launched sample by sample.

Models are on the device "meta", whose tensors have no data. It takes the place of a GPU: what would make the CPU wait
for one, because it reads a tensor or copies it, raises an error or is seen as an operation between two devices.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch
from models.layers import CASES, build
from models.operators import differentiable
from test_table_of_nodes import is_differentiable, types_of, ways_to_lie
from torch.autograd.graph import get_gradient_edge
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from backpack import backpack, extend, memory
from backpack.extensions import BatchDotGrad, BatchGrad, BatchL2Grad, ClippedGrad, SumGradSquared, Variance
from backpack.graph import kind, read, shape_of
from backpack.nodes import general
from backpack.samples.layout_rules import RULES, Unknown, input_layouts

DEVICE = torch.device("meta")
FIRST = {
    **{kind.__name__: kind for kind in (BatchGrad, BatchL2Grad, SumGradSquared, Variance, BatchDotGrad)},
    "ClippedGrad": lambda **options: ClippedGrad(0.1, **options),
}
DOTS = [name for name in FIRST if name == "BatchDotGrad"]
CLIPPED = [name for name in FIRST if name == "ClippedGrad"]
WAITS = {
    **dict.fromkeys(
        ("embedding", "embedding_padding", "embedding_sparse", "embedding_one"),
        (DOTS, "words are grouped by how many samples hold them: all pairs of positions would take far longer"),
    ),
    **dict.fromkeys(
        ("bag_sum", "bag_mean_padding", "bag_weighted"),
        ([*FIRST], "a table of bags is as long as the longest of them, which only their offsets tell"),
    ),
    **dict.fromkeys(
        ("tokens_flat", "tokens_square", "tokens_batched"),
        ([*FIRST], "samples go where the indices say with which rows are picked"),
    ),
    "linear_in_place": ([*FIRST], "a view that is changed in place is a node that the table lacks"),
    "spread": ([*FIRST], "addmv is a node that the table lacks"),
    "spectral_norm": (CLIPPED, "a copy of a buffer is told from data by its values"),
}
"""Models, the quantities for which the CPU waits for the device, and why."""

FEW_AND_MANY = 32, 256
"""Numbers of samples. Between them, sizes alone add some kernels: where a closed form is chosen, or scratch is full."""


class Dispatched(TorchDispatchMode):
    """Counts operations, and those between two devices that the CPU waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self.found[str(function)] += 1
        devices = {leaf.device for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1 and not kwargs.get("non_blocking"):
            self.waiting.append(str(function))
        return result


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """PyTorch raises an error if it is asked for the autocast of the device "meta"."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": device != "meta" and asked(device))


def dispatched(name, chosen, subsampling=None, n=None):
    """What one backward pass of a model dispatches; ``n``: with so many samples."""
    problem = build(name)
    rows = torch.arange(n or problem.n) % problem.n

    def moved(value):
        return tree_map_only(torch.Tensor, lambda t: t.index_select(problem.axis, rows).to(DEVICE), value)

    problem.inputs, problem.kwargs = moved(problem.inputs), moved(problem.kwargs)
    extend(problem.model.to(DEVICE))
    with DEVICE:  # for what a model makes itself
        loss = problem.loss()
    mode = Dispatched()
    with backpack(*[FIRST[key](subsampling=subsampling) for key in chosen]), mode:
        loss.backward()
    fields = [FIRST[key]().savefield for key in chosen]
    results = [vars(p)[field] for p in problem.parameters().values() for field in fields if field in vars(p)]
    assert results and all(result.device == DEVICE for result in results)
    return mode


@pytest.mark.parametrize("subsampling", [None, [0, -1]], ids=["all samples", "some samples"])
@pytest.mark.parametrize("name", CASES)
def test_first_order_does_not_wait_for_the_device(name, subsampling):
    waits, _ = WAITS.get(name, ([], ""))
    chosen = [key for key in FIRST if key not in waits]
    if chosen:
        assert not dispatched(name, chosen, subsampling).waiting


@pytest.mark.xfail(raises=(NotImplementedError, RuntimeError), strict=True)
@pytest.mark.parametrize("name, quantity", [(name, key) for name, (waits, _) in WAITS.items() for key in waits])
def test_known_places_where_first_order_waits(name, quantity):
    dispatched(name, [quantity])


@pytest.mark.parametrize("name", CASES)
def test_no_kernel_is_launched_for_each_sample(name):
    chosen = [key for key in FIRST if key not in WAITS.get(name, ([], ""))[0]]
    if chosen:
        few, many = (dispatched(name, chosen, n=n).found.total() for n in FEW_AND_MANY)
        assert many - few < (FEW_AND_MANY[1] - FEW_AND_MANY[0]) / 2


def test_a_wait_and_a_kernel_for_each_sample_are_noticed(monkeypatch):
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="meta"):
        assert x.sum() > 0
    with Dispatched() as mode:
        torch.arange(3).to(DEVICE)
    assert mode.waiting
    monkeypatch.setattr(general, "TOGETHER", {})  # PyTorch itself loops over weight normalization
    few, many = (dispatched("weight_norm", FIRST, n=n).found.total() for n in FEW_AND_MANY)
    assert many - few > FEW_AND_MANY[1] - FEW_AND_MANY[0]


def of_the_database():
    """Graphs of all operators whose sample inputs PyTorch can make on the device."""
    for op in op_db:
        if not op.supports_autograd or torch.float64 not in op.supported_backward_dtypes("cpu"):
            continue
        try:
            samples = list(op.sample_inputs_func(op, DEVICE, torch.float64, True))[:3]
            found = [out for s in samples for out, _ in differentiable(op(s.input, *s.args, **s.kwargs), [])]
        except (NotImplementedError, RuntimeError):  # sample inputs or the operator itself depend on values
            continue
        for out in found:
            yield read([get_gradient_edge(out)]).order


def test_the_table_of_nodes_reads_nothing_but_indices():
    waits, seen = set(), defaultdict(int)
    generator = torch.Generator()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated operators and beta features
        graphs = list(of_the_database())
    for node in (node for order in graphs for node in order if kind(node) in RULES):
        for number, dtype in enumerate(types_of(node)):
            layouts = ways_to_lie(shape_of(node, number), generator) if is_differentiable(node, number, dtype) else ()
            for layout in layouts:
                seen[kind(node)] += 1
                try:
                    input_layouts(node, node.next_functions, layout, number)
                except Unknown:
                    pass
                except NotImplementedError:
                    waits.add(kind(node))
    assert len(seen) > 160 and sum(seen.values()) > 10_000
    assert waits <= {"Gather", "Index", "IndexAdd", "IndexSelect", "ScatterAdd"}


def test_what_is_computed_at_a_time_fits_the_device(monkeypatch):
    memory._of_gpu.cache_clear()
    sizes = {0: 2**37, 1: 2**26}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=sizes[device.index])
    )
    for what, entries in memory.AT_A_TIME.items():
        assert memory.at_a_time(what, torch.device("cpu")) == entries
        large, small = (memory.at_a_time(what, torch.device("cuda", index)) for index in sizes)
        assert large == 2**37 // (64 * 8) > small == entries  # float64
    memory._of_gpu.cache_clear()
