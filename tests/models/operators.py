"""PyTorch's own database of operators."""

import torch
from torch.utils._pytree import tree_leaves, tree_map


def outputs(op, most, one_by_one=False):
    """Differentiable outputs of an operator at some of the database's samples, and the inputs.

    ``one_by_one``: also where only one of the inputs requires a gradient.
    """
    dtypes = op.supported_backward_dtypes("cpu") if op.supports_autograd else ()
    dtype = next((d for d in (torch.float64, torch.complex128) if d in dtypes), None)
    samples = [] if dtype is None else list(op.sample_inputs_func(op, "cpu", dtype, True))
    samples.sort(key=lambda sample: not 1 < sum(map(entries, tree_leaves(sample.input))) < 200)
    step = max(1, -(-len(samples) // most))
    for sample in samples[::step]:
        arguments = (sample.input, *sample.args)
        inputs = [t for t in tree_leaves((arguments, sample.kwargs)) if isinstance(t, torch.Tensor) and t.requires_grad]
        yield from differentiable(op(*arguments, **sample.kwargs), inputs)
        for chosen in inputs if one_by_one and len(inputs) > 1 else ():
            own = [tree_map(lambda t: t.detach() if any(t is i for i in inputs) and t is not chosen else t, value)  # noqa: B023
                   for value in (arguments, sample.kwargs)]  # fmt: skip
            yield from differentiable(op(*own[0], **own[1]), [chosen])


def entries(value):
    return value.numel() if isinstance(value, torch.Tensor) else 0


def differentiable(outs, inputs):
    for out in tree_leaves(outs):
        is_one = isinstance(out, torch.Tensor) and out.requires_grad and out.is_floating_point()
        if is_one and out.layout == torch.strided and out.numel():
            yield out, inputs
