"""Matrix-SSL: matrix cross-entropies between the covariances of a student's predictions and a teacher's targets.

Zhang, Tan, Yang, Huang & Yuan, "Matrix Information Theory for Self-Supervised Learning" (ICML 2024, arXiv:2305.17326).
This is what the published code trains on, which differs from the paper: the logarithm is a series of order 4, the
weights are multiples of the identity instead of I / D, and the trace of the matrix cross-entropy, + tr Q, is left out.
"""

import warnings
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_choice, check_finite, check_result, check_rows, compute_dtype, not_finite
from plugins.distributed import LOCAL, Collective
from plugins.linalg import (
    FORMS,
    LinAlgError,
    attach_gradient,
    gram_is_cheaper,
    spectral_radius,
    squared_norm,
    tangent,
    unit_rows,
)
from plugins.losses.log_series import SeriesWatch
from plugins.losses.matrix_entropy import Entropies, Weights, from_covariances, from_grams
from plugins.losses.old_names import takes_old_names
from plugins.losses.pairs import Pair, of_pairs, of_two_views


class MatrixSSLTerms(NamedTuple):
    """Only ``loss`` has a gradient. The two parts, averaged over the pairs of views, are 0 for a constant batch.

    ``loss = uniformity + gamma * alignment + constant``; the constant is 0 at mu = 1, large and the same at every step
    otherwise.
    """

    loss: Float[Tensor, ""]
    uniformity: Float[Tensor, ""]
    alignment: Float[Tensor, ""]
    effective_rank: Float[Tensor, ""]
    """(tr C)^2 / ||C||^2 of the covariance of the student's unit rows: 1 on a line, D at most, 0 for equal rows.
    Log it: the loss hardly differs between a few modes (-2.01 for three, aligned) and all of them (-2)."""
    radius: Float[Tensor, ""]
    """Estimate of the largest spectral radius of the arguments of the series. Above 1 the series diverge; at mu = 1 it
    never exceeds 1."""


