"""The base class of extensions that compute Kronecker factors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backpack.extensions.backprop_extension import Result
from backpack.extensions.curvature import CurvatureExtension
from backpack.extensions.merge_batches import Averaged, BatchShare, Listed, Summed
from backpack.samples import Subset
from backpack.uses import Individual
from backpack.uses.base import accumulate
from backpack.uses.kronecker import APPROXIMATIONS, LARGEST_FACTOR, assemble, complete, output_factors, separate

FISHER = {"mc": "sampled", "exact": "exact", "empirical": "gradient"}
"""The columns that are pulled back for each Fisher matrix, by their name in ``seeds``."""


FACTORS = Listed((Summed(1), Averaged(), Summed(1), Averaged()))
"""How the factors of batches are merged, which are kept apart for that."""


class KroneckerExtension(CurvatureExtension[Result]):
    """Kronecker factors of each parameter's block of the generalized Gauss-Newton matrix, a list of tensors.

    Their Kronecker product approximates the block in row-major order, as the original's does.

    - The matrix of a linear map (linear layers, convolutions, attention projections, recurrent weights) of shape
      ``[out, in]``, of a convolution ``[out, in, *kernel]``: ``[B, A]``. ``B``, with ``out`` rows, is the sum over
      samples and columns of the outer products of the cotangents: it carries the scale of the loss. ``A``, with
      ``in * kernel`` rows, is the mean over samples of the inputs' outer products. A matrix of shape ``[in, out]`` has
      ``[A, B]``. The factors of transposed convolutions refer to ``weight.transpose(0, 1)``.
    - Grouped convolutions: ``B`` is block-diagonal over groups; ``A``, with ``in / groups * kernel`` rows, is the mean
      over them (transposed: ``A`` is block-diagonal, ``B`` the mean).
    - Embeddings, of words and of positions: ``[A, B]``; ``A``, the mean count of each row, is diagonal and stored with
      one axis.
    - Biases, weights of normalizations, and all else: one factor, the exact block, of shape ``[p, p]``; with more than
      32,768 entries along one axis, its diagonal, of shape ``[p]``. Of parameters
      with several axes and more than 4,096 entries (position tables that are added, weights computed from others), two
      factors: with individual gradients ``G[r c]``, the axes being divided where the factors are smallest, the sums
      over samples and columns of ``G G^T``, and of ``G^T G`` divided by its trace. The product has the block's trace,
      and is the block for one sample and position of a linear map or table (Morwani et al., 2024, section 3).
    - Several extended losses in one backward pass: as of one loss with the columns of all. ``B`` is the sum over them,
      ``A`` is there once.
    - A parameter with several uses: those of one form, as of an unrolled cell, count as further positions; the factors
      of others, as of an embedding that is the output layer as well, are summed. Rows of a parameter that are used by
      themselves, as in cross attention, count like groups.

    - Complex parameters: Hermitian factors, of the sum of ``g g^H`` over samples and columns ``g``. ``A`` is the mean
      of ``conj(x) x^T``. Real parameters that are used as complex ones count as "all else".

    ``approx`` says what is done with ``S`` positions of a sample, inputs ``x_s`` and cotangents ``g_s``. The default is
    that of the original, ``sum_s x_s x_s^T`` and ``(sum_s g_s) (sum_s g_s)^T`` (Grosse & Martens, 2016, with this
    simplification of ``B``). Eschenhagen et al. (2023): ``"expand"``, ``1/S sum_s x_s x_s^T`` and ``sum_s g_s g_s^T``
    (section 3.2); ``"reduce"``, ``x x^T`` with ``x = 1/S sum_s x_s``, and ``(sum_s g_s) (sum_s g_s)^T`` (section 3.3).

    Args:
        subsampling: The samples that contribute. ``A`` is the mean over them, ``B`` keeps the full batch's scale.
        approx: ``None``, ``"expand"`` or ``"reduce"``.
        fisher: ``"exact"``: the generalized Gauss-Newton matrix. ``"mc"``: its estimate by ``mc_samples`` labels for
            each sample, drawn from the model's predictive distribution. ``"empirical"``: the gradients at the labels
            of the batch, of each term of the loss before reduction; their outer products are weighed as the loss
            weighs the terms (in a mean over ``N`` samples: by ``1/N``).

    Raises:
        ValueError: An argument is none of these. In the backward pass: a factor that is not diagonal would have more
            than 32,768 rows (4 GiB in ``float32``).
    """

    needs_samples_apart = True
    separated = False
    """Whether output and input factors that are summed in one factor are kept apart, since they scale differently."""

    def __init__(
        self,
        savefield: str | None = None,
        subsampling: Any = None,
        chunk_size: int | None = None,
        mc_samples: int = 1,
        approx: str | None = None,
        fisher: str = "exact",
    ) -> None:
        super().__init__(savefield, subsampling, chunk_size, mc_samples)
        if approx not in APPROXIMATIONS:
            raise ValueError(f'approx must be None, "expand" or "reduce", got {approx!r}.')
        if fisher not in FISHER:
            raise ValueError(f'fisher must be "mc", "exact" or "empirical", got {fisher!r}.')
        self.approx = approx
        self.fisher = fisher
        self.seeds = FISHER[fisher]
        self.semidefinite = fisher != "empirical"

    def compute(self, grads: Individual) -> Any:
        return output_factors(grads, self.approx)

    def merge(self, results: list[list[Tensor]]) -> list[Tensor]:
        terms = [[factor] for factor in results[0]]
        for further in results[1:]:
            for term, factor in zip(terms, further, strict=True):
                accumulate(term, factor)
        return [factor for (factor,) in terms]

    def complete(self, result: list[Tensor], grads: Individual) -> Any:
        return (separate if self.separated else complete)(grads, result, self.approx)

    def on_batch(self, share: BatchShare) -> KroneckerExtension:
        part = self.with_subset(Subset(share.rows))
        part.separated = True
        return part

    def entries(self, parameter: Tensor) -> int:
        rows = len(parameter) if parameter.dim() > 1 else 1
        sides = (rows, parameter.numel() // max(1, rows)) if rows > 1 else (parameter.numel(),)
        return sum(side**2 if side <= LARGEST_FACTOR else side for side in sides)

    def of_whole(self, name: str, merged: list[Tensor]) -> list[Tensor]:
        return assemble(merged)
