"""Random models, losses, extensions and subsets, each compared with plain autograd: ``make fuzz``.

    python tests/fuzz [--cases 5000] [--seed 0] [--seconds 1200]

Every third case has one loss of a model that runs once. The others are one to three steps of one model, with several
losses, calls, heads and branches, frozen parts, numbered samples and parameters that change in between; or a data set.
Case ``k`` depends on its own number only, ``seed + k``: ``--seed NUMBER --cases 1`` repeats it. A case fails if a
result differs from plain autograd, if a gradient differs in one bit from that without the package, or if an error is
not one of those that say what to do.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import random
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the tests' other modules are

import torch
from torch import nn
from truths import close
from truths.kronecker import Truth as KroneckerTruth
from truths.kronecker import check
from truths.options import CASES as OPTIONS
from truths.second_order import twice_differentiable

from backpack import accumulate, backpack, extend, extensions, verify
from backpack.curvature import nodes_without_vmap
from backpack.inspection.verification import verdicts
from backpack.inspection.verification.computation import SEED
from fuzz.models import model_and_inputs, network
from fuzz.truth import Comparison, Truth, compare, squares

CLEAR = re.compile(
    "statistics of the batch|samples cannot be told apart|may hold|no axis of the|eigenvalue|drops out"
    "|no second derivative"
)
"""What may be refused, by the words that say why."""


def loss_and_targets(r, out, classes):
    """For an output ``[n, ..., classes]`` or, of an image, ``[n, classes, ...]``."""
    reduction = r.choice(["mean", "sum"])
    convex = [nn.MSELoss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss]
    if out.dim() in (2, 4) and r.random() < 0.5 and out.shape[1] == classes:
        target = torch.randint(0, classes, (out.shape[0], *out.shape[2:]))
        options = {"label_smoothing": r.choice([0.0, 0.1]), "ignore_index": r.choice([-100, -100, 0])}
        if options["ignore_index"] == 0 and not target.any():
            target.flatten()[0] = 1
        if r.random() < 0.3:
            options["weight"] = torch.rand(classes) + 0.1
        return nn.CrossEntropyLoss(reduction=reduction, **options), target
    cls = r.choice(convex)
    return cls(reduction=reduction), torch.rand(out.shape)


def subset(r, n):
    rows = list(range(n))
    return r.choice([None, None, [r.choice(rows)], rows[::-1], [0, n - 1, 0], slice(0, None, 2), [True] * n, [-1]])


def chosen(r, n):
    first = ["BatchGrad", "BatchL2Grad", "BatchDotGrad", "SumGradSquared", "Variance"]
    second = ["DiagGGNExact", "BatchDiagGGNExact", "SqrtGGNExact", "DiagGGNMC", "DiagHessian", "BatchDiagHessian"]
    names = r.sample(first, r.randint(1, 3)) + r.sample(second, r.randint(0, 2))
    return [getattr(extensions, name)(subsampling=subset(r, n)) for name in names]


def single(r):
    """One loss, of a model that runs once; what was refused."""
    model, inputs, n, classes = model_and_inputs(r)
    model = model.double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    for parameter in model.parameters():
        if r.random() < 0.1:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        next(model.parameters()).requires_grad_(True)
    with torch.no_grad():
        out = copy.deepcopy(model)(inputs)
    lossfunc, targets = loss_and_targets(r, out, classes)
    lossfunc = lossfunc.double()
    targets = targets.double() if targets.is_floating_point() else targets
    exts = chosen(r, n)
    outcome = verify(model, lossfunc, inputs, targets, *exts)
    wrong = [row for row in outcome.rows if row.verdict.startswith("wrong")]
    wrong = [row for row in wrong if is_determined(row, model, lossfunc, inputs, targets, exts)]
    refused = [row.verdict for row in outcome.rows if row.verdict.startswith("refused")]
    unclear = [reason for reason in refused if not CLEAR.search(reason)]
    if wrong or unclear:
        found = [(row.parameter, row.quantity, row.error, row.verdict) for row in wrong] + unclear
        subsets = [(type(e).__name__, e.get_subsampling()) for e in exts]
        raise AssertionError(f"{found}\n{model}\n{lossfunc}, inputs {list(inputs.shape)}, {subsets}")
    if not refused:
        together(model, lossfunc, inputs, targets, exts)
    if r.random() < 0.5:
        refused += kronecker(r, model, lossfunc, inputs, targets, n)
    return refused


def is_determined(row, model, lossfunc, inputs, targets, exts):
    """Whether a result moves by less than its error as the parameters move by rounding.

    Where terms cancel (a normalization of what is zero up to rounding) or a function has a kink, no algorithm can do
    better.
    """
    results = []
    for step in [0.0] + [2.0**-52] * 8:
        moved = extend(copy.deepcopy(model))
        with torch.no_grad():
            for p in moved.parameters():
                p.add_(torch.randn_like(p).sign() * p.abs().clamp(min=1), alpha=step)
        torch.manual_seed(SEED)
        with backpack(*(e for e in exts if e.savefield == row.quantity)):
            extend(copy.deepcopy(lossfunc))(moved(inputs), targets).backward()
        results.append(getattr(moved.get_parameter(row.parameter), row.quantity))
    size = results[0].abs().max()
    return max(float((other - results[0]).abs().max() / size) for other in results[1:]) < row.error / 10


def kronecker(r, model, lossfunc, inputs, targets, n):
    """Kronecker factors and their eigendecompositions against plain autograd by samples; what was refused."""
    plain = copy.deepcopy(model).eval()  # the same dropout for a single sample and for all cannot be drawn
    if sum(p.numel() for p in plain.parameters()) > 600:
        return []
    rows, approx = subset(r, n), r.choice([None, "expand", "reduce"])
    unit = lossfunc.reduction == "sum" and getattr(lossfunc, "weight", None) is None
    fisher = r.choice(["exact", "exact", "empirical"]) if unit else "exact"
    if rows is None or isinstance(rows, slice):
        chosen = list(range(n))[rows or slice(None)]
    else:
        chosen = [i % n for i in rows] if rows[0] is not True else list(range(n))
    extended = extend(copy.deepcopy(plain))
    choices = {"subsampling": rows, "approx": approx}
    exts = [extensions.KFAC(fisher=fisher, **choices), extensions.EKFAC(fisher=fisher, **choices)]
    if fisher == "exact":
        exts.append(extensions.KFLR(**choices))
    try:
        with backpack(*exts):
            extend(lossfunc)(extended(inputs), targets).backward()
    except (RuntimeError, ValueError) as error:
        if CLEAR.search(str(error)):
            return [str(error)]
        raise
    truth = KroneckerTruth(plain, inputs, lossfunc, targets, chosen, approx, fisher)
    for name, p in extended.named_parameters():
        if p.requires_grad:
            try:
                check(name, p, truth, p.kfac, p.ekfac, close)
                if fisher == "exact":
                    check(name, p, truth, p.kflr, None, close)
            except AssertionError as error:
                raise AssertionError(f"{error} {approx} {fisher} {rows} of {extended}, {lossfunc}") from error
    return []


def together(model, lossfunc, inputs, targets, exts):
    """All extensions in one block leave the gradients bit for bit as they are without."""
    plain, extended = copy.deepcopy(model), extend(copy.deepcopy(model))
    torch.manual_seed(0)
    lossfunc(plain(inputs), targets).backward()
    torch.manual_seed(0)
    with backpack(*exts):
        extend(lossfunc)(extended(inputs), targets).backward()
    for (name, p), q in zip(plain.named_parameters(), extended.parameters(), strict=True):
        if p.grad is not None and not torch.equal(p.grad, q.grad):
            difference = float((p.grad - q.grad).abs().max())
            raise AssertionError(
                f"p.grad of {name} differs by {difference} in {model}, {[type(e).__name__ for e in exts]}"
            )


# ---------------------------------------------------------------------------------------------------------------
# Several losses, samples that users number, and a history of steps


class Scores(nn.Module):
    """A value for each row, all of whose entries interact."""

    def forward(self, z, y):
        return torch.logsumexp(z, -1) - (z * y).sum(-1)


class Quartic(nn.Module):
    """A scalar."""

    def forward(self, z, y):
        return ((z - y).square().sum(-1).square() + z.square().sum(-1)).sum() / 7


class Waves(nn.Module):
    """A scalar that is not convex."""

    def forward(self, z, y):
        return (z + y).sin().sum()


class Squares(nn.Module):
    """With a custom reduction, of what is not extended."""

    def forward(self, z, y):
        return (z - y).square().mean() + (z * y).sin().sum()


@dataclass
class Call:
    """``loss(select(output), y)``, reduced."""

    output: int
    select: Callable
    change: Callable
    loss: nn.Module
    y: torch.Tensor
    reduce: Callable

    def input(self, outputs):
        return self.change(self.select(outputs[self.output]))

    def value(self, z, loss=None):
        return self.reduce((loss or self.loss)(z, self.y))


def a_call(r, outputs, known, kinds):
    """``known``: losses of other calls, of which one may be called again."""
    place = r.randrange(len(outputs))
    out = outputs[place]
    select = selection(r, out)
    change = r.choice([lambda z: z, lambda z: z, torch.tanh, torch.sin, lambda z: 1.5 * z])
    z = change(select(out))
    kind, reduction = r.choice(kinds), r.choice(["mean", "sum", "none"])
    if kind is nn.CrossEntropyLoss:
        y, swap = torch.randint(z.shape[-1], z.shape[:-1]), z.dim() == 3
        if swap and r.random() < 0.5:
            flat, select, y, swap = select, (lambda out: flat(out).flatten(0, 1)), y.flatten(), False
        elif swap:
            whole, select = select, lambda out: whole(out).mT
        options = {"label_smoothing": r.choice([0.0, 0.1])}
        if r.random() < 0.3:
            options["weight"] = torch.rand(z.shape[-1], dtype=z.dtype) + 0.1
        loss = kind(reduction=reduction, **options)
    elif kind.__module__.startswith("torch"):
        y, loss = torch.rand(z.shape, dtype=z.dtype), kind(reduction=reduction)
    else:
        y, loss = torch.rand(z.shape, dtype=z.dtype), kind()
        reduction = "none" if kind is Scores else "sum"
    for other in known:
        if same_loss(other, loss) and r.random() < 0.5:
            loss = other
    reduce = r.choice([torch.Tensor.mean, torch.Tensor.sum]) if reduction == "none" else lambda value: value
    return Call(place, select, change, loss, y, reduce)


def same_loss(one, other):
    settings = ("reduction", "label_smoothing")
    return (
        type(one) is type(other)
        and not one.state_dict()
        and not other.state_dict()
        and all(getattr(one, key, None) == getattr(other, key, None) for key in settings)
    )


def selection(r, out):
    """Rows and columns of an output; of the numbers of its samples, it gives those of the rows."""
    lead, cut = out.shape[:-1], r.choice([slice(None), slice(None), slice(1, None), slice(None, -1)])
    keep = torch.tensor([r.random() < 0.6 for _ in range(lead.numel())]).reshape(lead)
    order = torch.tensor(r.sample(range(lead.numel()), lead.numel()))
    ways = [
        lambda out: out,
        lambda out: out,
        lambda out: out[keep],
        lambda out: out.flatten(0, -2)[order],
        lambda out: out.flatten(0, -2)[order[: len(order) // 2 + 1]],
        lambda out: out[1:],
        lambda out: out[[0, -1, 0]],
    ]
    if len(lead) > 1:
        ways += [lambda out: out[:, 1:].flatten(0, 1), lambda out: out.transpose(0, 1), lambda out: out[:, -1]]
    way = r.choice(ways)
    way = way if way(out).numel() else ways[0]
    return lambda out: way(out)[..., cut]


def numbers(r, lead, document, mixed):
    """``sample_ids``, the sample of each leading entry, how many there are, and whether samples are mixed."""
    rows = torch.arange(lead[0]).reshape(-1, *[1] * (len(lead) - 1)).expand(lead)
    if r.random() < 0.4:
        return None, rows, lead[0], "batch" in mixed
    units = rows if document is None else document
    is_mixed = "batch" in mixed
    if document is None and len(lead) == 2 and r.random() < 0.5:
        units, is_mixed = torch.arange(lead.numel()).reshape(lead), bool(mixed)
    count = int(units.max()) + 1
    names = r.choice(
        [
            range(count),
            r.sample(range(count), count),
            [r.randrange(2) for _ in range(count)],
            [1 + 2 * k for k in r.sample(range(count), count)],
            [1, *[r.randint(-1, 2) for _ in range(count - 1)]],
            [0] * count,
        ]
    )
    owner = torch.tensor(list(names))[units]
    n = int(owner.max()) + 1
    short = document is None and len(lead) == 2 and units is rows and r.random() < 0.5
    ids = owner[:, 0] if short else owner
    if r.random() < 0.3:
        n += r.randint(0, 2)
        ids = ids, n
    return ids, owner, n, is_mixed


CONVEX = [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss, nn.HuberLoss, nn.PoissonNLLLoss, Scores, Quartic]


class Step:
    """One backward pass: what the model is called with, the losses, and the samples."""

    def __init__(self, r, model, inputs, rows):
        self.seed, self.branch = r.randrange(2**30), r.randrange(2)
        x, self.document = inputs(rows)
        self.xs = [x, *[inputs(rows)[0] for _ in range(r.choice([0, 0, 0, 1, 2]))]]
        with torch.no_grad():
            outputs = self.outputs(copy.deepcopy(model))
        lead = outputs[0].shape[:-1]
        self.ids, self.owner, self.n, self.mixed = numbers(r, lead, self.document, model.mixed)
        self.order = r.choice(["first", "ggn", "ggn", "hessian", "all"])
        kinds = CONVEX + {"first": [Squares, Waves], "hessian": [Waves]}.get(self.order, [])
        self.calls = []
        for _ in range(r.choice([1, 2, 2, 3, 4])):
            self.calls.append(a_call(r, outputs, [call.loss for call in self.calls], kinds))

    def outputs(self, model):
        torch.manual_seed(self.seed)
        found = [model(x, self.document, self.branch) for x in self.xs]
        return [out for outs in found for out in (outs if isinstance(outs, list) else [outs])]

    def truth(self, model):
        """And the loss, of the same graph."""
        outputs = self.outputs(model)
        inputs = [call.input(outputs) for call in self.calls]
        owners = []
        for call, z in zip(self.calls, inputs, strict=True):
            out = outputs[call.output]
            owner = self.owner.reshape(*self.owner.shape, 1).expand(out.shape)
            owners.append(call.select(owner))
            assert owners[-1].shape == z.shape
        values = [call.value for call in self.calls]
        total = sum(call.value(z) for call, z in zip(self.calls, inputs, strict=True))
        return Truth(model, inputs, values, owners, self.n), total

    def loss(self, model, extended):
        """``extended``: copies of the losses, by number of the loss."""
        outputs = self.outputs(model)
        for call in self.calls:
            if id(call.loss) not in extended:
                loss = copy.deepcopy(call.loss)
                extended[id(call.loss)] = loss if isinstance(loss, Squares) else extend(loss)
        return sum(call.value(call.input(outputs), extended[id(call.loss)]) for call in self.calls)


OLD = object()
"""What stands in place of a result before a pass, which must not survive."""

FIRST = ["BatchGrad", "BatchL2Grad", "BatchDotGrad", "SumGradSquared", "Variance", "ClippedGrad"]
GGN = ["DiagGGNExact", "BatchDiagGGNExact", "SqrtGGNExact", "GGNGram", "GGNMP", "GaussNewtonStep", "KFLR", "EKFAC"]
HESSIAN = ["DiagHessian", "BatchDiagHessian", "HMP"]
SEPARATE = {"ClippedGrad", "KFLR", "EKFAC"}
"""Not defined where samples are mixed."""


def drawn(r, truth, order, mixed, without=()):
    """Extensions, each with the samples that it is for."""
    names = r.sample(FIRST, r.randint(1, 4))
    if order in ("ggn", "all"):
        names += r.sample(GGN, r.randint(1, 4))
    if order in ("hessian", "all"):
        names += r.sample(HESSIAN, r.randint(1, 3))
    is_complex = any(p.is_complex() for p in truth.leaves)
    found = []
    for name in names:
        if name in without or (mixed and name in SEPARATE) or (is_complex and "DiagHessian" in name):
            continue
        given = subset(r, truth.n)
        rows = torch.arange(truth.n)[slice(None) if given is None else given]
        if name == "ClippedGrad":
            norms = sum(squares(g).flatten(1).sum(1) for g in truth.grads.values()).sqrt()
            extension = extensions.ClippedGrad(0.6 * float(norms.max()) + 1e-9, given)
        elif name == "GaussNewtonStep":
            size = max((float(block.abs().max()) for block in truth.ggn.values() if block.numel()), default=0.0)
            extension = extensions.GaussNewtonStep((size + 1e-6) * r.choice([0.01, 1.0]), given)
        else:
            options = {"fisher": "exact"} if name == "EKFAC" else {}
            extension = getattr(extensions, name)(subsampling=given, **options)
        found.append((extension, rows))
    possible = [] if "options" in without else [name for name in OPTIONS if not (mixed and OPTIONS[name].is_clipping)]
    for name in r.sample(possible, r.randint(0, 2)) if any(g.any() for g in truth.grads.values()) else ():
        given = subset(r, truth.n)
        rows = torch.arange(truth.n)[slice(None) if given is None else given]
        extension = OPTIONS[name].make(truth.grads, given, rows.tolist())
        extension.savefield = name.replace(" ", "_")
        found.append((extension, rows))
    return found


def steps(r):
    """A history of passes of one model, whose parameters are updated in between; what was refused."""
    plain, inputs = network(r)
    ours, refused = extend(copy.deepcopy(plain)), []
    for number in range(r.choice([1, 2, 3])):
        for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
            p.requires_grad_(r.random() > 0.15)
            q.requires_grad_(p.requires_grad)
        step = Step(r, plain, inputs, r.randint(2, 4) if "batch" in plain.mixed else r.randint(1, 4))
        try:
            refused += one_pass(r, step, plain, ours)
        except Exception as error:
            error.add_note(f"step {number}: {step}\n{plain}")
            raise
        plain.load_state_dict(ours.state_dict())
    return refused


def one_pass(r, step, plain, ours):
    ours.zero_grad()
    before = copy.deepcopy(plain.state_dict())
    with twice_differentiable():
        truth, total = step.truth(plain)
    if not total.requires_grad or not all(g.isfinite().all() for g in truth.grads.values()):
        return []
    chosen = drawn(r, truth, step.order, step.mixed)
    fields = [extension.savefield for extension, _ in chosen]
    for p in ours.parameters():
        vars(p).update(dict.fromkeys(fields, OLD))
    try:
        run(r.random() < 0.5, step, ours, [extension for extension, _ in chosen])
    except (RuntimeError, ValueError) as error:
        assert not any(field in vars(p) for p in ours.parameters() for field in fields), "a result after an error"
        if "running it again" in str(error) and any(isinstance(module, nn.Dropout) for module in ours.modules()):
            return [str(error)]
        raise
    same_state(with_gradients(step, plain, before), ours)
    reached = {name for name, p in ours.named_parameters() if p.grad is not None}
    for extension, rows in chosen:
        if r.random() < 0.3:  # products are at the weights of the pass
            with torch.no_grad():
                for p in ours.parameters():
                    if p.requires_grad:
                        p.add_(torch.randn_like(p), alpha=0.1)
        field = extension.savefield
        results = {name: vars(p)[field] for name, p in ours.named_parameters() if field in vars(p)}
        assert OLD not in results.values(), f"an old {field} survives"
        assert results.keys() <= truth.parameters.keys(), f"{field} of what is frozen"
        with twice_differentiable():
            compare(extension, rows, truth, results, reached)
    return []


def with_gradients(step, plain, state):
    """A copy of the model after a plain step."""
    model = copy.deepcopy(plain)
    model.load_state_dict(state)
    step.loss(model, {id(call.loss): call.loss for call in step.calls}).backward()
    return model


def run(is_inside, step, ours, exts):
    """The forward pass is inside of the block or before it."""
    extended = {}
    loss = None if is_inside else step.loss(ours, extended)
    with backpack(*exts, sample_ids=step.ids):
        loss = loss if loss is not None else step.loss(ours, extended)
        loss.backward()


def same_state(plain, ours):
    """The bits are the same; but not even PyTorch alone always has the same ones in complex numbers."""
    same = close if plain.is_complex else torch.equal
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), f"the gradient of {name}"
        assert p.grad is None or same(p.grad, q.grad), f"the gradient of {name} is off by a bit"
    for (key, found), true in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(found, true), f"the state {key}"


def data_set(r):
    """``accumulate`` over batches against one of all samples; what was refused."""
    plain, inputs = network(r)
    while "batch" in plain.mixed:
        plain, inputs = network(r)
    plain.heads = plain.heads[:1]
    plain.eval()
    ours = extend(copy.deepcopy(plain))
    batches, owners, total, mixed = [], [], 0, False
    kind = r.choice(["none", "own", "all"])
    for _ in range(r.randint(1, 3)):
        x, document = inputs(r.randint(1, 3))
        with torch.no_grad():
            out = plain(x, document)
        ids, owner, n, is_mixed = numbers(r, out.shape[:-1], document, plain.mixed)
        while (ids is None) != (kind == "none") or (kind == "all" and isinstance(ids, tuple)):
            ids, owner, n, is_mixed = numbers(r, out.shape[:-1], document, plain.mixed)
        if kind == "own":
            ids = ids if isinstance(ids, tuple) else (ids, n)
        elif kind == "all":
            ids = torch.where(ids >= 0, ids + total, -1)
        owners.append(torch.where(owner >= 0, owner + total, -1))
        batches.append(((x, document), torch.rand(out.shape, dtype=out.dtype), ids))
        total, mixed = total + n, mixed or is_mixed
    reduction = r.choice(["mean", "sum"])
    losses = [nn.MSELoss, nn.BCEWithLogitsLoss, nn.HuberLoss, nn.CrossEntropyLoss]
    lossfunc = r.choice(losses)(reduction=reduction)
    is_classes = isinstance(lossfunc, nn.CrossEntropyLoss)
    if is_classes and r.random() < 0.5:
        lossfunc.weight = torch.rand(plain.heads[0].out_features, dtype=torch.float64) + 0.1

    def forward(model, batch):
        (x, document), y, _ = batch
        out = model(x, document)
        return (out.flatten(0, -2), y.argmax(-1).flatten()) if is_classes else (out, y)

    with twice_differentiable():
        pairs = [forward(plain, batch) for batch in batches]
    z, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    owner = torch.cat([(o.flatten() if is_classes else o)[..., None] for o in owners]).expand(z.shape)
    truth = Truth(plain, [z], [lambda z: lossfunc(z, y)], [owner], total)
    order = r.choice(["first", "ggn", "hessian", "all"])
    without = {
        "SqrtGGNExact",
        "GGNGram",
        "GGNMP",
        "GaussNewtonStep",
        "HMP",
        *(["BatchDotGrad"] if kind != "none" else []),
    }
    chosen = drawn(r, truth, order, mixed, without)
    if not chosen:
        return []
    found = accumulate(
        ours,
        copy.deepcopy(lossfunc),
        batches,
        *[extension for extension, _ in chosen],
        forward=forward,
        sample_ids=None if kind == "none" else lambda batch: batch[2],
    )
    assert found.samples == total
    lossfunc(z, y).backward(retain_graph=True)
    gradient = Comparison("the gradient")
    for name, p in plain.named_parameters():
        if p.grad is not None:
            gradient.add(name, found.grad[name], p.grad)
    gradient.finish()
    for extension, rows in chosen:
        with twice_differentiable():
            compare(extension, rows, truth, found[extension.savefield], found.grad.keys())
    return []


def case(number: int) -> list[str]:
    """Every third case has one loss, the others a history of steps or a data set; what was refused."""
    r = random.Random(number)
    torch.manual_seed(number)
    nodes_without_vmap.SMALL = number % 2 * 2**15  # columns go through max pooling by turns in every second case
    if number % 3 == 0:
        return single(r)
    return data_set(r) if number % 15 == 1 else steps(r)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1200)
    options = parser.parse_args(arguments)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Using padding='same' with even kernel")  # of PyTorch
    warnings.filterwarnings("ignore", ".*which costs")  # slow, but right
    warnings.filterwarnings("ignore", ".* is linear in its input here")
    warnings.filterwarnings("ignore", "Samples are mixed")
    warnings.filterwarnings("ignore", ".*taken entry by entry")
    verdicts.ZERO = 1e-17  # errors of small values count as well
    start, failed, refusals, done = time.monotonic(), [], Counter(), 0
    for number in range(options.seed, options.seed + options.cases):
        if time.monotonic() - start > options.seconds:
            break
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                for reason in case(number):
                    refusals[CLEAR.search(reason).group()] += 1
        except Exception as error:
            failed.append(number)
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"case {number} (repeat: python tests/fuzz --seed {number} --cases 1): {reason}")
            if len(failed) <= 10:
                traceback.print_exc(limit=-4, file=sys.stdout)
        done += 1
    print(
        f"{done} cases, {len(failed)} failed {failed[:20]}, refused: {dict(refusals)}, {time.monotonic() - start:.0f} s"
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
