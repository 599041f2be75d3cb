"""SSL-EY: the Eckart-Young loss of generalised eigenproblems, for two or more views through one encoder.

Chapman, Wells & Aguila, "Unconstrained Stochastic CCA: Unifying Multiview and Self-Supervised Learning" (ICLR 2024,
arXiv:2310.01012). This is the published form without ridge. The divisor is N - 1, where N is the number of rows on all
processes, not a configured batch size. The estimator "plugin" is the published one. "split" (two half batches, as in
the paper's stochastic variant) and "ustat" are unbiased for ||V||^2.

For more than two views the loss is the mean of the two-view loss over all unordered pairs of views. The published code
has two views only. With the covariance C_v of each view and the standardised rows S_v, the mean needs one covariance
per view, not one per pair: ``sum_(a<b) ||C_a + C_b||^2 = (V - 2) sum_v ||C_v||^2 + ||sum_v C_v||^2``.
"""

from functools import reduce
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_choice, check_result, check_rows, compute_dtype
from plugins.distributed import LOCAL, Collective
from plugins.linalg import (
    FORMS,
    attach_gradient,
    gram_is_cheaper,
    split_square,
    squared_norm,
    standardized_rows,
    ustat_square,
)

ESTIMATORS = ("plugin", "split", "ustat")


class SSLEYLossTerms(NamedTuple):
    """``loss = whitening + alignment - D``. Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    whitening: Float[Tensor, ""]
    """||V - I||^2, estimated as ||V||^2 - 2 tr V + D; 0 if the covariances of the two views add up to the identity."""
    alignment: Float[Tensor, ""]
    """2 / (N - 1) ||X - Y||^2, X and Y centred; 0 if the views agree."""


def ssl_ey_loss(
    z0: Float[Tensor, "B D"],
    z1: Float[Tensor, "B D"],
    *others: Float[Tensor, "B D"],
    comm: Collective = LOCAL,
    form: str = "auto",
    estimator: str = "plugin",
) -> Float[Tensor, ""]:
    """Eckart-Young loss of two views, ``L = -2 tr C + ||V||^2``, or its mean over all pairs of views.

    With X, Y the views' N joined rows minus their column means: C = 2 / (N - 1) X^T Y, V = (X^T X + Y^T Y) / (N - 1).
    The loss determines the scale of the embedding: do not normalise between projector and loss. With "plugin",
    L >= -min(D, N - 1). Compare values only at equal N and D, because the estimate of ||V||^2 is biased upwards by
    about (tr V)^2 / N.

    Args:
        z0: projections of the first view, one row per sample of this process.
        z1: projections of the second view, in the same order.
        others: projections of further views, in the same order. With V views the loss is the mean over their
            V (V - 1) / 2 unordered pairs.
        comm: the processes that share the batch. "plugin" communicates D x D statistics (V of them for more than two
            views) or V N x D rows, whichever is less, and nothing in backward. The other estimators gather the rows.
        form: "covariance" (D x D), "gram" (rows x rows) or "auto", the cheaper one. The value is the same.
        estimator: how ||V||^2 is estimated: "plugin" from all rows; "split", tr(V_a V_b) of the rows of even and of odd
            index; "ustat", the unbiased mean over all quadruples of distinct rows, with a lower variance than "split".

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input).

    Raises:
        ValueError: the shapes differ, the form or estimator is unknown, or all processes together have fewer than two
            rows (four for "split" and "ustat"), or (on the CPU) an argument holds NaN or inf.

    >>> z = torch.tensor([[0.5, 0.0], [-0.5, 0.0]])
    >>> ssl_ey_loss(z, z).item()  # the minimum, -min(D, N - 1)
    -1.0
    """
    return ssl_ey_terms(z0, z1, *others, comm=comm, form=form, estimator=estimator).loss


def ssl_ey_terms(
    z0: Float[Tensor, "B D"],
    z1: Float[Tensor, "B D"],
    *others: Float[Tensor, "B D"],
    comm: Collective = LOCAL,
    form: str = "auto",
    estimator: str = "plugin",
) -> SSLEYLossTerms:
    """Return :func:`ssl_ey_loss` and its two parts."""
    named = {f"z{view}": z for view, z in enumerate((z0, z1, *others))}
    check_rows(**named)
    check_choice("form", form, FORMS)
    check_choice("estimator", estimator, ESTIMATORS)
    dtype = compute_dtype(reduce(torch.promote_types, [z.dtype for z in (z0, z1, *others)]))
    with torch.autocast(z0.device.type, enabled=False):
        views = [z.to(dtype) for z in (z0, z1, *others)]
        square, trace, cross, loss = (_plugin if estimator == "plugin" else _unbiased)(views, comm, form, estimator)
        whitening, alignment = square - 2 * trace + z0.shape[1], 2 * trace - 4 * cross
    check_result("the SSL-EY loss", loss, comm, **named)
    return SSLEYLossTerms(loss, whitening.detach(), alignment.detach())


def _unbiased(
    views: list[Tensor], comm: Collective, form: str, estimator: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the means over the pairs of views of ||V||^2, tr V and tr C / 2, and the loss; autograd differentiates."""
    joined = comm.gather_rows(torch.stack(views, 1)).transpose(0, 1)
    estimate = split_square if estimator == "split" else ustat_square
    squares = [estimate(joined[[a, b]], form=form) for a, b in combinations(range(len(views)), 2)]
    square = sum(squares[1:], squares[0]) / len(squares)
    s = (joined - joined.mean(1, keepdim=True)) * (joined.shape[1] - 1) ** -0.5
    own = s.square().sum()
    cross = (s.sum(0).square().sum() - own) / (2 * len(squares))
    return square, own * (2 / len(views)), cross, square - 4 * cross


