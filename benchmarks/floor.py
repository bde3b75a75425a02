"""How fast can first-order quantities of 3C3D be? A version written by hand for this network, beside the package.

Plain PyTorch, with what was fastest of all that was tried (``lessons.md``): a hook on the output of each layer, buffers
that are there before, products in the order in which the library is fastest, sums that each core makes of its own
samples, norms from dot products of pixels where these are fewer, and the mean for the variance from ``p.grad``. A cell
shows the median (the minimum), over rounds in which all take turns, of the time relative to the plain gradient's.
"""

import sys
from statistics import median

import torch
from report import row, table
from steps import of_backpack, plain
from subjects import make
from torch import Tensor, nn
from worker import timed

CHUNK = 8
"""Samples at a time: what is made of them stays in the caches."""


class Contraction:
    """Reads one quantity of a layer off its input and the cotangent of its output, in memory of its own."""

    def __init__(self, layer: nn.Module, x: Tensor, out: Tensor, quantity: str) -> None:
        self.layer, self.quantity, self.cores = layer, quantity, torch.get_num_threads()
        if isinstance(layer, nn.Conv2d):
            (self.kernel, _), (self.pad, _) = layer.kernel_size, layer.padding
            c, side, self.out = x.shape[1], x.shape[2] + 2 * self.pad, out.shape[2]
            self.padded = x.new_zeros(len(x), c, side, side)
            inputs = c * self.kernel**2
            self.columns = x.new_empty(CHUNK, c, self.kernel, self.kernel, self.out, self.out)
            self.matrices = x.new_empty(CHUNK, inputs, out.shape[1])
            self.by_pixels = quantity == "BatchL2Grad" and self.out < 20
            if self.by_pixels:
                self.pixels = x.new_empty(CHUNK, side, side, side, side)
                self.rows = x.new_empty(CHUNK, self.out, side, self.out, side)
                self.patches = x.new_empty(CHUNK, *[self.out] * 4)
                self.weighted = x.new_empty(CHUNK, out.shape[1], self.out**2)

    @torch.no_grad()
    def __call__(self, x: Tensor, grad: Tensor) -> None:
        weight, bias = self.layer.weight, self.layer.bias
        if isinstance(self.layer, nn.Conv2d):
            found, grads = self._convolution(x, grad.flatten(2)), grad.flatten(2).sum(2)
        elif self.quantity == "BatchL2Grad":
            found, grads = grad.square().sum(1) * x.square().sum(1), grad
        else:
            found, grads = grad.square().T @ x.square(), grad
        weight.found = found
        bias.found = grads.square().sum(1 if self.quantity == "BatchL2Grad" else 0)

    def _convolution(self, x: Tensor, grad: Tensor) -> Tensor:
        if self.pad:
            inner = slice(self.pad, -self.pad)
            self.padded[:, :, inner, inner] = x
            x = self.padded
        found = []
        for start in range(0, len(x), CHUNK):
            part, cotangent = x[start : start + CHUNK], grad[start : start + CHUNK]
            if self.by_pixels:
                found.append(self._norms(part, cotangent))
                continue
            n, c, h, w = part.stride()
            self.columns.copy_(part.as_strided(self.columns.shape, (n, c, h, w, h, w)))
            left = self.columns.view(CHUNK, -1, self.out**2)
            torch.bmm(left, cotangent.transpose(1, 2), out=self.matrices)
            squares = self.matrices.square_()
            if self.quantity == "BatchL2Grad":
                found.append(squares.sum((1, 2)))
            elif found:
                found[0].add_(squares.unflatten(0, (self.cores, -1)).sum(1))
            else:
                found.append(squares.unflatten(0, (self.cores, -1)).sum(1))
        return torch.cat(found) if self.quantity == "BatchL2Grad" else found[0].sum(0).T

    def _norms(self, x: Tensor, grad: Tensor) -> Tensor:
        pixels = x.flatten(2)
        torch.bmm(pixels.transpose(1, 2), pixels, out=self.pixels.view(CHUNK, *[pixels.shape[2]] * 2))
        windows = [slice(start, start + self.out) for start in range(self.kernel)]
        _sum([self.pixels[:, a, :, a] for a in windows], self.rows)
        _sum([self.rows[:, :, a, :, a] for a in windows], self.patches)
        torch.bmm(grad, self.patches.view(CHUNK, self.out**2, -1), out=self.weighted)
        return self.weighted.mul_(grad).sum((1, 2))


def _sum(terms: list[Tensor], out: Tensor) -> None:
    torch.add(terms[0], terms[1], out=out)
    for term in terms[2:]:
        out.add_(term)


def by_hand(model: nn.Module, X: Tensor, y: Tensor, quantity: str):
    lossfunc, contractions = nn.CrossEntropyLoss(), {}

    def step() -> None:
        model.zero_grad()
        x = X
        for layer in model:
            out = layer(x)
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                if layer not in contractions:
                    contractions[layer] = Contraction(layer, x, out, quantity)
                out.register_hook(lambda grad, read=contractions[layer], x=x: read(x, grad))
            x = out
        lossfunc(x, y).backward()
        if quantity == "Variance":
            for p in model.parameters():
                squares = p.found.reshape(p.shape)
                p.found = squares.addcmul_(p.grad, p.grad, value=-1 / len(X)).div_(len(X))

    return step


def main(rounds: int) -> None:
    print(f"{torch.get_num_threads()} threads, {rounds} rounds\n")
    print(table(["quantity", "by hand", "this package"], []), end="")
    for quantity, savefield in {
        "BatchL2Grad": "batch_l2",
        "SumGradSquared": "sum_grad_squared",
        "Variance": "variance",
    }.items():
        (model, X, y), (own, _, _) = make("3C3D"), make("3C3D")
        steps = [plain(*make("3C3D")), by_hand(model, X, y, quantity), of_backpack(own, X, y, quantity)]
        for step in steps:
            step()
        for p, q in zip(model.parameters(), own.parameters(), strict=True):
            expected = getattr(q, savefield)
            assert torch.allclose(p.found.reshape(expected.shape), expected, rtol=1e-3, atol=1e-5 * expected.max())
        times = [[timed(step) for step in steps] for _ in range(rounds)]
        ratios = [[own[place] / own[0] for own in times] for place in (1, 2)]
        cells = [f"{median(found):.2f} ({min(found):.2f})" for found in ratios]
        print(row([quantity, *cells]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
