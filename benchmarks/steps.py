"""How does each library compute a quantity? A step of each, as its users write it.

A step computes the quantity and the gradient, as this package's does. Quantities named "alone", and products in
``torch.func``, come without the gradient, where the library can leave it out. Steps that other libraries are compared
by return what they have computed.
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from subjects import ALONE, DEVICE, EXPAND, EXTENDED, OVER_DATA, PART, PRODUCTS, QUANTITIES, extensions_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

Step = Callable[[], Any]


class NotOffered(Exception):
    """The library has no such quantity."""


def plain(model: nn.Module, X: Tensor, y: Tensor, quantity: str = "") -> Step:
    lossfunc = nn.CrossEntropyLoss()

    def step() -> None:
        model.zero_grad()
        lossfunc(model(X), y).backward()

    return step


def of_backpack(model: nn.Module, X: Tensor, y: Tensor, quantity: str, **options: bool) -> Step:
    """This package or the original: whichever the environment has."""
    from backpack import backpack, extend, extensions

    wanted = extensions_of(quantity, len(X))
    missing = [name for name, _ in wanted if not hasattr(extensions, name)]
    if quantity.endswith((ALONE, OVER_DATA)) and not hasattr(extensions, "EKFAC"):
        missing = [quantity]  # the original computes what the gradients of parameters pass by
    if missing:
        raise NotOffered(", ".join(missing))
    if quantity.endswith(OVER_DATA):
        return _over_data(model, X, y, wanted)
    lossfunc = extend(nn.CrossEntropyLoss())
    model = extend(model, **options)
    wanted = [(name, _with_directions(model, arguments)) for name, arguments in wanted]
    products = [PRODUCTS[name] for name, _ in wanted if name in PRODUCTS]
    vectors = [torch.ones_like(p) for p in model.parameters()]

    def block() -> AbstractContextManager[Any]:
        if quantity == EXTENDED:
            return nullcontext()
        return backpack(*[getattr(extensions, name)(**arguments) for name, arguments in wanted])

    def step() -> list[Any]:
        model.zero_grad()
        output = model(X)
        loss = lossfunc(output, y)
        with block():
            if quantity.endswith(ALONE):
                torch.autograd.grad(loss, output)
            else:
                loss.backward(retain_graph=bool(products))
        for name in products:
            for parameter, vector in zip(model.parameters(), vectors, strict=True):
                getattr(parameter, name)(vector)
        fields = [getattr(extensions, name)(**arguments).savefield for name, arguments in wanted]
        return [getattr(p, field) for field in fields for p in model.parameters() if p.requires_grad]

    return step


def _with_directions(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    if "against" not in arguments:
        return arguments
    return {**arguments, "against": {p: torch.randn(arguments["against"], *p.shape) for p in model.parameters()}}


def _over_data(model: nn.Module, X: Tensor, y: Tensor, wanted: Sequence[tuple[str, dict[str, Any]]]) -> Step:
    """By ``accumulate``, from batches."""
    from backpack import accumulate, extensions

    data = DataLoader(TensorDataset(X, y), batch_size=PART)

    def step() -> list[Any]:
        own = [getattr(extensions, name)(**arguments) for name, arguments in wanted]
        found = accumulate(model, nn.CrossEntropyLoss(), data, *own)
        return [value for extension in own for value in found[extension.savefield].values()]

    return step


def of_individual(quantity: str, individual: list[Tensor]) -> list[Tensor]:
    """What users compute of individual gradients, for those quantities for which they are enough."""
    name = quantity.removesuffix(ALONE)
    if name == "BatchGrad":
        return individual
    squares = [grad.flatten(1).square().sum(1) for grad in individual]
    if name == "BatchL2Grad":
        return squares
    bound = QUANTITIES[quantity][0][1]["max_norm"]
    factor = (bound / torch.stack(squares).sum(0).sqrt()).clamp(max=1)
    return [torch.einsum("n,n...->...", factor, grad) for grad in individual]


OF_INDIVIDUAL = {name + more for name in ("BatchGrad", "BatchL2Grad", "ClippedGrad") for more in ("", ALONE)}


def of_functorch(model: nn.Module, X: Tensor, y: Tensor, quantity: str) -> Step:
    """As ``torch.func`` users write it; the gradient is the sum of the individual ones."""
    if quantity == "HMP":
        return _products_of_functorch(model, X, y)
    if quantity not in OF_INDIVIDUAL:
        raise NotOffered(quantity)
    lossfunc = nn.CrossEntropyLoss()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {}

    def one(parameters: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        output = torch.func.functional_call(model, parameters, (x.unsqueeze(0),))
        return lossfunc(output, label.unsqueeze(0)) / len(X)

    individual = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))

    def step() -> list[Tensor]:
        found.clear()
        found.update(individual(parameters, X, y))
        for name, parameter in model.named_parameters() if not quantity.endswith(ALONE) else ():
            parameter.grad = found[name].sum(0)
        return of_individual(quantity, [*found.values()])

    return step


def _products_of_functorch(model: nn.Module, X: Tensor, y: Tensor) -> Step:
    """Each parameter's block of the Hessian, times a vector."""
    lossfunc = nn.CrossEntropyLoss()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def product(name: str) -> Tensor:
        def loss(own: Tensor) -> Tensor:
            return lossfunc(torch.func.functional_call(model, {**parameters, name: own}, (X,)), y)

        vector = torch.ones_like(parameters[name])
        return torch.func.jvp(torch.func.grad(loss), (parameters[name],), (vector,))[1]

    return lambda: [product(name) for name in parameters]


