"""What a kind of node, its shapes and the numbers that it saved prove about the samples in its inputs.

A rule is given where the samples lie in the output of a function, and says where they lie in each input: an input's
entry belongs to a sample if its cotangent comes from entries of that sample alone. Nothing is computed. What no rule
knows is left to the coded pass (``coded_pass.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from backpack.graph import kind, shape_of, signed
from backpack.samples.layouts import AnyLayout, Layout, found_layout
from backpack.torch_internals import is_packed


class Unknown(Exception):
    """A node, the shapes or the saved numbers do not tell."""


class At:
    """A node, where the samples lie in the outputs of its function, and which of these was reached."""

    __slots__ = ("_shape", "edges", "layout", "node", "number")

    def __init__(self, node: Node, edges: Sequence[Any], layout: AnyLayout, number: int) -> None:
        self.node, self.edges, self.layout, self.number = node, edges, layout, number
        self._shape: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output."""
        if self._shape is None:
            self._shape = shape_of(self.node, self.number)
        return self._shape

    def given(self, k: int) -> tuple[int, ...]:
        """The shape of input ``k``."""
        node, number = self.edges[k]
        return shape_of(node, number)

    def saved(self, name: str) -> Any:
        """A number, or numbers, that the node saved."""
        return getattr(self.node, f"_saved_{name}")

    def axes(self, name: str, dim: int) -> list[int]:
        """Saved axes of a tensor with ``dim`` of them; negative ones are counted from the end."""
        found = self.saved(name)
        return [signed(axis) % max(1, dim) for axis in (found if isinstance(found, (tuple, list)) else [found])]

    def indices(self, name: str) -> list[Any]:
        """Saved tensors of indices, unless they would have to be computed again."""
        raw = getattr(self.node, f"_raw_saved_{name}")
        if any(map(is_packed, raw if isinstance(raw, (tuple, list)) else [raw])):
            raise Unknown
        found = self.saved(name)
        if found is None:  # no edge of the node needs them
            raise Unknown
        return [index if index is None else index.cpu() for index in ([found] if isinstance(found, Tensor) else found)]

    def each(self, rule: Callable[[int], AnyLayout | None]) -> list[AnyLayout | None]:
        """The rule, for each input that has an edge."""
        return [None if other is None else rule(k) for k, (other, _) in enumerate(self.edges)]


Rule = Callable[[At], "AnyLayout | None | Sequence[AnyLayout | None]"]
"""Where the samples lie in each input; ``None``: some entry belongs to several. One layout: that of all inputs."""

RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for kinds of nodes."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def spread(node: Node, edges: Sequence[Any], layout: AnyLayout, number: int) -> Sequence[AnyLayout | None]:
    """Where the samples lie in each input of a function, of whose output ``number`` this is the layout.

    Raises:
        Unknown: Only a coded pass can tell.
    """
    name = kind(node)
    if name in SAME:
        return [layout] * len(edges)
    found = RULES.get(name)
    if found is None or (len(layout.axes) > 1 and found not in OF_SEVERAL_AXES):
        raise Unknown
    at = At(node, edges, layout, number)
    layouts = found(at)
    return [layouts] * len(edges) if layouts is None or isinstance(layouts, AnyLayout) else layouts


_ELEMENTWISE = """
Abs Acos Acosh Alias Angle Asin Asinh Atan Atanh BernoulliDropout Ceil Celu    Clone Conj
ConjPhysical Cos Cosh Deg2Rad Detach Digamma Elu EluBackward Erf Erfc Erfinv Exp Exp2 Expm1  Floor Frac Gelu
GeluBackward Hardshrink HardshrinkBackward Hardsigmoid HardsigmoidBackward Hardswish HardswishBackward Hardtanh
HardtanhBackward I0 Imag LeakyRelu LeakyReluBackward Lgamma LogSigmoid LogSigmoidBackward Log Log10 Log1P Log2 Logit
Mish MishBackward NanToNum NativeDropout NativeDropoutBackward Neg Positive Rad2Deg Real Reciprocal Relu ResolveConj
ResolveNeg Round Rsqrt Selu Sgn Sigmoid SigmoidBackward Sign Silu SiluBackward Sin Sinc Sinh Softplus
SoftplusBackward Softshrink SoftshrinkBackward Sqrt Square Tan Tanh TanhBackward Threshold ThresholdBackward ToCopy
Trunc Zero
"""

