"""Kronecker factors and blocks of the Gauss-Newton matrix by plain autograd, one sample at a time."""

from __future__ import annotations

import torch
from torch import nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Embedding)
"""Whose factors are known from their inputs and outputs."""

FORWARDS = [layer.forward for layer in LAYERS]


def columns_of(out, lossfunc, targets, n, fisher="exact"):
    """Columns ``[c, d]`` of a root of the loss's Hessian in the output of sample ``n``; or its gradient."""

    def loss(own):
        return lossfunc(torch.cat([out[:n], own.reshape(out[n : n + 1].shape), out[n + 1 :]]), targets)

    point = out[n].detach().flatten()
    if fisher == "empirical":
        return torch.autograd.functional.jacobian(loss, point)[None]
    values, vectors = torch.linalg.eigh(torch.autograd.functional.hessian(loss, point))
    assert values.min() >= -1e-12 * values.abs().max().clamp(min=1e-30), "no root"
    return (vectors * values.clamp(min=0).sqrt()).T


class Truth:
    """Of a model whose samples are counted by the first axes of inputs and output; ``chosen``, perhaps repeated."""

    def __init__(self, model, inputs, lossfunc, targets, chosen, approx=None, fisher="exact"):
        self.model, self.approx = model, approx
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.layers = {
            f"{path}.weight".lstrip("."): module
            for path, module in model.named_modules()
            if type(module).forward in FORWARDS and "weight" in module._parameters
        }
        size = {name: p.numel() for name, p in self.parameters.items()}
        self.blocks = {name: torch.zeros(n, n, dtype=torch.float64) for name, n in size.items()}
        self.factors = {}
        self.unknown = set()
        with torch.no_grad():
            out = model(inputs)
        for n in chosen:
            self._add(inputs[n : n + 1], columns_of(out, lossfunc, targets, n, fisher))
        for name, (_, inputs_moment) in self.factors.items():
            inputs_moment /= len(chosen)
            if isinstance(self.layers[name], nn.Embedding):
                self.factors[name].reverse()

    def _add(self, sample, columns):
        calls = {name: [] for name in self.layers}

        def keep(name):
            def hook(module, args, output):
                calls[name].append((args[0].detach(), output))
                return output.clone()  # which may be overwritten

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in self.layers.items()]
        out = self.model(sample)
        for handle in handles:
            handle.remove()
        used = [(name, x, z) for name, found in calls.items() for x, z in found if z.requires_grad]
        ends = [*self.parameters.values(), *(z for *_, z in used)]
        rows = []
        generic = torch.arange(1.0, out.numel() + 1, dtype=out.dtype).sin()  # columns may vanish
        for column in [generic, *columns]:
            grads = torch.autograd.grad(out, ends, column.reshape(out.shape), retain_graph=True, allow_unused=True)
            rows.append([torch.zeros_like(e) if g is None else g.to_dense() for e, g in zip(ends, grads, strict=True)])
        of_parameters = {}
        for place, name in enumerate(self.parameters):
            of_parameters[name] = rows[0][place].flatten()
            J = torch.stack([row[place].flatten() for row in rows[1:]])
            self.blocks[name] += J.T @ J
        for name in {name for name, *_ in used} & set(self.parameters):
            layer = self.layers[name]
            maps = []
            for place, (other, x, z) in enumerate(used, start=len(self.parameters)):
                if other == name:
                    maps.append(linear_map(layer, x, z, torch.stack([row[place] for row in rows])))
            x, g = torch.cat([x for x, _ in maps], 1), torch.cat([g for _, g in maps], 2)  # [G s i], [v G s o]
            if not torch.allclose(to_parameter(layer, x, g[:1])[0], of_parameters[name], rtol=1e-9, atol=1e-12):
                self.unknown.add(name)  # it is used elsewhere, too
            self._add_factors(name, layer, x, g[1:])

    def _add_factors(self, name, layer, x, g):
        s = x.shape[1]
        if self.approx == "expand":
            outputs = torch.einsum("vgso,vgsp->gop", g, g)
        else:
            outputs = torch.einsum("vgso,vgtp->gop", g, g)
        x = x.mean(1, keepdim=True) if self.approx == "reduce" else x
        moment = torch.einsum("gsi,gsj->gij", x, x) / (s if self.approx == "expand" else 1)
        if isinstance(layer, TRANSPOSED):
            B, A = outputs.mean(0), torch.block_diag(*moment)
        else:
            B, A = torch.block_diag(*outputs), moment.mean(0)
        A = A.diagonal().clone() if isinstance(layer, nn.Embedding) else A
        known = self.factors.setdefault(name, [torch.zeros_like(B), torch.zeros_like(A)])
        known[0] += B
        known[1] += A

    def block(self, name):
        """In the order of the factors."""
        weight = self.parameters[name]
        if not isinstance(self.layers.get(name), TRANSPOSED):
            return self.blocks[name]
        order = torch.arange(weight.numel()).reshape(weight.shape).transpose(0, 1).flatten()
        return self.blocks[name][order][:, order]