def of_opacus(model: nn.Module, X: Tensor, y: Tensor, quantity: str) -> Step:
    """By hooks that compute individual gradients, beside the gradient."""
    if quantity not in OF_INDIVIDUAL - {"BatchGrad" + ALONE}:
        raise NotOffered(quantity)
    from opacus import GradSampleModule

    lossfunc = nn.CrossEntropyLoss()
    # "sum": leave the loss's own 1/N in place, as the others do.
    wrapped = GradSampleModule(model, batch_first=True, loss_reduction="sum")

    def step() -> list[Tensor]:
        wrapped.zero_grad()
        lossfunc(wrapped(X), y).backward()
        return of_individual(quantity, [p.grad_sample for p in model.parameters()])

    return step


def of_ghost_clipping(model: nn.Module, X: Tensor, y: Tensor, quantity: str) -> Step:
    """Opacus by norms without individual gradients, and a second backward pass for the clipped sum.

    Both passes compute gradients of parameters: the first one that of the mean, which is thrown away.
    """
    if quantity not in {"BatchL2Grad", "BatchL2Grad" + ALONE, "ClippedGrad" + ALONE}:
        raise NotOffered(quantity)
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    lossfunc = nn.CrossEntropyLoss(reduction="none")
    bound = QUANTITIES[quantity][0][1].get("max_norm", 1.0)
    wrapped = GradSampleModuleFastGradientClipping(
        model, batch_first=True, loss_reduction="sum", max_grad_norm=bound, use_ghost_clipping=True
    )

    def step() -> list[Tensor]:
        wrapped.zero_grad()
        losses = lossfunc(wrapped(X), y) / len(X)
        if not quantity.startswith("ClippedGrad"):
            losses.sum().backward()
            return [p._norm_sample.square() for p in model.parameters()]
        losses.sum().backward(retain_graph=True)
        wrapped.zero_grad()
        factor = wrapped.get_clipping_coef()
        wrapped.disable_hooks()
        (factor * losses).sum().backward()
        wrapped.enable_hooks()
        return [p.grad for p in model.parameters()]

    return step


class Terms(nn.Module):
    """Scores ``[N, C, T]`` to ``[N * T, C]``, one row for each term of the loss."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)


def of_curvlinops(model: nn.Module, X: Tensor, y: Tensor, quantity: str) -> Step:
    """Its factors; it gives no gradient, which a step of its own takes where it is wanted."""
    kinds = {"KFAC": "mc", "KFLR": "type-2", "EKFAC": "mc"}
    kind = quantity.removesuffix(ALONE).removesuffix(EXPAND)
    if kind not in kinds:
        raise NotOffered(quantity)
    from curvlinops import EKFACLinearOperator, KFACLinearOperator

    cls = EKFACLinearOperator if kind == "EKFAC" else KFACLinearOperator
    arguments = {"fisher_type": kinds[kind], "check_deterministic": False}
    gradient = (lambda: None) if quantity.endswith(ALONE) else plain(model, X, y)
    trained = [p for p in model.parameters() if p.requires_grad]
    whole, labels = (model, y) if y.dim() == 1 else (nn.Sequential(model, Terms()), y.flatten())

    def step() -> None:
        gradient()
        operator = cls(whole, nn.CrossEntropyLoss(), trained, [(X, labels)], **arguments)
        operator.compute_kronecker_factors()
        if kind == "EKFAC":
            operator.compute_eigenvalue_correction()

    return step


def of_kronfluence(model: nn.Module, X: Tensor, y: Tensor, quantity: str, empirical: bool = False) -> Step:
    """Covariances, eigendecompositions and eigenvalues of linear layers, which it puts into files."""
    if quantity != "EKFAC" + OVER_DATA:
        raise NotOffered(quantity)
    from kronfluence import Analyzer, FactorArguments, Task, prepare_model

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            inputs, labels = batch
            scores = model(inputs)
            if sample:
                labels = torch.multinomial(scores.detach().softmax(-1), 1).flatten()
            return cross_entropy(scores, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task, folder = Classification(), tempfile.TemporaryDirectory()
    options = {"cpu": DEVICE == "cpu", "output_dir": folder.name, "disable_tqdm": True}
    analyzer = Analyzer("benchmark", prepare_model(model, task), task, **options)
    names = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
    dtypes = {f"{name}_dtype": X.dtype for name in names}
    arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=empirical, **dtypes)
    fitting = {"per_device_batch_size": PART, "factor_args": arguments, "overwrite_output_dir": True}

    def step() -> dict[str, Any]:
        assert Path(folder.name).exists()  # it is deleted with this function
        analyzer.fit_all_factors("all", TensorDataset(X, y), **fitting)
        return analyzer.load_all_factors("all")

    return step


LIBRARIES = {
    "this package": (of_backpack, "backpack-for-pytorch"),
    "original": (of_backpack, "backpack-for-pytorch"),
    "torch.func": (of_functorch, "torch"),
    "Opacus": (of_opacus, "opacus"),
    "Opacus, ghost clipping": (of_ghost_clipping, "opacus"),
    "curvlinops": (of_curvlinops, "curvlinops-for-pytorch"),
    "kronfluence": (of_kronfluence, "kronfluence"),
}
"""Name to what makes a step, and to the distribution that has its version."""
