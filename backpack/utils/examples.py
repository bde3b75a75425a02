"""Handwritten digits for examples, and the diagonal of the generalized Gauss-Newton matrix by plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn import Module
from torch.utils.data import DataLoader, Dataset, TensorDataset

from backpack.utils._mnist import shipped_digits, training_digits

MEAN, STD = 0.1307, 0.3081  # of the training set's pixels, scaled to [0, 1]


def load_mnist_dataset() -> Dataset[tuple[Tensor, ...]]:
    """The 60,000 training digits of MNIST.

    Read from ``data/MNIST/raw`` below the working directory (torchvision's place and file names, gzipped or
    not), and downloaded to it where they are missing, which takes the extra ``download``.

    Returns:
        Pairs of an image, float32 ``[1, 28, 28]``, and a label, int64 ``[]``. Over all images, the pixels
        have mean 0 and standard deviation 1.

    Raises:
        OSError: No mirror delivered a file. The message says which files to put where.
        ModuleNotFoundError: A download is needed and the extra ``download`` is not installed.
        ValueError: A file on disk is damaged.
    """
    return TensorDataset(*_normalize(*training_digits()))


def get_mnist_dataloader(batch_size: int = 64, shuffle: bool = True) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of :func:`load_mnist_dataset`: images ``[N, 1, 28, 28]`` and labels ``[N]``."""
    return DataLoader(load_mnist_dataset(), batch_size=batch_size, shuffle=shuffle)


def load_one_batch_mnist(batch_size: int = 64, shuffle: bool = True, flat: bool = False) -> tuple[Tensor, Tensor]:
    """One batch of digits, without any download up to 1,000 of them: these are shipped with the package.

    Larger batches are taken from :func:`load_mnist_dataset`.

    Args:
        batch_size: Number of digits ``N``.
        shuffle: Draw them at random, as ``torch.manual_seed`` says, or take the first ones.
        flat: Images as vectors.

    Returns:
        Images as in :func:`load_mnist_dataset`, ``[N, 1, 28, 28]`` (flat: ``[N, 784]``), and labels, ``[N]``.

    Raises:
        ValueError: ``batch_size`` is below 1 or above the number of digits there are.
    """
    images, labels = shipped_digits()
    if batch_size > len(labels):
        images, labels = training_digits()
    if not 1 <= batch_size <= len(labels):
        raise ValueError(f"batch_size must lie between 1 and {len(labels)}, got {batch_size}.")
    chosen = torch.randperm(len(labels))[:batch_size] if shuffle else slice(batch_size)
    X, y = _normalize(images[chosen], labels[chosen])
    return (X.flatten(1) if flat else X), y


def _normalize(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    # Spelled out as float32, for the result must not follow torch.set_default_dtype.
    return images.unsqueeze(1).to(torch.float32).div_(255).sub_(MEAN).div_(STD), labels.long()


def autograd_diag_ggn_exact(
    X: Tensor,
    y: Tensor,
    model: Module,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    idx: Iterable[int] | None = None,
) -> Tensor:
    """Diagonal of the generalized Gauss-Newton matrix by plain autograd: slow, simple, for comparison.

    With the Jacobian ``J`` of the model's output with respect to the parameters that require a gradient, and
    the Hessian ``H`` of the loss with respect to that output, the matrix is ``Jᵀ H J`` (Schraudolph, 2002).
    It has the scale of the loss, ``reduction`` included. Every entry takes two backward passes.

    Args:
        X: The model's input.
        y: The loss's target.
        model: Its parameters, flattened and joined in the order of ``parameters()``, number the entries.
        loss_function: Maps output and target to a scalar.
        idx: Entries to compute; all by default.

    Returns:
        The entries, ``[P]`` or ``[len(idx)]``.
    """
    output = model(X)
    (loss_grad,) = grad(loss_function(output, y), output, create_graph=True)
    # Jᵀu is linear in u: entry i's gradient is column i of J, whatever the value of u.
    u = torch.zeros_like(output, requires_grad=True)
    params = [p for p in model.parameters() if p.requires_grad]
    pulled_back = grad(output, params, u, create_graph=True, materialize_grads=True)
    entries = torch.cat([g.flatten() for g in pulled_back])

    def diagonal_entry(i: int) -> Tensor:
        (column,) = grad(entries[i], u, retain_graph=True)
        (curved,) = grad(loss_grad, output, column, retain_graph=True, materialize_grads=True)
        return (column * curved).sum()

    return torch.stack([diagonal_entry(i) for i in (range(len(entries)) if idx is None else idx)])
