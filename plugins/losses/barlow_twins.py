"""Barlow Twins: the cross-correlation matrix of two views' embeddings becomes the identity.

Zbontar, Jing, Misra, LeCun & Deny, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction" (ICML 2021,
arXiv:2103.03230), eq. 1 and 2, with the published code's biased variance and its eps of 1e-5. Mean and variance are
those of the joined batch. In the published code and in solo-learn the gradient over W processes is about 1 / W of the
joined batch's, and in lightly each process standardises its own rows.

For more than two views the loss is the mean of the two-view loss over all unordered pairs of views. The published code
has two views only. The squares of C need no D x D matrix if there are few rows: with G_v = S_v S_v^T / N,
``||C_ab||^2 = <G_a, G_b>``.
"""

from functools import reduce
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_choice, check_count, check_range, check_result, check_rows, compute_dtype
from plugins.distributed import LOCAL, Collective
from plugins.linalg import FORMS, attach_gradient, gram_is_cheaper, squared_norm

EPS = 1e-5
"""Added to the variance of each column."""


class BarlowTwinsLossTerms(NamedTuple):
    """``loss = invariance + lambd * redundancy``. Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    invariance: Float[Tensor, ""]
    """sum_i (C_ii - 1)^2: 0 if the views agree, D if the embedding is constant."""
    redundancy: Float[Tensor, ""]
    """sum_(i != j) C_ij^2: 0 if the columns are uncorrelated, D (D - 1) at most."""


def barlow_twins_loss(
    z0: Float[Tensor, "B D"],
    z1: Float[Tensor, "B D"],
    *others: Float[Tensor, "B D"],
    lambd: float = 0.0051,
    form: str = "auto",
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """``L = sum_i (C_ii - 1)^2 + lambd sum_(i != j) C_ij^2`` of the cross-correlation C of two views.

    ``C = S0^T S1 / N``, where each column of S_v is a column of z_v minus its mean, divided by ``sqrt(var + 1e-5)``;
    mean and biased variance over the N joined rows.

    Args:
        z0: projections of the first view, one row per sample of this process.
        z1: projections of the second view, in the same order.
        others: projections of further views, in the same order. With V views the loss is the mean over their
            V (V - 1) / 2 unordered pairs.
        lambd: weight λ of the off-diagonal terms, ≥ 0.
        form: "covariance" (D x D), "gram" (N x N) or "auto", the cheaper one. The value is the same.
        comm: the processes that share the batch. Means, variances and D x D statistics (one for each pair of views) or
            V N x D rows are communicated, and nothing in backward.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input).

    Raises:
        ValueError: the shapes differ, the form is unknown, λ is negative, or all processes together have fewer than two
            rows, or (on the CPU) an argument holds NaN or inf.

    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> round(barlow_twins_loss(z, z).item(), 4), round(barlow_twins_loss(z, -z).item(), 4)  # C = I and C = -I
    (0.0, 7.9999)
    """
    return barlow_twins_terms(z0, z1, *others, lambd=lambd, form=form, comm=comm).loss


def barlow_twins_terms(
    z0: Float[Tensor, "B D"],
    z1: Float[Tensor, "B D"],
    *others: Float[Tensor, "B D"],
    lambd: float = 0.0051,
    form: str = "auto",
    comm: Collective = LOCAL,
) -> BarlowTwinsLossTerms:
    """Return :func:`barlow_twins_loss` and its two parts."""
    named = {f"z{view}": z for view, z in enumerate((z0, z1, *others))}
    check_rows(**named)
    _check(lambd, form)
    dtype = compute_dtype(reduce(torch.promote_types, [z.dtype for z in named.values()]))
    with torch.autocast(z0.device.type, enabled=False):
        views = [z.to(dtype) for z in named.values()]
        counts = comm.row_counts(len(z0), z0.device)
        check_count(sum(counts), least=2, what="the Barlow Twins loss")
        wanted = torch.is_grad_enabled() and any(view.requires_grad for view in views)
        gram = form == "gram" or (form == "auto" and gram_is_cheaper(sum(counts), z0.shape[1]))
        terms, gradients = (_gram if gram else _covariance)(views, lambd, counts, wanted, comm)
        if wanted:
            terms = terms._replace(loss=attach_gradient(terms.loss, views, gradients))
    check_result("the Barlow Twins loss", terms.loss, comm, **named)
    return terms


def _covariance(
    views: list[Tensor], lambd: float, counts: list[int], wanted: bool, comm: Collective
) -> tuple[BarlowTwinsLossTerms, list[Tensor]]:
    """Return the terms and the gradients from one D x D matrix per pair; K(a, b) is dL / dC_ab times N."""
    rows = sum(counts)
    s, inverse = _standardized(torch.stack(views).detach(), rows, comm)
    pairs = list(combinations(range(len(views)), 2))
    gradient, along = torch.zeros_like(s), s.new_zeros(len(views), s.shape[-1])
    on, off = s.new_zeros(()), s.new_zeros(())
    for a, b in pairs:
        matrix = comm.sum(s[a].T @ s[b]).div_(rows)
        diagonal = matrix.diagonal()
        own = diagonal.square().sum()
        on = on + (diagonal - 1).square().sum()
        off = off + squared_norm(matrix) - own
        if wanted:
            slope = matrix.mul(2 * lambd)
            slope.diagonal().copy_(2 * (diagonal - 1))
            gradient[a].addmm_(s[b], slope.T)
            gradient[b].addmm_(s[a], slope)
            products = slope.mul_(matrix)
            along[a] += products.sum(1)
            along[b] += products.sum(0)
    gradient.addcmul_(s, along.unsqueeze(1), value=-1).mul_(inverse * (comm.size / (rows * len(pairs))))
    return _terms(on / len(pairs), off / len(pairs), lambd), list(gradient.unbind())


def _gram(
    views: list[Tensor], lambd: float, counts: list[int], wanted: bool, comm: Collective
) -> tuple[BarlowTwinsLossTerms, list[Tensor]]:
    """Return the same from one N x N matrix per view: the gradient by S_a of ``||C_ab||^2`` is 2 G_b S_a / N.

    ``along`` is the column sum of S_a times that gradient.
    """
    rows, count = sum(counts), len(views)
    every = comm.gather_rows(torch.stack(views, 1).detach(), counts=counts).transpose(0, 1)
    s, inverse = _standardized(every, rows, LOCAL)
    grams = (s @ s.mT).div_(rows)
    pairs = list(combinations(range(count), 2))
    diagonals = torch.stack([(s[a] * s[b]).sum(0) for a, b in pairs]).div_(rows)
    own = diagonals.square().sum()
    total = grams.sum(0)
    off = (squared_norm(total) - squared_norm(grams)) / 2 - own
    terms = _terms((diagonals - 1).square().sum() / len(pairs), off / len(pairs), lambd)
    if not wanted:
        return terms, []
    gradient = torch.sub(total, grams).mul_(2 * lambd) @ s
    # of the diagonal, which has other derivatives: 2 (C_ii - 1) in place of 2 lambd C_ii
    slopes = 2 * (diagonals - 1) - 2 * lambd * diagonals
    for (a, b), slope in zip(pairs, slopes, strict=True):
        gradient[a].addcmul_(s[b], slope)
        gradient[b].addcmul_(s[a], slope)
    along = (s * gradient).sum(1, keepdim=True).div_(rows)
    gradient.addcmul_(s, along, value=-1).mul_(inverse * (comm.size / (rows * len(pairs))))
    first = sum(counts[: comm.rank])
    return terms, list(gradient[:, first : first + counts[comm.rank]].unbind())


def _terms(invariance: Tensor, redundancy: Tensor, lambd: float) -> BarlowTwinsLossTerms:
    redundancy = redundancy.clamp_min(0)  # the difference of two sums
    return BarlowTwinsLossTerms(invariance + lambd * redundancy, invariance, redundancy)


def _standardized(
    z: Float[Tensor, "V B D"], rows: int, comm: Collective
) -> tuple[Float[Tensor, "V B D"], Float[Tensor, "V 1 D"]]:
    """Standardise the columns over all processes; return them and ``1 / sqrt(var + eps)``."""
    s = z - comm.sum(z.sum(1, keepdim=True)) / rows
    inverse = (comm.sum(s.square().sum(1, keepdim=True)) / rows + EPS).rsqrt()
    return s.mul_(inverse), inverse


def _check(lambd: float, form: str) -> None:
    check_range("lambd", lambd, low=0)
    check_choice("form", form, FORMS)


class BarlowTwinsLoss(nn.Module):
    """Module of :func:`barlow_twins_loss`; the arguments are the same."""

    def __init__(self, *, lambd: float = 0.0051, form: str = "auto", comm: Collective = LOCAL) -> None:
        super().__init__()
        _check(lambd, form)
        self.lambd, self.form, self.comm = lambd, form, comm

    def forward(
        self, z0: Float[Tensor, "B D"], z1: Float[Tensor, "B D"], *others: Float[Tensor, "B D"]
    ) -> Float[Tensor, ""]:
        return barlow_twins_loss(z0, z1, *others, lambd=self.lambd, form=self.form, comm=self.comm)

    def extra_repr(self) -> str:
        return f"lambd={self.lambd}, form={self.form!r}, comm={self.comm}"