@takes_old_names
def matrix_ssl_loss(
    p0: Float[Tensor, "B D"],
    p1: Float[Tensor, "B D"],
    target0: Float[Tensor, "B D"],
    target1: Float[Tensor, "B D"],
    *,
    mce_lambd: float = 1.0,
    mce_mu: float = 1.0,
    gamma: float = 1.0,
    mce_order: int = 4,
    logarithm: str = "series",
    trace_term: bool = False,
    form: str = "auto",
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """``L = (U(target1, p0) + U(target0, p1)) / 2 + gamma (A(target1, p0) + A(target0, p1)) / 2``.

    ``U(t, p) = -lambda tr log(C_tp + mu I)`` and ``A(t, p) = -tr((C_tt + mu I) log(C_pp + mu I))``, where the rows of t
    and p are first divided by their lengths, then centred, and ``C_tp = t^T p / N`` over the N joined rows.

    Args:
        p0: the student's predictions of the first view.
        p1: the student's predictions of the second view.
        target0: the teacher's projections of the first view; detached.
        target1: the teacher's projections of the second view; detached.
        mce_lambd: lambda ≥ 0, weight of the uniformity (dimensionless).
        mce_mu: mu ≥ 0, added to the eigenvalues of the covariances (dimensionless, > 0 for "exact"). The published
            command uses 1 for both; the script's own default, 0.5, adds a constant of about D / 2.
        gamma: weight of the alignment, ≥ 0.
        mce_order: order of the series, ≥ 1. Odd orders have their minimum at rank one (collapse).
        logarithm: "series", or "exact". **"exact" is a different objective**: with gamma = 1 its minimum is at
            rank one, and a warning says so. For det(C_tp + mu I) < 0, possible with mu < 1, it takes log |det|.
        trace_term: add tr(C_tp + mu I) to U and tr(C_pp + mu I) to A, as in the paper. With lambda = mu = 1 the linear
            terms cancel and the minimum moves to C = 0, collapse: use it with a larger lambda only.
        form: "covariance" (D x D), "gram" (N x N) or "auto", the cheaper one. The value is the same.
        comm: the processes that share the batch. Either 4 N D numbers (rows) or 4 D^2 numbers (statistics) are
            communicated, whichever is less. Backward communicates nothing.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input). A row with a norm below 1e-12 counts as zero.

    Raises:
        ValueError: the shapes differ, an option is unknown or out of range, or all processes together have fewer than
            two rows, or (on the CPU; with the exact logarithm on any device) an argument holds NaN or inf.

    >>> v = torch.tensor([[3.0, 0.0], [-1.0, 0.0]])
    >>> round(matrix_ssl_loss(v, v, v, v).item(), 4)  # a line: -7/12 - 7/6
    -1.75
    """
    weights = _weights(mce_lambd, mce_mu, gamma, mce_order, logarithm, trace_term)
    return _matrix_ssl(of_two_views(p0, p1, target0, target1), weights, form, comm)[0]


@takes_old_names
def matrix_ssl_terms(
    p0: Float[Tensor, "B D"],
    p1: Float[Tensor, "B D"],
    target0: Float[Tensor, "B D"],
    target1: Float[Tensor, "B D"],
    *,
    mce_lambd: float = 1.0,
    mce_mu: float = 1.0,
    gamma: float = 1.0,
    mce_order: int = 4,
    logarithm: str = "series",
    trace_term: bool = False,
    form: str = "auto",
    comm: Collective = LOCAL,
) -> MatrixSSLTerms:
    """Return :func:`matrix_ssl_loss` and its parts."""
    weights = _weights(mce_lambd, mce_mu, gamma, mce_order, logarithm, trace_term)
    return _terms(*_matrix_ssl(of_two_views(p0, p1, target0, target1), weights, form, comm), mce_mu)


def matrix_ssl_pair_terms(
    pairs: Sequence[Pair],
    *,
    mce_lambd: float = 1.0,
    mce_mu: float = 1.0,
    gamma: float = 1.0,
    mce_order: int = 4,
    logarithm: str = "series",
    trace_term: bool = False,
    form: str = "auto",
    comm: Collective = LOCAL,
) -> MatrixSSLTerms:
    """Return the mean of ``U(t, p) + gamma A(t, p)`` over any pairs (p, t), for more than two views.

    Args:
        pairs: each a view's predictions and the targets of another view. The pairs (p0, target1) and (p1, target0) give
            :func:`matrix_ssl_terms`. A matrix may be part of several pairs.

    The other arguments, the result and the errors are those of :func:`matrix_ssl_loss`.

    >>> v = torch.tensor([[3.0, 0.0], [-1.0, 0.0]])
    >>> round(matrix_ssl_pair_terms([(v, v)]).loss.item(), 4)
    -1.75
    """
    weights = _weights(mce_lambd, mce_mu, gamma, mce_order, logarithm, trace_term)
    return _terms(*_matrix_ssl(of_pairs(pairs), weights, form, comm), mce_mu)


def _terms(loss: Tensor, pairs: list[Entropies], mce_mu: float) -> MatrixSSLTerms:
    with torch.autocast(loss.device.type, enabled=False):
        uniformity = torch.stack([pair.uniformity for pair in pairs]).mean()
        alignment = torch.stack([pair.alignment for pair in pairs]).mean()
        own = torch.stack([pair.own for pair in pairs])
        trace = own.diagonal(dim1=-2, dim2=-1).sum()
        rank = trace.square() / (len(pairs) * squared_norm(own)).clamp_min(torch.finfo(own.dtype).tiny)
        return MatrixSSLTerms(loss, uniformity, alignment, rank, _radius(pairs, mce_mu))


def _matrix_ssl(
    named: dict[str, Tensor], weights: Weights, form: str, comm: Collective
) -> tuple[Tensor, list[Entropies]]:
    """Return the loss and the entropies of each pair. The pairs are computed one by one, to use less memory."""
    check_rows(**named)
    check_choice("form", form, FORMS)
    tensors = list(named.values())
    try:
        loss, pairs = _value_and_pairs(tensors[::2], tensors[1::2], weights, form, comm)
    except LinAlgError:
        _check_finite(comm, **named)
        raise
    check_result("the Matrix-SSL loss", loss, comm, **named)
    # the solvers of the exact logarithm have synchronised with the device, so that another check costs nothing
    if weights.logarithm == "exact" and not torch.compiler.is_compiling() and not bool(loss.isfinite()):
        _check_finite(comm, **named)
    return loss, pairs


def _check_finite(comm: Collective, **tensors: Tensor) -> None:
    what = "the exact logarithm of the Matrix-SSL loss"
    check_finite(what, **tensors)
    if comm.size > 1:
        raise not_finite(what, "the rows of another process")


def _value_and_pairs(
    predictions: list[Tensor], targets: list[Tensor], weights: Weights, form: str, comm: Collective
) -> tuple[Tensor, list[Entropies]]:
    dtype = compute_dtype(reduce(torch.promote_types, [rows.dtype for rows in (*predictions, *targets)]))
    (rows, width), device = predictions[0].shape, predictions[0].device
    with torch.autocast(device.type, enabled=False):
        views = [p.to(dtype) for p in predictions]
        counts = comm.row_counts(rows, device)
        gram = form == "gram" or (form == "auto" and gram_is_cheaper(sum(counts), width))
        pairs, gradients = [], []
        for p, target in zip(views, targets, strict=True):
            unit, inverse = unit_rows(p)
            pair = torch.stack([unit, unit_rows(target.to(dtype))[0]])
            pairs.append(from_grams(pair, comm, weights, counts) if gram else from_covariances(pair, comm, weights))
            gradients.append(tangent(pairs[-1].gradient, unit, inverse).div_(len(views)))
        loss = torch.stack([pair.uniformity + weights.gamma * pair.alignment for pair in pairs]).mean()
        loss = loss + weights.constant(width)
        if torch.is_grad_enabled() and any(view.requires_grad for view in views):
            loss = attach_gradient(loss, views, gradients)
    return loss, pairs


def _radius(pairs: list[Entropies], mu: float) -> Tensor:
    matrices = torch.stack([matrix for pair in pairs for matrix in (pair.cross, pair.own)])
    return spectral_radius(matrices, shift=mu - 1).max()


def _weights(
    mce_lambd: float, mce_mu: float, gamma: float, mce_order: int, logarithm: str, trace_term: bool
) -> Weights:
    weights = Weights(mce_lambd, mce_mu, gamma, mce_order, logarithm, trace_term)
    weights.check()
    if logarithm == "exact" and not torch.compiler.is_compiling():
        warnings.warn(
            "the exact logarithm is another objective than Matrix-SSL's series: it rewards collapse onto a line",
            UserWarning,
            stacklevel=3,
        )
    return weights


class MatrixSSLLoss(nn.Module):
    """Module of :func:`matrix_ssl_loss`; the arguments are the same. It warns if a series diverges in training."""

    def __init__(
        self,
        *,
        mce_lambd: float = 1.0,
        mce_mu: float = 1.0,
        gamma: float = 1.0,
        mce_order: int = 4,
        logarithm: str = "series",
        trace_term: bool = False,
        form: str = "auto",
        comm: Collective = LOCAL,
    ) -> None:
        super().__init__()
        check_choice("form", form, FORMS)
        self.weights = _weights(mce_lambd, mce_mu, gamma, mce_order, logarithm, trace_term)
        self.form, self.comm = form, comm
        self.watch = SeriesWatch("the Matrix-SSL loss", "set mce_mu to 1 or less")

    @takes_old_names
    def forward(
        self,
        p0: Float[Tensor, "B D"],
        p1: Float[Tensor, "B D"],
        target0: Float[Tensor, "B D"],
        target1: Float[Tensor, "B D"],
    ) -> Float[Tensor, ""]:
        loss, pairs = _matrix_ssl(of_two_views(p0, p1, target0, target1), self.weights, self.form, self.comm)
        if self.training and self.weights.logarithm == "series":
            self.watch(lambda: _radius(pairs, self.weights.mce_mu))
        return loss

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.weights._asdict().items())
        return f"{options}, form={self.form!r}, comm={self.comm}"