def linear_map(layer, x, z, g):
    """Inputs ``[G s i]`` and cotangents ``[v G s o]`` of a layer called with ``x`` of one sample, of output ``z``."""
    weight = layer.weight.detach()
    axis = 1 if isinstance(layer, LAYERS[1:-1]) else z.dim() - 1
    outputs = g.movedim(axis + 1, -1).reshape(len(g), -1, z.shape[axis])
    if isinstance(layer, nn.Embedding):
        hot = nn.functional.one_hot(x.flatten(), len(weight)).double()
        counts = torch.ones_like(outputs[0, :, :1])
        if layer.padding_idx is not None:
            counts = (x.reshape(-1, 1) != layer.padding_idx).double()
        return (hot * counts)[None], (outputs * counts)[:, None]
    # The output is linear in the weight: its derivative by row o of the weight is the input, where o is an output.
    derivative = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)), weight
    )
    derivative = derivative.movedim(axis, z.dim() - 1).reshape(-1, z.shape[axis], *weight.shape)
    groups = getattr(layer, "groups", 1)
    each = z.shape[axis] // groups
    inputs = []
    for group in range(groups):
        first = derivative[:, group * each]
        if isinstance(layer, TRANSPOSED):
            rows = slice(group * len(weight) // groups, (group + 1) * len(weight) // groups)
            inputs.append(first[:, rows, 0].flatten(1))
        else:
            inputs.append(first[:, group * each].flatten(1))
    return torch.stack(inputs), outputs.unflatten(2, (groups, each)).transpose(1, 2)


def to_parameter(layer, x, g):
    """The pull-back of the parameter that such inputs and cotangents make up, ``[v, p]``."""
    found = torch.einsum("vgso,gsi->vgoi", g, x)
    if isinstance(layer, nn.Embedding):
        return found[:, 0].transpose(1, 2).flatten(1)
    if isinstance(layer, TRANSPOSED):
        groups, weight = len(x), layer.weight
        found = found.unflatten(3, (len(weight) // groups, -1)).transpose(2, 3)  # [v G i o k]
    return found.flatten(1)


def check(name, parameter, truth, factors, eigen, close, rtol=1e-8):
    """What is known of the factors and of the eigendecomposition of a parameter; how much that was."""
    block = truth.block(name)
    if len(factors) == 1:
        assert close(factors[0], block, rtol=rtol), f"{name}: factor"
    elif name in truth.factors and name not in truth.unknown:
        for found, expected in zip(factors, truth.factors[name], strict=True):
            assert close(found, expected, rtol=rtol), f"{name}: factor"
    if eigen is None:
        return
    bases, eigenvalues = eigen
    dense = []
    for basis, factor in zip(bases, factors, strict=True):
        dense.append((torch.diag(basis) if basis.dim() == 1 else basis).contiguous())  # ``kron`` fails for some strides
        if factor.dim() == 2:
            turned = basis.T @ factor @ basis
            size = factor.abs().max()
            assert close(turned, torch.diag(turned.diagonal()), size, rtol), f"{name}: eigenvectors"
        assert close(dense[-1].T @ dense[-1], torch.eye(len(factor), dtype=factor.dtype), rtol=rtol), f"{name}: basis"
    U = dense[0]
    for basis in dense[1:]:
        U = torch.kron(U, basis)
    along = (U.T @ block @ U).diagonal()
    assert close(eigenvalues.flatten(), along, block.abs().max(), rtol), f"{name}: eigenvalues"