def _plugin(views: list[Tensor], comm: Collective, form: str, _: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same from all rows, with the analytic gradient."""
    return (_two_views if len(views) == 2 else _many_views)(views, comm, form)


def _many_views(views: list[Tensor], comm: Collective, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the means over all P pairs, and the loss with its gradient by S_v,

    ``4 / P (S_v (sum_u C_u + (V - 2) C_v) - sum_(u != v) S_u)``.

    In Gram form S_v C_u is the product of a block of the Gram matrix and S_u.
    """
    z, (rows, width) = torch.stack(views).detach(), views[0].shape
    count = len(views)
    pairs, what = count * (count - 1) / 2, "the SSL-EY loss"
    counts = [] if form == "covariance" else comm.row_counts(rows, z.device)
    if form == "gram" or (form == "auto" and gram_is_cheaper(sum(counts), width)):
        every = comm.gather_rows(z.transpose(0, 1), counts=counts).transpose(0, 1)
        every, factor = standardized_rows(every, what=what, overwrite=True)
        first = sum(counts[: comm.rank])
        s = every[:, first : first + rows]
        weights = (s.flatten(0, 1) @ every.flatten(0, 1).T).unflatten(1, (count, -1)).unflatten(0, (count, rows))
        own = weights.diagonal(dim1=0, dim2=2)  # [rows, N, V]: a view with itself
        parts = [squared_norm(weights), squared_norm(own), s.square().sum(), s.sum(0).square().sum()]
        of_sum, of_own, trace, of_rows = comm.sum(torch.stack(parts)).unbind()
        own.mul_(count - 1)
        gradient = (weights.flatten(0, 1).flatten(1) @ every.flatten(0, 1)).unflatten(0, (count, rows))
    else:
        s, factor = standardized_rows(z, comm, what=what, overwrite=True)
        covariances = comm.sum(s.mT @ s)
        total = covariances.sum(0)
        of_sum, of_own = squared_norm(total), squared_norm(covariances)
        trace, of_rows = total.trace(), comm.sum(s.sum(0).square().sum())
        gradient = s @ covariances.mul_(count - 2).add_(total)
    square, cross = ((count - 2) * of_own + of_sum) / pairs, (of_rows - trace) / (2 * pairs)
    loss = square - 4 * cross
    if torch.is_grad_enabled() and any(view.requires_grad for view in views):
        gradient.sub_(s.sum(0)).add_(s).mul_(4 / pairs * comm.size * factor)
        loss = attach_gradient(loss, views, gradient.unbind())
    return square, trace * (2 / count), cross, loss


def _two_views(views: list[Tensor], comm: Collective, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same of two views; the gradient is 4 / (N - 1) (X V - Y) by X, and likewise by Y.

    One product gives V, or this process's rows of S S^T, and a second one the gradient by this process's rows. That is
    8 N D^2 flops in all, 16 N^2 D in Gram form, where autograd through the formula takes 18 N D^2 + 6 D^3.
    """
    x, y = views
    z, rows, what = torch.stack([x, y]).detach(), x.shape[0], "the SSL-EY loss"
    counts = [] if form == "covariance" else comm.row_counts(rows, x.device)
    if form == "gram" or (form == "auto" and gram_is_cheaper(2 * sum(counts), x.shape[1])):
        z = comm.gather_rows(z.transpose(0, 1), counts=counts).transpose(0, 1)
        every, factor = standardized_rows(z, what=what, overwrite=True)
        first = sum(counts[: comm.rank])
        s = every[:, first : first + rows]
        left, right = s.flatten(0, 1) @ every.flatten(0, 1).T, every.flatten(0, 1)
        own = left.view(2, rows, 2, -1)[..., first : first + rows].diagonal(dim1=1, dim2=3).sum(-1)  # tr of u v^T
        square, trace, cross = comm.sum(torch.stack([squared_norm(left), own.trace(), own[0, 1]])).unbind()
    else:
        s, factor = standardized_rows(z, comm, what=what, overwrite=True)
        left = s.flatten(0, 1)
        right = comm.sum(left.T @ left)
        square, trace, cross = squared_norm(right), right.trace(), comm.sum((s[0] * s[1]).sum())
    loss = square - 4 * cross
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        by_x, by_y = (left @ right).chunk(2)
        scale = 4 * comm.size * factor
        loss = attach_gradient(loss, [x, y], [by_x.sub_(s[1]).mul_(scale), by_y.sub_(s[0]).mul_(scale)])
    return square, trace, cross, loss


class SSLEYLoss(nn.Module):
    """Module of :func:`ssl_ey_loss`; the arguments are the same."""

    def __init__(self, *, comm: Collective = LOCAL, form: str = "auto", estimator: str = "plugin") -> None:
        super().__init__()
        check_choice("form", form, FORMS)
        check_choice("estimator", estimator, ESTIMATORS)
        self.comm, self.form, self.estimator = comm, form, estimator

    def forward(
        self, z0: Float[Tensor, "B D"], z1: Float[Tensor, "B D"], *others: Float[Tensor, "B D"]
    ) -> Float[Tensor, ""]:
        return ssl_ey_loss(z0, z1, *others, comm=self.comm, form=self.form, estimator=self.estimator)

    def extra_repr(self) -> str:
        return f"form={self.form!r}, estimator={self.estimator!r}, comm={self.comm}"
