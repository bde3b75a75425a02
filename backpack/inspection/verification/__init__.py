"""Check extensions on a user's own model, against plain autograd on a few entries and samples."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from backpack.dataset.batch_contents import apply
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.inspection.verification import kronecker_factors as kronecker_factors  # they register checks
from backpack.inspection.verification import positive_curvature as positive_curvature
from backpack.inspection.verification.computation import SEED, Results
from backpack.inspection.verification.plain_autograd import Forward, PlainAutograd
from backpack.inspection.verification.verdicts import Verification, verdicts
from backpack.samples import SampleIds


def verify(
    model: Module,
    lossfunc: Module,
    inputs: Any,
    targets: Any,
    *extensions: BackpropExtension,
    forward: Forward | None = None,
    sample_ids: Any = None,
    entries: int = 3,
    tolerance: float | None = None,
) -> Verification:
    """Compare results of extensions with plain autograd, on your model and one batch; prints a table.

    The comparison covers a few entries of each parameter, a few samples for norms and dot products, and a few rows and
    columns of Kronecker factors and eigenbases. Sampled quantities (``*MC``) are compared given the columns that were
    drawn; these must have the loss's Hessian as their second moment, within some standard errors. An extension of your
    own, of first order, is compared with what its ``compute`` returns for individual gradients by plain autograd.
    Extensions that nothing else is known of are computed, but not compared. Everything runs on copies, in float64 if
    the model allows it::

        outcome = verify(model, torch.nn.CrossEntropyLoss(), X, y, BatchGrad(), KFAC())
        assert outcome.passed

    Args:
        model: Any model, extended or not; it is left as it is. If its output is no tensor, the loss takes its
            ``logits``, or else its first tensor.
        lossfunc: A loss, called with the model's output and the targets.
        inputs: A tensor, or all arguments of the model as a tuple or dictionary.
        targets: The second argument of the loss.
        extensions: The extensions to verify.
        forward: A function of the model and ``(inputs, targets)`` that returns the two arguments of the loss, where
            those above do not fit.
        sample_ids: Which sample each leading entry of the output belongs to, as ``backpack`` takes it.
        entries: How many entries of each parameter are compared.
        tolerance: Relative error that counts as rounding; default ``1e-6`` in float64, ``1e-2`` otherwise.

    Returns:
        One row for each parameter and quantity, with the error relative to the largest true value that is compared, and
        a verdict: ``right``, ``wrong``, or, with the reason, ``refused`` or ``not compared``. ``passed`` says whether
        nothing was wrong or refused.

    Raises:
        TypeError: The first argument of the loss is no tensor, or the inputs hold none.
        ValueError: No extension is given, or the samples cannot be told apart in the output.
    """
    if not extensions:
        raise ValueError("verify() needs the extensions to verify, for example BatchGrad().")
    forward = forward or apply
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    model, lossfunc, batch, is_double = _copied(model, lossfunc, (inputs, targets), forward)
    if tolerance is None:
        tolerance = 1e-6 if is_double else 1e-2
    # The other kernels of attention have no second derivative.
    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(SEED)
        ids = None if sample_ids is None else SampleIds(sample_ids)
        plain = PlainAutograd(model, lossfunc, batch, forward, entries, ids)
        computed = [Results(plain, extension) for extension in extensions]
        outcome = Verification([row for results in computed for row in verdicts(results, tolerance)])
    print(outcome)
    return outcome


def _copied(model: Module, lossfunc: Module, batch: Any, forward: Forward) -> tuple[Module, Module, Any, bool]:
    """Copies of model, loss and batch; in float64, if the model runs in it and has a finite gradient."""
    try:
        wide = copy.deepcopy(model).double()._apply(lambda t: t.cdouble() if t.is_complex() else t)
        wide_loss, wide_batch = copy.deepcopy(lossfunc).double(), tree_map(_double, batch)
        tried = copy.deepcopy(wide)
        with torch.random.fork_rng():
            copy.deepcopy(wide_loss)(*forward(tried, wide_batch)).backward()
        if all(p.grad.to_dense().isfinite().all() for p in tried.parameters() if p.grad is not None):
            return wide, wide_loss, wide_batch, True
    except (RuntimeError, TypeError, NotImplementedError):
        pass
    return copy.deepcopy(model), copy.deepcopy(lossfunc), batch, False


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return value.double() if value.is_floating_point() else value.cdouble() if value.is_complex() else value
