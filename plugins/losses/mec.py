"""Maximum entropy coding: the coding length of the cross-moment of a student's predictions and a teacher's targets.

Liu, Wang, Li & Wang, "Self-Supervised Learning via Maximum Entropy Coding" (NeurIPS 2022, arXiv:2210.11464). As in the
published code, the logarithm of the determinant is a series of order 4, the rows are not centred, and the value is
scaled such that its first-order term is minus the mean cosine. A re-implementation that returns mu times the trace has
a gradient mu N / lambda_inv = mu / eps_d times as large.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_choice, check_count, check_range, check_result, check_rows, check_whole, compute_dtype
from plugins.distributed import LOCAL, Collective
from plugins.linalg import (
    FORMS,
    attach_gradient,
    gram_is_cheaper,
    power_traces,
    spectral_radius,
    squared_norm,
    tangent,
    unit_rows,
)
from plugins.losses.log_series import SeriesWatch, log_series
from plugins.losses.old_names import takes_old_names
from plugins.losses.pairs import Pair, of_pairs, of_two_views

LEAST_EPS_D = 1e-6


class MECTerms(NamedTuple):
    """Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    similarity: Float[Tensor, ""]
    """Mean cosine of prediction and target."""
    effective_rank: Float[Tensor, ""]
    """(tr M)^2 / ||M||^2 of M = p^T p of the student's unit rows, not centred: 1 where all agree, D at most."""
    radius: Float[Tensor, ""]
    """Estimate of the larger spectral radius of the two arguments of the series. Above 1 the series diverges."""


@takes_old_names
def mec_loss(
    p0: Float[Tensor, "B D"],
    p1: Float[Tensor, "B D"],
    target0: Float[Tensor, "B D"],
    target1: Float[Tensor, "B D"],
    *,
    eps_d: float | Float[Tensor, ""],
    order: int = 4,
    form: str = "auto",
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """``L = -eps_d / 2 sum_(t, p) tr sum_(k=1)^K (-1)^(k+1) / k C^k`` with ``C = t^T p / (N eps_d)``.

    The pairs (t, p) are (target1, p0) and (target0, p1); their rows are divided by their lengths, N joined rows. In the
    paper's terms lambda_inv = N eps_d, and C may be the N x N matrix t p^T / lambda_inv: the traces are the same.

    Args:
        p0: the student's predictions of the first view.
        p1: the student's predictions of the second view.
        target0: the teacher's projections of the first view; detached.
        target1: the teacher's projections of the second view; detached.
        eps_d: distortion per dimension, > 0; published 64 / D = 1/32 at D = 2048. A smaller value spreads
            the embeddings more, but the series diverges sooner: start with eight times the value, see
            :func:`mec_warmup`. A 0-dim tensor is not checked, which avoids synchronisation and recompilation.
        order: K ≥ 1. Beyond the radius of convergence even orders repel and odd ones attract without bound.
        form: "covariance" (D x D), "gram" (N x N) or "auto", the cheaper one. The value is the same.
        comm: the processes that share the batch. Either 2 D^2 numbers (statistics) or 4 N D numbers (rows) are
            communicated, whichever is less. Backward communicates nothing.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input). A row shorter than 1e-12 counts as zero.

    Raises:
        ValueError: shapes differ, an unknown form, a number outside its range, no rows, or (on the CPU) an argument
            holds NaN or inf.

    >>> z = torch.eye(4)
    >>> round(mec_loss(z, z, z, z, eps_d=0.5).item(), 4)  # four eigenvalues 1 / 2: -2 (1/2 - 1/8 + 1/24 - 1/64)
    -0.8021
    """
    return _mec(of_two_views(p0, p1, target0, target1), eps_d, order, form, comm)[0]


@takes_old_names
def mec_terms(
    p0: Float[Tensor, "B D"],
    p1: Float[Tensor, "B D"],
    target0: Float[Tensor, "B D"],
    target1: Float[Tensor, "B D"],
    *,
    eps_d: float | Float[Tensor, ""],
    order: int = 4,
    form: str = "auto",
    comm: Collective = LOCAL,
) -> MECTerms:
    """Return :func:`mec_loss` and quantities to log; it computes one more product of the rows."""
    return _terms(*_mec(of_two_views(p0, p1, target0, target1), eps_d, order, form, comm), eps_d, comm)


def mec_pair_terms(
    pairs: Sequence[Pair],
    *,
    eps_d: float | Float[Tensor, ""],
    order: int = 4,
    form: str = "auto",
    comm: Collective = LOCAL,
) -> MECTerms:
    """Return the mean of ``-eps_d tr sum_(k=1)^K (-1)^(k+1) / k C^k`` over any pairs (p, t), for more than two views.

    Args:
        pairs: each a view's predictions and the targets of another view. The pairs (p0, target1) and (p1, target0) give
            :func:`mec_terms`. A matrix may be part of several pairs.

    The other arguments, the result and the errors are those of :func:`mec_loss`.

    >>> z = torch.eye(4)
    >>> round(mec_pair_terms([(z, z)], eps_d=0.5).loss.item(), 4)
    -0.8021
    """
    return _terms(*_mec(of_pairs(pairs), eps_d, order, form, comm), eps_d, comm)


def _terms(
    loss: Tensor, pairs: list[tuple[Tensor, Tensor]], joined: bool, eps_d: float | Tensor, comm: Collective
) -> MECTerms:
    with torch.autocast(loss.device.type, enabled=False):
        similarity = torch.stack([cross.trace() for cross, _ in pairs]).mean() * eps_d
        unit = torch.stack([rows for _, rows in pairs])
        small = joined and gram_is_cheaper(unit.shape[1], unit.shape[2])
        moments = unit @ unit.mT if small else unit.mT @ unit
        moments = moments if joined else comm.sum(moments)
        trace = moments.diagonal(dim1=-2, dim2=-1).sum()
        rank = trace.square() / (len(pairs) * squared_norm(moments)).clamp_min(torch.finfo(moments.dtype).tiny)
        return MECTerms(loss, similarity, rank, _radius(pairs))


def _mec(
    named: dict[str, Tensor], eps_d: float | Tensor, order: int, form: str, comm: Collective
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], bool]:
    """Return the loss, C and unit rows of p for each pair, and whether these are all rows or only this process's."""
    check_rows(**named)
    _check(eps_d, order, form)
    _, coefficients = log_series(order)
    dtype = compute_dtype(reduce(torch.promote_types, [matrix.dtype for matrix in named.values()]))
    predictions, targets = list(named.values())[::2], list(named.values())[1::2]
    (own_rows, width), device = predictions[0].shape, predictions[0].device
    with torch.autocast(device.type, enabled=False):
        views = [p.to(dtype) for p in predictions]
        counts = comm.row_counts(own_rows, device)
        rows, first = sum(counts), sum(counts[: comm.rank])
        check_count(rows, least=1, what="the MEC loss")
        gram = form == "gram" or (form == "auto" and gram_is_cheaper(rows * (1 if comm.size == 1 else 2), width))
        here = slice(first, first + own_rows)
        pairs, gradients, traces = [], [], []
        for p, t in zip(views, targets, strict=True):
            unit, inverse = unit_rows(p)
            every, target = unit, unit_rows(t.to(dtype))[0]
            if gram and comm.size > 1:
                every, target = comm.gather_rows(torch.stack([unit, target], 1), counts=counts).unbind(1)
            cross = (every @ target.T if gram else comm.sum(target.T @ unit)) / (rows * eps_d)
            trace, slope = power_traces(cross, coefficients)
            gradient = slope.T[here] @ target if gram else target @ slope.T
            gradients.append(tangent(gradient.mul_(-comm.size / (len(views) * rows)), unit, inverse))
            traces.append(trace)
            pairs.append((cross, every))
            del slope, target
        loss = -eps_d * sum(traces[1:], traces[0]) / len(traces)
        if torch.is_grad_enabled() and any(view.requires_grad for view in views):
            loss = attach_gradient(loss, views, gradients)
    check_result("the MEC loss", loss, comm, **named)
    return loss, pairs, gram or comm.size == 1


