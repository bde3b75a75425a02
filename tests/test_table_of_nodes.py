"""What the table of nodes claims, and what a coded pass finds, against PyTorch's operator database.

For every node of the graphs of all operators, and of their derivatives: where samples lie in some way in an output, the
entries of each input that a sample reaches are found by sending a cotangent of this sample alone through the node. The
table must give these entries to that sample, or to nobody. So must the coded pass, which must also see what is mixed.
"""

import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from models.operators import outputs
from torch.autograd.graph import get_gradient_edge
from torch.testing._internal.common_methods_invocations import op_db

from backpack.graph import LEAF, call, count_outputs, kind, read, shape_of
from backpack.samples import Layout, Scattered
from backpack.samples.coded_pass import coded
from backpack.samples.layout_rules import RULES, Unknown, input_layouts

BESIDE = {
    "complex": lambda x: torch.complex(x, x.sin()).abs(),
    "polar": lambda x: torch.polar(x, x.sin()).real,
    "imag": lambda x: torch.view_as_complex(x[..., None] * x.new_ones(2)).imag,
    "binary_cross_entropy_with_logits": lambda x: F.binary_cross_entropy_with_logits(x, x.detach(), reduction="none"),
    "conj_physical": lambda x: torch.complex(x, x.sin()).conj_physical().imag,
    "unsafe_split_with_sizes": lambda x: torch.unsafe_split_with_sizes(x, [1, 3])[1],
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "adjoint": lambda x: x.adjoint(),
    "mT": lambda x: x.mT,
    "swapaxes": lambda x: x.swapaxes(0, 1),
}
"""Functions that the database lacks, of a tensor ``[4, 6]``."""

_ELSEWHERE = """
CudnnBatchNorm FusedRmsNorm MiopenBatchNorm ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention
ScaledDotProductFlashAttention ScaledDotProductFusedAttentionOverrideable MaxPool2D
"""
_NO_NODES = """
AdaptiveAvgPool1D AdaptiveMaxPool1D Adjoint AvgPool1D BernoulliDropout Detach Flatten FloorDivide HardsigmoidBackward
Heaviside Imag KlDiv L1Loss MaxPool1DWithIndices Mh MishBackward MkldnnMaxpool1D MkldnnMaxpool2D MkldnnMaxpool3D Mt
Positive Real Reshape ResolveConj ResolveNeg Selu SiluBackward Special_Xlog1Py Square Swapaxes Swapdims Unflatten
UpsampleBicubic1D UpsampleBicubic3D UpsampleBilinear1D UpsampleBilinear3D UpsampleLinear2D UpsampleLinear3D
UpsampleTrilinear1D UpsampleTrilinear2D
"""
UNSEEN = {
    **dict.fromkeys(_ELSEWHERE.split(), "of other devices than CPUs"),
    **dict.fromkeys(_NO_NODES.split(), "no function of PyTorch 2.13 has a node of this name"),
    "Alias": "of the sweep's views only copies have it, whose nodes have other names",
    "MkldnnRnnLayer": "of float32 LSTMs",
}
"""Kinds in the table that no graph of the sweep has, and why."""

EXPENSIVE = {
    "grid_sampler_3d": "a graph of thousands of nodes for each sample input",
    "pca_lowrank": "hundreds of nodes, of few kinds",
    "svd_lowrank": "hundreds of nodes, of few kinds",
}
"""Operators of which one sample input is looked at."""

NO_DERIVATIVE = {
    "nn.functional.linear_cross_entropy": "its backward writes to out=...",
}
"""Operators whose backward can't be differentiated, though the database says that it can."""

NOISE = 1e-12
"""Results smaller than this vanish but for rounding, if cotangents are of size 1."""


