"""Rules for functions that compute each entry from the entries at the same place, or expanded to it."""

from __future__ import annotations

from collections.abc import Sequence

from backpack.samples.layout_rules.registry import Output, rule
from backpack.samples.layouts import AnyLayout

_ELEMENTWISE = """
Abs Acos Acosh Alias Angle Asin Asinh Atan Atanh BernoulliDropout Ceil Celu Clone Conj
ConjPhysical Cos Cosh Deg2Rad Detach Digamma Elu EluBackward Erf Erfc Erfinv Exp Exp2 Expm1 Floor Frac Gelu
GeluBackward Hardshrink HardshrinkBackward Hardsigmoid HardsigmoidBackward Hardswish HardswishBackward Hardtanh
HardtanhBackward I0 Imag LeakyRelu LeakyReluBackward Lgamma LogSigmoid LogSigmoidBackward Log Log10 Log1P Log2 Logit
Mish MishBackward NanToNum NativeDropout NativeDropoutBackward Neg Positive Rad2Deg Real Reciprocal Relu ResolveConj
ResolveNeg Round Rsqrt Selu Sgn Sigmoid SigmoidBackward Sign Silu SiluBackward Sin Sinc Sinh Softplus
SoftplusBackward Softshrink SoftshrinkBackward Sqrt Square Tan Tanh TanhBackward Threshold ThresholdBackward ToCopy
Trunc Zero
"""


@rule(_ELEMENTWISE, several_axes=True)
def elementwise(out: Output) -> AnyLayout:
    """Each input has the shape of the output."""
    return out.layout


@rule(
    "Add Sub Rsub Mul Div Pow Where MaskedFill Maximum Minimum Fmax Fmin Atan2 Lerp Addcmul Addcdiv Fmod Remainder "
    "Clamp ClampMin ClampMax Copysign Hypot Xlogy Special_Xlog1Py Logaddexp Logaddexp2 Expand Polar Complex "
    "FloorDivide Heaviside Nextafter BinaryCrossEntropyWithLogits"
)
def expanded(out: Output) -> list[AnyLayout | None]:
    return out.each(lambda k: broadcast(out, k))


def broadcast(out: Output, k: int) -> AnyLayout | None:
    """The layout of input ``k``, which was expanded to the output's shape."""
    return broadcast_from(out.input_shape(k), out.layout, out.shape)


def broadcast_from(given: Sequence[int], layout: AnyLayout, shape: Sequence[int]) -> AnyLayout | None:
    """Where the samples lie in a tensor of shape ``given`` that was expanded to a shape with this layout."""
    lack = len(shape) - len(given)
    lost = [axis for axis in range(len(shape)) if axis < lack or given[axis - lack] != shape[axis]]
    return None if layout.occupies(lost) else layout.moved(range(lack, len(shape)))