SAME = frozenset(_ELEMENTWISE.split())
"""Elementwise functions: each input has the shape of the output."""


def broadcast(at: At, k: int) -> AnyLayout | None:
    """Of an input that was expanded to the output's shape, and added up along the axes that it lacks."""
    return onto(at.layout, at.shape, at.given(k))


def onto(layout: AnyLayout, shape: Sequence[int], given: Sequence[int]) -> AnyLayout | None:
    """Where the samples lie in a tensor that was expanded from one shape to another."""
    lack = len(shape) - len(given)
    lost = [axis for axis in range(len(shape)) if axis < lack or given[axis - lack] != shape[axis]]
    return None if layout.occupies(lost) else layout.moved(range(lack, len(shape)))


@rule(
    "Add Sub Rsub Mul Div Pow Where MaskedFill Maximum Minimum Fmax Fmin Atan2 Lerp Addcmul Addcdiv Fmod Remainder "
    "Clamp ClampMin ClampMax "
    "Copysign Hypot Xlogy Special_Xlog1Py Logaddexp Logaddexp2 Expand Polar Complex FloorDivide Heaviside Nextafter "
    "BinaryCrossEntropyWithLogits"
)
def expanded(at: At) -> list[AnyLayout | None]:
    return at.each(lambda k: broadcast(at, k))


@rule("View UnsafeView ReshapeAlias Reshape Unsqueeze Squeeze Flatten Unflatten")
def reshaped(at: At) -> AnyLayout | None:
    return at.layout.reshaped(at.shape, at.given(0))


@rule("Permute")
def permuted(at: At) -> AnyLayout | None:
    dims = at.axes("dims", len(at.shape))
    return at.layout.moved([dims.index(axis) for axis in range(len(dims))])


@rule("Transpose T Adjoint Mt Mh Swapaxes Swapdims")
def transposed(at: At) -> AnyLayout | None:
    dim = len(at.shape)
    order = list(range(dim))
    one, other = (dim - 2, dim - 1) if kind(at.node) != "Transpose" else (*at.axes("dim0", dim), *at.axes("dim1", dim))
    if kind(at.node) == "T" and dim < 2:
        return at.layout
    order[one], order[other] = other, one
    return at.layout.moved(order)


def apart(at: At, dims: Iterable[int]) -> AnyLayout:
    """The same, if no samples lie along the axes within which the function mixes or moves entries."""
    if at.layout.occupies(list(dims)):
        raise Unknown
    return at.layout


@rule("Softmax LogSoftmax SafeSoftmax Cumsum Cumprod Logcumsumexp Sort Topk Slice Split UnsafeSplit")
def along_an_axis(at: At) -> AnyLayout:
    return apart(at, at.axes("dim", len(at.shape)))


@rule("SplitWithSizes UnsafeSplitWithSizes")
def parts_of_an_axis(at: At) -> AnyLayout:
    return apart(at, at.axes("dim", len(at.shape)))


@rule("SoftmaxBackwardData LogSoftmaxBackwardData")
def derivative_along_an_axis(at: At) -> AnyLayout:
    return apart(at, at.axes("dim", len(at.shape)))


@rule("Gather")
def gathered(at: At) -> AnyLayout | None:
    (dim,) = at.axes("dim", len(at.shape))
    given = at.given(0)
    if len(given) != len(at.shape):
        raise Unknown
    if any(size != own for axis, (size, own) in enumerate(zip(at.shape, given, strict=True)) if axis != dim):
        raise Unknown
    if not at.layout.occupies([dim]):
        return at.layout
    index, owner = _aligned(at, dim)
    sizes = [given[axis] if axis == dim else size for axis, size in enumerate(index.shape)]
    found = torch.full(sizes, -1).scatter_(dim, index, owner)
    is_alone = torch.equal(found.gather(dim, index), owner)
    return found_layout(at.layout.n, found, exactly=True) if is_alone else None


