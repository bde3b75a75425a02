"""Random models, losses, extensions and subsets, each compared with plain autograd: ``make fuzz``.

    python tests/fuzz.py [--cases 5000] [--seed 0] [--seconds 1200]

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

import torch
import torch.nn.functional as F
from kronecker_truth import Truth, check
from torch import nn
from truth import close

from backpack import backpack, extend, extensions, verification, verify
from backpack.curvature import pooling

CLEAR = re.compile(
    "statistics of the batch|samples cannot be told apart|may hold|no axis of the|eigenvalue|drops out"
    "|no second derivative"
)
"""What may be refused, by the words that say why."""


class Residual(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


class Twice(nn.Module):
    """The same module, called twice."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(self.body(x).tanh())


class Bare(nn.Module):
    """Bare parameters in arithmetic."""

    def __init__(self, width):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        self.matrix = nn.Parameter(torch.rand(width, width) / width)

    def forward(self, x):
        return (x * self.scale + self.shift).sin() + x @ self.matrix


class Tied(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Linear(width, width)

    def forward(self, x):
        return F.linear(self.weight(x).tanh(), self.weight.weight.T)


class Recurrent(nn.Module):
    def __init__(self, layer, width, **options):
        super().__init__()
        self.layer = layer(width, width, batch_first=True, **options)
        self.down = nn.Linear(width * (2 if options.get("bidirectional") else 1), width)

    def forward(self, x):
        return self.down(self.layer(x)[0])


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Swap(nn.Module):
    """Positions first, as recurrent code often has it; or flattened into the batch."""

    def __init__(self, body, flat):
        super().__init__()
        self.body, self.flat = body, flat

    def forward(self, x):
        if self.flat:
            return self.body(x.flatten(0, 1)).reshape(x.shape)
        return self.body(x.transpose(0, 1)).transpose(0, 1)


def activation(r):
    return r.choice([nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.ELU, nn.SiLU, nn.Softplus, nn.LogSigmoid])()


def vector_layer(r, width):
    return r.choice(
        [
            lambda: nn.Linear(width, width, bias=r.random() < 0.7),
            lambda: nn.LayerNorm(width, bias=r.random() < 0.7),
            lambda: nn.RMSNorm(width),
            lambda: Residual(nn.Sequential(nn.Linear(width, width), activation(r))),
            lambda: Twice(nn.Linear(width, width)),
            lambda: Bare(width),
            lambda: Tied(width),
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(width, width)),
            lambda: nn.Sequential(nn.Linear(width, width), nn.Dropout(0.3)),
            lambda: nn.PReLU(),
            lambda: activation(r),
        ]
    )()


def sequence_layer(r, width):
    return r.choice(
        [
            lambda: vector_layer(r, width),
            lambda: Recurrent(r.choice([nn.RNN, nn.GRU, nn.LSTM]), width, bidirectional=r.random() < 0.3),
            lambda: Attention(width),
            lambda: Swap(nn.Linear(width, width), flat=r.random() < 0.5),
            lambda: Residual(nn.Sequential(nn.LayerNorm(width), Attention(width))),
        ]
    )()


def image_layer(r, width):
    return r.choice(
        [
            lambda: nn.Conv2d(width, width, 3, padding=1, groups=r.choice([1, 2]), bias=r.random() < 0.7),
            lambda: nn.Conv2d(width, width, r.choice([1, 2]), padding="same", dilation=r.choice([1, 2])),
            lambda: nn.Conv2d(width, width, 3, padding=1, padding_mode=r.choice(["reflect", "circular"])),
            lambda: nn.ConvTranspose2d(width, width, 3, padding=1, groups=r.choice([1, 2])),
            lambda: nn.GroupNorm(2, width),
            lambda: nn.InstanceNorm2d(width, affine=True),
            lambda: nn.BatchNorm2d(width).train(r.random() < 0.05),
            lambda: nn.AvgPool2d(3, 1, 1),
            lambda: nn.MaxPool2d(3, 1, 1),
            lambda: Residual(nn.Sequential(nn.Conv2d(width, width, 3, padding=1), activation(r))),
            lambda: nn.PReLU(width),
            lambda: activation(r),
        ]
    )()


def model_and_inputs(r):
    width, n, depth = r.choice([2, 4, 6]), r.choice([1, 2, 3, 4, 5]), r.randint(1, 4)
    kind = r.choice(["vector", "vector", "sequence", "image", "tokens"])
    classes = r.choice([2, 3])
    if kind == "vector":
        body, inputs = [vector_layer(r, width) for _ in range(depth)], torch.randn(n, width)
        return nn.Sequential(*body, nn.Linear(width, classes)), inputs, n, classes
    if kind == "image":
        body, inputs = [image_layer(r, width) for _ in range(depth)], torch.randn(n, width, 5, 4)
        head = r.choice([[nn.Flatten(), nn.Linear(width * 20, classes)], [nn.Conv2d(width, classes, 1)]])
        return nn.Sequential(*body, *head), inputs, n, classes
    length = r.choice([2, 3, n])
    body = [sequence_layer(r, width) for _ in range(depth)]
    head = r.choice([[nn.Flatten(), nn.Linear(width * length, classes)], [nn.Linear(width, classes)]])
    if kind == "tokens":
        table = nn.Embedding(7, width, padding_idx=r.choice([None, 1]))
        return nn.Sequential(table, *body, *head), torch.randint(0, 7, (n, length)), n, classes
    return nn.Sequential(*body, *head), torch.randn(n, length, width), n, classes


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


def case(number: int) -> list[str]:
    """Run one case; what was refused."""
    r = random.Random(number)
    torch.manual_seed(number)
    pooling.SMALL = number % 2 * 2**15  # columns go through max pooling by turns in every second case
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
    refused = [row.verdict for row in outcome.rows if row.verdict.startswith("refused")]
    unclear = [reason for reason in refused if not CLEAR.search(reason)]
    if wrong or unclear:
        found = [(row.parameter, row.quantity, row.error, row.verdict) for row in wrong] + unclear
        subsets = [(type(e).__name__, e.get_subsampling()) for e in exts]
        raise AssertionError(f"{found}\n{model}\n{lossfunc}, inputs {list(inputs.shape)}, {subsets}")
    if not refused:
        together(model, lossfunc, inputs, targets, exts)
    if r.random() < 0.5:
        refused += factors(r, model, lossfunc, inputs, targets, n)
    return refused


def factors(r, model, lossfunc, inputs, targets, n):
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
    truth = Truth(plain, inputs, lossfunc, targets, chosen, approx, fisher)
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


CANCELLED = {2703}
"""Cases with true values of 1e-31, sums of terms of one that cancel up to their rounding."""


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
    start, failed, refusals, done = time.monotonic(), [], Counter(), 0
    for number in range(options.seed, options.seed + options.cases):
        if time.monotonic() - start > options.seconds:
            break
        verification.ZERO = 1e-10 if number in CANCELLED else 1e-17  # errors of small values count as well
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                for reason in case(number):
                    refusals[CLEAR.search(reason).group()] += 1
        except Exception as error:
            failed.append(number)
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"case {number} (repeat: python tests/fuzz.py --seed {number} --cases 1): {reason}")
            if len(failed) <= 10:
                traceback.print_exc(limit=-4, file=sys.stdout)
        done += 1
    print(
        f"{done} cases, {len(failed)} failed {failed[:20]}, refused: {dict(refusals)}, {time.monotonic() - start:.0f} s"
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