def ways_to_lie(shape, generator):
    """Layouts of samples in a tensor: along each axis, side by side or repeated or both, and irregular ones."""
    for axis, size in enumerate(shape):
        if size <= 30:
            yield Layout(size, axis)
        for n in (2, 3):
            if size % n == 0 and size > n:
                factor = size // n
                yield Layout(n, axis, factor)
                yield Layout(n, axis, 1, factor)
                if factor % 2 == 0 and factor > 2:
                    yield Layout(n, axis, 2, factor // 2)
        yield scattered(shape, [axis], generator)
    for axis in range(len(shape) - 1):
        yield scattered(shape, [axis, axis + 1], generator)


def scattered(shape, axes, generator):
    sizes = [size if axis in axes else 1 for axis, size in enumerate(shape)]
    return Scattered(3, torch.randint(-1, 3, sizes, generator=generator))


def reached(node, layouts, generator):
    """For each input of a node how strongly each sample reaches its entries, ``[n, *input]``; NaN: not finite.

    ``layouts``: of its outputs. ``None``: an input has no gradient.
    """
    seeds = [
        None if layout is None else random(shape_of(node, k), dtype, generator)
        for k, (layout, dtype) in enumerate(zip(layouts, types_of(node), strict=True))
    ]
    pulled = []
    for sample in range(next(layout.n for layout in layouts if layout is not None)):
        own = [
            None if seed is None else seed.masked_fill(layout.owners(seed.shape, seed.device) != sample, 0)
            for seed, layout in zip(seeds, layouts, strict=True)
        ]
        pulled.append(call(node, own))
    found = []
    for grads in zip(*pulled, strict=True):
        if any(grad is None for grad in grads):
            found.append(None)
        else:
            sizes = torch.stack([grad.abs() for grad in grads])
            found.append(sizes.where(sizes.isfinite().all(0), torch.nan))
    return found


def random(shape, dtype, generator):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


def types_of(node):
    return [metadata.dtype for metadata in node._input_metadata]


@dataclass
class Sweep:
    """What was found where ``most`` nodes of a kind and of the same shapes are looked at in each graph.

    ``wrong``: by operator, kind of node and what is wrong, an example; ``seen``: layouts that the table was asked for,
    by kind; ``unknown``: those that it left to a coded pass; ``alarms``: what was called mixed and is not, by kind;
    ``claims``: how often the table said that an input is owned, or mixed.
    """

    most: int
    wrong: dict = field(default_factory=dict)
    seen: Counter = field(default_factory=Counter)
    unknown: Counter = field(default_factory=Counter)
    needs: dict = field(default_factory=lambda: defaultdict(set))
    alarms: Counter = field(default_factory=Counter)
    alarms_of_codes: Counter = field(default_factory=Counter)
    graphs: int = 0
    claims: int = 0

    def look(self, name, roots):
        """All nodes of a graph, with each of their outputs, and all of them if they are alike."""
        self.graphs += 1
        generator = torch.Generator().manual_seed(0)
        shapes = Counter()
        for node in read([get_gradient_edge(root) for root in roots]).order:
            if node.name() in (LEAF, "torch::autograd::NotImplemented"):
                continue
            given = [None if other is None else shape_of(other, number) for other, number in node.next_functions]
            key = kind(node), *(shape_of(node, k) for k in range(count_outputs(node))), *given
            shapes[key] += 1
            if shapes[key] > self.most:
                continue
            numbers = [k for k, dtype in enumerate(types_of(node)) if is_differentiable(node, k, dtype)]
            for number in numbers[: self.most]:
                for layout in ways_to_lie(shape_of(node, number), generator):
                    self.judge(name, node, {number: layout}, generator)
            if len({shape_of(node, number) for number in numbers}) == 1 and len(numbers) > 1:
                for layout in ways_to_lie(shape_of(node, numbers[0]), generator):
                    self.judge(name, node, dict.fromkeys(numbers, layout), generator)

    def judge(self, name, node, arriving, generator):
        """Compare the table and a coded pass with the truth, for one node."""
        where = name, kind(node)
        self.seen[kind(node)] += 1
        number, layout = next(iter(arriving.items()))
        layouts = [arriving.get(k) for k in range(count_outputs(node))]
        truth = reached(node, layouts, generator)
        claims = found = None
        try:
            claims = input_layouts(node, node.next_functions, layout, number)
        except Unknown:
            self.unknown[kind(node)] += 1
            self.needs[kind(node)].add(name)
        except Exception as error:  # any is a fault of the table
            self.wrong[(*where, f"the table fails: {error!r}")] = layouts
        try:
            found = coded(node, layouts, generator, exactly=True)
        except Exception as error:  # any is a fault of the coded pass
            self.wrong[(*where, f"the coded pass fails: {error!r}")] = layouts
        for k, sizes in enumerate(truth):
            if sizes is None:
                continue
            is_apart = bool(((sizes != 0).sum(0) < 2).all())  # so that NaN counts as several samples
            if claims is not None:
                self.claims += 1
                self.compare((*where, "the table"), claims[k], sizes > NOISE, layouts)
                if claims[k] is None and is_apart and layout.n > 1 and isinstance(layout, Layout):
                    self.alarms[kind(node)] += 1
            if found is not None:
                self.compare((*where, "the coded pass"), found[k], sizes > NOISE, layouts)
                if found[k] is None and is_apart:
                    self.alarms_of_codes[kind(node)] += 1

    def compare(self, where, claim, entries, layouts):
        if claim is None:
            return
        try:
            owner = claim.owners(entries.shape[1:], torch.device("cpu")).expand(entries.shape[1:])
        except RuntimeError:
            self.wrong[(*where, "of other shape")] = layouts, claim, entries.shape[1:]
            return
        others = torch.arange(len(entries)).reshape(-1, *[1] * owner.dim()) != owner
        if claim.n != len(entries) or (entries & others).any():
            self.wrong[(*where, "of other samples")] = layouts, claim


def is_differentiable(node, number, dtype):
    """Whether an output of a node's function can have a cotangent of the sweep's."""
    return (dtype.is_floating_point or dtype.is_complex) and 0 not in shape_of(node, number)


def derivatives(out, inputs):
    """The gradients of the inputs, and of the cotangent, as functions of both."""
    seed = torch.ones_like(out, requires_grad=True)
    grads = torch.autograd.grad(out, inputs, seed, create_graph=True, allow_unused=True)
    return [g for g in grads if g is not None and g.requires_grad and g.layout == torch.strided]


def sweep(most, operators=op_db):
    """``most``: sample inputs of each operator."""
    found = Sweep(most=1 if most == 1 else 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated operators and beta features
        for op in operators:
            for out, inputs in outputs(op, 1 if op.name in EXPENSIVE else most, one_by_one=True):
                found.look(op.name, [out])
                if op.supports_gradgrad and op.name not in EXPENSIVE and op.name not in NO_DERIVATIVE:
                    found.look(f"the derivative of {op.name}", derivatives(out, inputs))
        for name, function in BESIDE.items() if operators is op_db else ():
            x = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
            out = function(x)
            found.look(name, [out])
            found.look(f"the derivative of {name}", derivatives(out, [x]))
    return found


def test_claims_are_true_for_one_sample_input_of_each_operator():
    found = sweep(most=1)
    assert not found.wrong
    assert found.graphs > 1000 and found.claims > 10_000
    assert found.alarms.total() < found.claims / 50


@pytest.fixture(scope="module")
def everything():
    return sweep(most=12)


@pytest.mark.slow
def test_claims_are_true_for_many_sample_inputs_of_each_operator(everything):
    assert not everything.wrong
    assert everything.graphs > 6000 and everything.claims > 150_000
    assert everything.alarms.total() < everything.claims / 50


@pytest.mark.slow
def test_each_kind_in_the_table_is_swept(everything):
    assert RULES.keys() - everything.seen.keys() <= UNSEEN.keys()


WRONG = {
    "Cumsum": "cumsum",
    "Convolution": "nn.functional.conv1d",
    "Expand": "expand",
    "Flip": "flip",
    "Mm": "mm",
    "Permute": "permute",
    "Sort": "sort",
    "TriangularSolve": "triangular_solve",
}
"""Kinds of nodes that are not elementwise, each with an operator that has it."""


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_noticed(monkeypatch, name):
    operators = [op for op in op_db if op.name == WRONG[name]]
    assert not sweep(5, operators).wrong
    monkeypatch.setitem(RULES, name, RULES["Relu"])
    assert sweep(5, operators).wrong


def test_a_wrong_coded_pass_is_noticed(monkeypatch):
    operators = [op for op in op_db if op.name in ("flip", "index_select", "mm")]
    monkeypatch.setitem(globals(), "coded", lambda node, layouts, *_, **__: [layouts[0]] * len(node.next_functions))
    assert {name for name, *_ in sweep(5, operators).wrong} >= {"flip", "index_select", "mm"}