@rule("ScatterAdd")
def scattered_sum(at: At) -> list[AnyLayout | None]:
    """Entries of a source are added to those of a tensor along an axis."""
    (dim,) = at.axes("dim", len(at.shape))
    layout = at.layout
    if at.edges[1][0] is None:
        return [layout, None]
    if any(size != own for axis, (size, own) in enumerate(zip(at.shape, at.given(1), strict=True)) if axis != dim):
        raise Unknown
    if not layout.occupies([dim]):
        return [layout, layout]
    if at.indices("index")[0].shape != at.given(1):
        raise Unknown
    index, owner = _aligned(at, dim)
    return [layout, found_layout(layout.n, owner.gather(dim, index), exactly=True)]


def _aligned(at: At, dim: int) -> tuple[Tensor, Tensor]:
    """Saved indices along an axis, and the owners of the output's entries, with as many entries along all others.

    That is one where both are the same along an axis.
    """
    (index,) = at.indices("index")
    owner = at.layout.owners(at.shape, torch.device("cpu"))
    sizes = list(owner.shape)
    for axis, size in enumerate(index.shape):
        if axis != dim and owner.shape[axis] == 1 and size and index.stride(axis) == 0:
            index = index.narrow(axis, 0, 1)
        elif axis != dim:
            sizes[axis] = size
    return index, owner.expand(sizes)


@rule("Index")
def indexed(at: At) -> AnyLayout | None:
    """Rows that are picked by indices of the first axes."""
    given = at.indices("indices")
    indices = tuple(index for index in given if index is not None)
    if any(index is None for index in given[: len(indices)]):
        raise Unknown
    return _picked(at, indices, 0)


@rule("IndexSelect")
def selected_rows(at: At) -> AnyLayout | None:
    """Rows that are picked along an axis."""
    (dim,) = at.axes("dim", len(at.shape))
    if not at.shape or not at.layout.occupies([dim]):
        return at.layout
    return _picked(at, tuple(at.indices("index")), dim)


def _picked(at: At, indices: tuple[Tensor, ...], dim: int) -> AnyLayout | None:
    """Where the samples lie in a tensor of which rows were picked, by indices along ``dim`` and the axes behind."""
    given = at.given(0)
    taken = sum(index.dim() if index.dtype == torch.bool else 1 for index in indices)
    lead = len(at.shape) - len(given) + taken
    owner = at.layout.owners(at.shape, torch.device("cpu"))
    owner = owner.expand(*owner.shape[:dim], *at.shape[dim : dim + lead], *owner.shape[dim + lead :])
    sizes = [*owner.shape[:dim], *given[dim : dim + taken], *owner.shape[dim + lead :]]
    place: Any = (*[slice(None)] * dim, *indices)
    found = torch.full(sizes, -1)
    found[place] = owner
    return found_layout(at.layout.n, found, exactly=True) if torch.equal(found[place], owner) else None


@rule("IndexAdd")
def rows_added(at: At) -> list[AnyLayout | None]:
    """Rows of a source are added to those of a tensor along an axis."""
    layout = at.layout
    (dim,) = at.axes("dim", len(at.shape))
    source: AnyLayout | None = layout
    if layout.occupies([dim]) and at.edges[1][0] is not None:
        owner = layout.owners(at.shape, torch.device("cpu")).index_select(dim, *at.indices("index"))
        source = found_layout(layout.n, owner, exactly=True)
    return [layout, source]


@rule("FftR2C FftC2C FftC2R")
def spectrum(at: At) -> AnyLayout:
    return apart(at, at.axes("dim", len(at.shape)))


@rule("ViewAsReal")
def real_parts(at: At) -> AnyLayout | None:
    """The output has an axis more, of real and imaginary parts."""
    return apart(at, [len(at.shape) - 1]).moved(range(len(at.shape) - 1))


@rule("ViewAsComplex")
def complex_parts(at: At) -> AnyLayout | None:
    return at.layout.moved([*range(len(at.shape)), None])


@rule("Flip Roll")
def along_axes(at: At) -> AnyLayout:
    dims = at.axes("dims", len(at.shape))
    if kind(at.node) == "Roll" and not dims:
        raise Unknown
    return apart(at, dims)


