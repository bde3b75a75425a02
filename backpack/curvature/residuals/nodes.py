"""Facts about nodes that their names tell; for all other nodes, PyTorch's second derivatives tell."""

from __future__ import annotations

from collections.abc import Iterable

from torch.autograd.graph import Node

from backpack.graph import is_complex, kind, signed

_PIECEWISE_LINEAR = """
Abs AdaptiveAvgPool1D AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Add Alias Amax Amin
AsStrided AvgPool1D AvgPool2D AvgPool3D Cat Ceil Clamp ClampMax ClampMin Clone Col2Im Complex Conj ConjPhysical
ConstantPadNd Copy Cumsum Diagonal Embedding Expand FftC2C FftC2R FftR2C Flip Floor Gather Hardshrink Hardsigmoid
Hardtanh Im2Col Imag Index IndexSelect LeakyRelu MaskedFill Max MaxPool2DWithIndices MaxPool3DWithIndices Maximum Mean
Min Minimum Narrow NativeDropout Neg Permute PreluKernel Real ReflectionPad1D ReflectionPad2D ReflectionPad3D Relu
Repeat ReplicationPad1D ReplicationPad2D ReplicationPad3D ReshapeAlias ResolveConj Roll Round Rsub Select Sign Slice
Softshrink Split SplitWithSizes Squeeze Stack Sub Sum T Threshold ToCopy Transpose Tril Triu Unbind Unfold UnsafeSplit
UnsafeView Unsqueeze UpsampleBicubic2D UpsampleBilinear2D UpsampleNearest1D UpsampleNearest2D View ViewAsComplex
ViewAsReal Where
"""
_ELEMENTWISE = """
Acos Acosh Asin Asinh Atan Atan2 Atanh Celu Cos Cosh Digamma Div Elu Erf Erfc Erfinv Exp Exp2 Expm1 Gelu Hardswish
Hypot I0 Lgamma Log Log10 Log1P Log2 LogSigmoid Logaddexp Logaddexp2 Logit Mish Mul Pow Reciprocal RreluWithNoise
Rsqrt Sigmoid Silu Sin Sinc Sinh Softplus Sqrt Square Tan Tanh Xlogy
"""

FLAT = frozenset(_PIECEWISE_LINEAR.split())
"""Piecewise linear in real numbers. (Other linear nodes are found out as well, but that takes time.)"""

BILINEAR = frozenset(["Addmm", "Addmv", "Baddbmm", "Bmm", "Convolution", "Dot", "Linear", "Mm", "Mul", "Mv"])
"""Linear in each operand: flat where only one of them is data."""

ELEMENTWISE = frozenset(_ELEMENTWISE.split())
"""Entry by entry: an output depends on the entries of the operands at its place only."""

WRONG_THIRD = frozenset(["NativeLayerNorm", "SpecialI1", "SpecialI1E"])
"""PyTorch's third derivatives of these are wrong: their double backward takes saved tensors for constants."""

WRONG_SECOND = "WeightNormInterface"
"""PyTorch's second derivatives of this are wrong: they take the norms for constants."""

FUSED = (
    *("ScaledDotProduct", "CudnnRnn", "MiopenRnn", "MkldnnRnnLayer", "ThnnFusedLstmCell", "ThnnFusedGruCell"),
    "CompiledFunction",
    WRONG_SECOND,
)
"""How the names of nodes begin that have no second derivatives in PyTorch, or wrong ones, but can be replaced."""


BATCH_NORM = ("NativeBatchNorm", "CudnnBatchNorm")


def has_wrong_second(nodes: Iterable[Node]) -> bool:
    """Whether PyTorch's second derivatives of one of the nodes are wrong."""
    return any(kind(node) == WRONG_SECOND for node in nodes)


def is_fused_node(node: Node) -> bool:
    """Whether there is a replacement for the function, which has no second derivatives, or wrong ones."""
    return node.name().startswith(FUSED)


def is_batch_norm(node: Node) -> bool:
    """Whether a node normalizes by statistics of its input: of a batch, or of a sample, as instance normalization."""
    return kind(node) in BATCH_NORM and bool(node._saved_training)  # type: ignore[attr-defined]


def is_flat(node: Node, inputs: int) -> bool:
    """Whether the second derivatives of a node with respect to so many of its inputs are known to be zero."""
    name = kind(node)
    if name in BATCH_NORM:
        return not node._saved_training  # type: ignore[attr-defined]
    if name == "Abs" and is_complex(node):
        return False
    return name in FLAT or (name in BILINEAR and inputs == 1)


def is_bilinear(node: Node) -> bool:
    """Whether a node is linear in each of its operands."""
    return kind(node) in BILINEAR


def positions_of(node: Node, dims: int) -> tuple[int, ...] | None:
    """The axes of the inputs along which entries interact; ``None``: all may."""
    name = kind(node)
    if name in ELEMENTWISE:
        return ()
    if name in ("Softmax", "LogSoftmax", "SafeSoftmax"):
        return (signed(node._saved_dim) % dims,)  # type: ignore[attr-defined]
    if name == "NativeLayerNorm":
        return tuple(range(dims - len(node._saved_normalized_shape), dims))  # type: ignore[attr-defined]
    return None