def _radius(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return spectral_radius(torch.stack([cross for cross, _ in pairs])).max()


def _check(eps_d: float | Tensor, order: int, form: str) -> None:
    check_choice("form", form, FORMS)
    check_whole("order", order, low=1)
    if not isinstance(eps_d, Tensor):
        check_range("eps_d", eps_d, low=LEAST_EPS_D)


def mec_warmup(step: int | Tensor, steps: int, start: float = 8.0) -> float | Tensor:
    """Return the factor of eps_d at a step: it falls linearly from ``start`` to 1 over the first ``steps`` steps.

    Args:
        step: number of earlier optimiser steps, ≥ 0. For a 0-dim tensor the result is one, without synchronisation.
        steps: length of the warm-up in steps, ≥ 0; 0 disables it. Published: ten epochs.
        start: factor at step 0, ≥ 1.

    Raises:
        ValueError: an argument outside its range.

    >>> [mec_warmup(step, 8) for step in (0, 1, 7, 8, 100)]
    [8.0, 7.0, 1.0, 1.0, 1.0]
    """
    if not isinstance(step, Tensor):
        check_range("step", step, low=0)
    check_range("steps", steps, low=0)
    check_range("start", start, low=1)
    if steps < 2:
        return 1.0
    covered = step / (steps - 1)
    return start + (1 - start) * (covered.clamp(max=1) if isinstance(covered, Tensor) else min(covered, 1))


class MECLoss(nn.Module):
    """Module of :func:`mec_loss`; the arguments are the same. It warns if the series diverges in training."""

    def __init__(self, *, eps_d: float, order: int = 4, form: str = "auto", comm: Collective = LOCAL) -> None:
        super().__init__()
        _check(eps_d, order, form)
        self.eps_d, self.order, self.form, self.comm = eps_d, order, form, comm
        self.watch = SeriesWatch("the MEC loss", "use a larger eps_d, or a longer warm-up of it")

    @takes_old_names
    def forward(
        self,
        p0: Float[Tensor, "B D"],
        p1: Float[Tensor, "B D"],
        target0: Float[Tensor, "B D"],
        target1: Float[Tensor, "B D"],
        *,
        warmup: float | Float[Tensor, ""] = 1.0,
    ) -> Float[Tensor, ""]:
        """Compute the loss; ``warmup`` multiplies eps_d, see :func:`mec_warmup`."""
        loss, pairs, _ = _mec(
            of_two_views(p0, p1, target0, target1), self.eps_d * warmup, self.order, self.form, self.comm
        )
        if self.training:
            self.watch(lambda: _radius(pairs))
        return loss

    def extra_repr(self) -> str:
        return f"eps_d={self.eps_d}, order={self.order}, form={self.form!r}, comm={self.comm}"