@rule(
    "ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D"
)
def padded(at: At) -> AnyLayout:
    pad = at.saved("pad" if kind(at.node) == "ConstantPadNd" else "padding")
    last = len(at.shape) - 1
    return apart(at, [last - k for k in range(len(pad) // 2) if pad[2 * k] or pad[2 * k + 1]])


@rule("Sum Mean Amax Amin Max Min Prod Logsumexp LinalgVectorNorm Norm Std Var StdMean VarMean Median Nansum")
def reduced(at: At) -> AnyLayout | None:
    """Reductions along some axes; over all of them there are no samples left."""
    try:
        saved, keep = at.saved("dim"), at.saved("keepdim")
    except AttributeError:
        raise Unknown from None
    given = at.given(0)
    if saved is None:
        raise Unknown
    dims = at.axes("dim", len(given)) or list(range(len(given)))
    if keep:
        return apart(at, dims)
    left = iter(range(len(at.shape)))
    return at.layout.moved([None if axis in dims else next(left) for axis in range(len(given))])


@rule("Select Unbind")
def selected(at: At) -> AnyLayout | None:
    """An axis is gone in the output."""
    given = at.given(0)
    (dim,) = at.axes("dim", len(given))
    left = iter(range(len(at.shape)))
    return at.layout.moved([None if axis == dim else next(left) for axis in range(len(given))])


@rule("Stack")
def stacked(at: At) -> AnyLayout | None:
    (dim,) = at.axes("dim", len(at.shape))
    apart(at, [dim])
    return at.layout.moved([axis for axis in range(len(at.shape)) if axis != dim])


@rule("Cat")
def concatenated(at: At) -> AnyLayout | list[AnyLayout | None]:
    (dim,) = at.axes("dim", len(at.shape))
    layout = at.layout
    if not layout.occupies([dim]):
        return layout
    if not isinstance(layout, Layout) or any(other is None for other, _ in at.edges):
        raise Unknown
    found: list[AnyLayout | None] = []
    block = layout.n * layout.inner
    for k in range(len(at.edges)):
        size = at.given(k)[dim]
        if size % block or size == 0:
            raise Unknown
        found.append(Layout(layout.n, dim, size // block, layout.inner))
    return found


@rule("Repeat")
def repeated(at: At) -> AnyLayout | None:
    """Each axis of the output counts repetitions, and then entries of the input's."""
    given = at.given(0)
    lack = len(at.shape) - len(given)
    sizes = [1] * lack + list(given)
    apart_ = [size for total, own in zip(at.shape, sizes, strict=True) for size in (total // max(1, own), own)]
    if 0 in sizes:
        raise Unknown
    found = at.layout.reshaped(at.shape, apart_)
    if found is None or found.occupies(range(0, len(apart_), 2)):
        return None
    return found.moved([2 * axis + 1 for axis in range(lack, len(sizes))])


# ---------------------------------------------------------------------------------------------------------------
# Products


def _product(at: At, left: int, right: int, batched: int) -> dict[int, AnyLayout | None]:
    """``[*b, r, i] @ [*b, i, c]``: inputs ``left`` and ``right``."""
    row, column = batched, batched + 1
    layout = at.layout
    first = None if layout.occupies([column]) else layout
    second = None if layout.occupies([row]) else layout
    return {left: first, right: second}


@rule("Mm")
def matrix_product(at: At) -> list[AnyLayout | None]:
    found = _product(at, 0, 1, 0)
    return [found[0], found[1]]


@rule("Addmm")
def sum_with_product(at: At) -> list[AnyLayout | None]:
    found = _product(at, 1, 2, 0)
    bias = at.edges[0][0]
    if bias is None or (at.layout.axes == [0] and len(at.given(0)) < 2):
        return [None, found[1], found[2]]
    return [broadcast(at, 0), found[1], found[2]]


@rule("Bmm")
def batched_product(at: At) -> list[AnyLayout | None]:
    found = _product(at, 0, 1, 1)
    return [found[0], found[1]]


@rule("GroupedMm")
def grouped_product(at: At) -> list[AnyLayout | None]:
    """``[r, i] @ [e, i, o]``: each row is multiplied by one of the matrices."""
    if at.layout.occupies([1]) or len(at.shape) != 2 or len(at.saved("mat2_sym_sizes")) != 3:
        raise Unknown
    return [at.layout, *[None] * (len(at.edges) - 1)]


@rule("Baddbmm")
def sum_with_batched_product(at: At) -> list[AnyLayout | None]:
    found = _product(at, 1, 2, 1)
    return [None if at.edges[0][0] is None else broadcast(at, 0), found[1], found[2]]


@rule("Mv")
def product_with_vector(at: At) -> list[AnyLayout | None]:
    """``[r, i] @ [i]``: a row belongs to a sample, the vector to all."""
    return [at.layout.moved([0, None]), None]


def is_bilinear(node: Node) -> bool:
    """Whether a node is that of ``F.bilinear``, rather than of one of its derivatives."""
    saved = ([1, 3], [0], [1, 2], [2, 3])
    names = ("expand1", "expand2", "expand3", "sumdim")
    return all(list(getattr(node, f"_saved_{name}")) == axes for name, axes in zip(names, saved, strict=True))


@rule("Trilinear")
def trilinear(at: At) -> list[AnyLayout | None]:
    """The first axis of the output is a sample's in the first and the last input, as ``bilinear`` has it."""
    if at.layout.axes != [0] or not is_bilinear(at.node):
        raise Unknown
    return [
        None if at.edges[0][0] is None else at.layout.moved([0, *[None] * (len(at.given(0)) - 1)]),
        None,
        None if at.edges[2][0] is None else at.layout.moved([0, *[None] * (len(at.given(2)) - 1)]),
    ]


@rule("Convolution")
def convolution(at: At) -> list[AnyLayout | None]:
    layout = at.layout
    if not layout.occupies(range(1, len(at.shape))):
        return [layout, None, None]
    if not isinstance(layout, Layout) or layout.axis != 1:
        raise Unknown
    # Samples are groups of channels.
    groups = at.saved("groups")
    outputs = at.shape[1] // groups
    inputs = at.saved("input").shape[1] // groups
    if layout.inner % outputs:
        raise Unknown
    inner = layout.inner // outputs
    weight: AnyLayout = Layout(layout.n, 0, layout.outer, inner * (inputs if at.saved("transposed") else outputs))
    return [Layout(layout.n, 1, layout.outer, inner * inputs), weight, Layout(layout.n, 0, layout.outer, layout.inner)]


@rule("Embedding")
def embedding(at: At) -> list[AnyLayout | None]:
    return [None]


@rule("EmbeddingBag")
def embedding_bag(at: At) -> list[AnyLayout | None]:
    if len(at.edges) > 1 and any(other is not None for other, _ in at.edges[1:]):
        raise Unknown
    return [None] * len(at.edges)


# ---------------------------------------------------------------------------------------------------------------
# Layers


@rule("NativeLayerNorm FusedRmsNorm")
def layer_norm(at: At) -> list[AnyLayout | None]:
    normalized = len(at.saved("normalized_shape"))
    layout = apart(at, range(len(at.shape) - normalized, len(at.shape)))
    return [layout, *[None] * (len(at.edges) - 1)]


@rule("NativeGroupNorm")
def group_norm(at: At) -> list[AnyLayout | None]:
    return [apart(at, range(1, len(at.shape))), None, None]


@rule("NativeBatchNorm CudnnBatchNorm MiopenBatchNorm BatchNormWithUpdate")
def batch_norm(at: At) -> list[AnyLayout | None]:
    """With statistics of the batch, channels stay apart, and several samples in one channel are mixed."""
    others = [axis for axis in range(len(at.shape)) if axis != 1]
    is_one_sample = isinstance(at.layout, Layout) and at.layout.n == 1
    stored = kind(at.node) == "NativeBatchNorm" and not at.saved("training")
    along_channels = not at.layout.occupies(others)
    channels = at.layout.moved([1]) if along_channels else None
    if along_channels:
        return [at.layout, channels, channels]
    return [at.layout if stored or is_one_sample else None, None, None]


@rule("PreluKernel")
def prelu(at: At) -> list[AnyLayout | None]:
    return [at.layout, None if at.edges[1][0] is None else broadcast(at, 1)]


_SPATIAL = {"1D": 1, "2D": 2, "3D": 3}


@rule(
    " ".join(
        name.replace("*", size)
        for size in _SPATIAL
        for name in [
            "MaxPool*WithIndices",
            "AvgPool*",
            "AdaptiveAvgPool*",
            "AdaptiveMaxPool*",
            "UpsampleNearest*",
            "UpsampleNearestExact*",
            "UpsampleLinear*",
            "UpsampleBilinear*",
            "UpsampleBicubic*",
            "UpsampleTrilinear*",
            "MkldnnMaxpool*",
        ]
    )
    + " MaxPool2D PixelShuffle PixelUnshuffle"
)
def pooled(at: At) -> AnyLayout:
    """Positions are mixed, channels and images are not."""
    size = next((number for suffix, number in _SPATIAL.items() if suffix in kind(at.node)), 3)
    return apart(at, range(len(at.shape) - size, len(at.shape)))


@rule(
    "ScaledDotProductFlashAttentionForCpu ScaledDotProductEfficientAttention ScaledDotProductFlashAttention "
    "ScaledDotProductCudnnAttention ScaledDotProductFusedAttentionOverrideable"
)
def attention(at: At) -> list[AnyLayout | None]:
    """``[b, heads, positions, channels]`` of query, key and value; a bias is expanded."""
    if at.layout.occupies([2]) and not at.layout.occupies([1, 3]):
        return _attention_along_positions(at)
    layout = apart(at, range(1, len(at.shape)))
    rest = at.each(lambda k: None if k < 3 else onto(layout, (*at.shape[:3], 0), (*at.given(k)[:-1], 0)))
    return [layout, layout, layout, *rest[3:]]


def _attention_along_positions(at: At) -> list[AnyLayout | None]:
    """Samples along the queries' positions: a key belongs to that of all queries from which no mask keeps it apart."""
    if any(other is not None for other, _ in at.edges[3:]) or kind(at.node) != "ScaledDotProductFlashAttentionForCpu":
        raise Unknown
    (mask,) = at.indices("attn_mask") if at.saved("attn_mask") is not None else (None,)
    queries, keys = at.shape[2], at.given(1)[2]
    is_seen = torch.ones(1, queries, keys, dtype=torch.bool)
    if at.saved("is_causal"):
        is_seen = is_seen.tril()
    if mask is not None:
        allowed = mask if mask.dtype == torch.bool else mask > -torch.inf
        is_seen = is_seen & allowed.reshape(-1, *allowed.shape[-3:]).any(1) if allowed.dim() > 2 else is_seen & allowed
    owner = at.layout.owners(at.shape, torch.device("cpu"))[:, 0, :, 0].expand(-1, queries)
    rows = max(len(owner), len(is_seen))
    owner, is_seen = owner.expand(rows, -1), is_seen.expand(rows, -1, -1)
    given = owner.unsqueeze(2).expand_as(is_seen)
    largest = given.where(is_seen, -1).amax(1)
    smallest = given.where(is_seen & (given >= 0), at.layout.n).amin(1)
    if bool(((largest >= 0) & (smallest != largest)).any()):
        raise Unknown  # numbers that are small enough mask as well
    layout = found_layout(at.layout.n, largest[:, None, :, None], exactly=True)
    return [at.layout, layout, layout, *[None] * (len(at.edges) - 3)]


@rule("MkldnnRnnLayer")
def recurrent(at: At) -> list[AnyLayout | None]:
    """One direction of a layer, ``[t, n, ...]``: input, weights, and states ``[..., n, h]``."""
    if at.number != 0 or at.layout.axes != [1]:
        raise Unknown
    states = [
        None if other is None else at.layout.moved([None, 1, None][3 - len(at.given(k)) :])
        for k, (other, _) in enumerate(at.edges)
        if k > 4
    ]
    return [at.layout, None, None, None, None, *states]


# ---------------------------------------------------------------------------------------------------------------
# Losses


@rule("NllLoss")
def nll_loss(at: At) -> list[AnyLayout | None]:
    return [at.layout.moved([*range(len(at.shape)), None]) if at.shape else _lost(at)]


@rule("NllLoss2D")
def nll_loss_2d(at: At) -> list[AnyLayout | None]:
    return [at.layout.moved([0, None, *range(1, len(at.shape))]) if at.shape else _lost(at)]


@rule("MseLoss L1Loss SmoothL1Loss HuberLoss BinaryCrossEntropy KlDiv")
def elementwise_loss(at: At) -> list[AnyLayout | None]:
    return at.each(lambda k: broadcast(at, k)) if at.shape else _lost(at)


def _lost(at: At) -> Any:
    """A loss that is a single number."""
    raise Unknown


OF_SEVERAL_AXES: frozenset[Rule] = frozenset(
    (reshaped, permuted, transposed, indexed, selected_rows, rows_added, gathered, scattered_sum, attention)
)
"""Rules that also tell of samples along several axes."""
