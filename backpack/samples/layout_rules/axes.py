"""Rules for functions that move, split, join, mix or sum up axes."""

from __future__ import annotations

from backpack.graph import kind
from backpack.samples.layout_rules.registry import Output, Unknown, rule
from backpack.samples.layouts import AnyLayout, Layout


@rule("View UnsafeView ReshapeAlias Reshape Unsqueeze Squeeze Flatten Unflatten", several_axes=True)
def reshaped(out: Output) -> AnyLayout | None:
    return out.layout.reshaped(out.shape, out.input_shape(0))


@rule("Permute", several_axes=True)
def permuted(out: Output) -> AnyLayout | None:
    dims = out.axes("dims")
    return out.layout.moved([dims.index(axis) for axis in range(len(dims))])


@rule("Transpose T Adjoint Mt Mh Swapaxes Swapdims", several_axes=True)
def transposed(out: Output) -> AnyLayout | None:
    name, dim = kind(out.node), len(out.shape)
    if name == "T" and dim < 2:
        return out.layout
    one, other = (*out.axes("dim0"), *out.axes("dim1")) if name == "Transpose" else (dim - 2, dim - 1)
    order = list(range(dim))
    order[one], order[other] = other, one
    return out.layout.moved(order)


@rule(
    "Softmax LogSoftmax SafeSoftmax SoftmaxBackwardData LogSoftmaxBackwardData Cumsum Cumprod Logcumsumexp Sort Topk "
    "Slice Split UnsafeSplit SplitWithSizes UnsafeSplitWithSizes FftR2C FftC2C FftC2R"
)
def along_saved_axes(out: Output) -> AnyLayout:
    return out.unless_along(out.axes("dim"))


@rule("Flip Roll")
def flipped_or_rolled(out: Output) -> AnyLayout:
    dims = out.axes("dims")
    if kind(out.node) == "Roll" and not dims:
        raise Unknown
    return out.unless_along(dims)


@rule(
    "ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D"
)
def padded(out: Output) -> AnyLayout:
    pad = out.saved("pad" if kind(out.node) == "ConstantPadNd" else "padding")
    last = len(out.shape) - 1
    return out.unless_along(last - k for k in range(len(pad) // 2) if pad[2 * k] or pad[2 * k + 1])


@rule("ViewAsReal")
def real_parts(out: Output) -> AnyLayout | None:
    """The output has one more axis, of real and imaginary parts."""
    last = len(out.shape) - 1
    return out.unless_along([last]).moved(range(last))


@rule("ViewAsComplex")
def complex_parts(out: Output) -> AnyLayout | None:
    return out.without_axes([len(out.shape)], len(out.shape) + 1)


@rule("Sum Mean Amax Amin Max Min Prod Logsumexp LinalgVectorNorm Norm Std Var StdMean VarMean Median Nansum")
def reduced(out: Output) -> AnyLayout | None:
    """Reductions along some axes; no samples are left after a reduction over all of them."""
    try:
        saved, keep = out.saved("dim"), out.saved("keepdim")
    except AttributeError:
        raise Unknown from None
    if saved is None:
        raise Unknown
    dim = len(out.input_shape(0))
    dims = out.axes("dim", dim) or list(range(dim))
    return out.unless_along(dims) if keep else out.without_axes(dims, dim)


@rule("Select Unbind")
def selected(out: Output) -> AnyLayout | None:
    dim = len(out.shape) + 1
    return out.without_axes(out.axes("dim", dim), dim)


@rule("Stack")
def stacked(out: Output) -> AnyLayout | None:
    (dim,) = out.axes("dim")
    return out.unless_along([dim]).moved([axis for axis in range(len(out.shape)) if axis != dim])


@rule("Cat")
def concatenated(out: Output) -> AnyLayout | list[AnyLayout | None]:
    (dim,) = out.axes("dim")
    layout = out.layout
    if not layout.occupies([dim]):
        return layout
    if not isinstance(layout, Layout) or any(other is None for other, _ in out.edges):
        raise Unknown
    block = layout.n * layout.inner
    sizes = [out.input_shape(k)[dim] for k in range(len(out.edges))]
    if any(size % block or size == 0 for size in sizes):
        raise Unknown
    return [Layout(layout.n, dim, size // block, layout.inner) for size in sizes]


@rule("Repeat")
def repeated(out: Output) -> AnyLayout | None:
    """Each axis of the output counts repetitions, and then entries of the input's."""
    given = out.input_shape(0)
    if 0 in given:
        raise Unknown
    lack = len(out.shape) - len(given)
    sizes = [1] * lack + list(given)
    counted = [size for total, own in zip(out.shape, sizes, strict=True) for size in (total // own, own)]
    found = out.layout.reshaped(out.shape, counted)
    if found is None or found.occupies(range(0, len(counted), 2)):
        return None
    return found.moved([2 * axis + 1 for axis in range(lack, len(sizes))])
