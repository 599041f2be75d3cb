"""Barlow Twins: the cross-correlation matrix of two views' embeddings becomes the identity.

Zbontar, Jing, Misra, LeCun & Deny, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction" (ICML 2021,
arXiv:2103.03230), eq. 1 and 2, with the published code's biased variance and its eps of 1e-5. Mean and variance are
those of the joined batch. In the published code and in solo-learn the gradient over W processes is about 1 / W of the
joined batch's, and in lightly each process standardises its own rows.

For more than two views the loss is the mean of the two-view loss over all unordered pairs of views. The published code
has two views only. The squares of C need no D x D matrix if there are few rows: with G_v = S_v S_v^T / N,
``||C_ab||^2 = <G_a, G_b>``.
"""

from collections.abc import Sequence
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
        rows = sum(counts)
        check_count(rows, least=2, what="the Barlow Twins loss")
        wanted = torch.is_grad_enabled() and any(view.requires_grad for view in views)
        if form == "gram" or (form == "auto" and gram_is_cheaper(rows, z0.shape[1])):
            z = torch.stack(views, 1).detach()
            gathered = comm.gather_rows(z, counts=counts).unbind(1)
            parts, inverse = _standardized(gathered, rows, LOCAL)
            every = torch.stack(parts)
            first = sum(counts[: comm.rank])
            own = every[:, first : first + len(z)]
            s = [*own]
            diagonals, squares, products, sums = _gram(every, own, wanted, comm)
        else:
            s, inverse = _standardized([view.detach() for view in views], rows, comm)
            diagonals, squares, products, sums = _covariance(s, wanted, comm)
        pairs = len(diagonals)
        invariance = (diagonals - 1).square().sum() / pairs
        redundancy = (squares - diagonals.square().sum()).clamp_min(0) / pairs
        loss = invariance + lambd * redundancy
        if wanted:
            slopes = (
                2 * (diagonals - 1) - 2 * lambd * diagonals
            )  # derivative by C_ii without the 2 lambd C_ij of all entries
            gradients = _gradients(s, inverse, diagonals, slopes, products, sums, 2 * lambd, comm.size / pairs)
            loss = attach_gradient(loss, views, gradients)
    terms = BarlowTwinsLossTerms(loss, invariance, redundancy)
    check_result("the Barlow Twins loss", terms.loss, comm, **named)
    return terms


def _gradients(
    s: Sequence[Tensor],
    inverse: Tensor,
    diagonals: Tensor,
    slopes: Tensor,
    products: list[Tensor],
    sums: list[Tensor],
    weight: float,
    scale: float,
) -> list[Tensor]:
    """Return the gradients by z_a: ``g_a - S_a diag(S_a^T g_a)`` over the standard deviation.

    g_a is the gradient by S_a.
    """
    pairs = list(combinations(range(len(s)), 2))
    found = []
    for a, (product, along) in enumerate(zip(products, sums, strict=True)):
        factor, along = inverse[a] * scale, weight * along
        gradient = product.mul_(weight * factor)
        for pair, diagonal, slope in zip(pairs, diagonals, slopes, strict=True):
            if a in pair:
                other = pair[0] if pair[1] == a else pair[1]
                gradient.addcmul_(s[other], slope * factor)
                along = along + slope * diagonal
        found.append(gradient.addcmul_(s[a], along * factor, value=-1))
    return found


def _covariance(
    s: Sequence[Tensor], wanted: bool, comm: Collective
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Compute one D x D matrix per pair of views.

    Returns:
        ``diag C_ab`` of each pair, the sum of the squares of all C_ab, and of each view ``sum_b S_b C_ab^T`` and
        ``diag sum_b C_ab C_ab^T``, on which the gradients depend.
    """
    views = range(len(s))
    diagonals, squares = [], s[0].new_zeros(())
    by_view: list[list[tuple[Tensor, Tensor]]] = [[] for _ in views]
    for a, b in combinations(views, 2):
        matrix = comm.sum(s[a].T @ s[b])
        diagonals.append(matrix.diagonal().clone())
        of_rows = torch.linalg.vector_norm(matrix, dim=1).square()
        squares = squares + of_rows.sum()
        if wanted:
            by_view[a].append((s[b] @ matrix.T, of_rows))
            by_view[b].append((s[a] @ matrix, matrix.square().sum(0)))
    products = [reduce(Tensor.add_, [product for product, _ in its]) for its in by_view if its]
    sums = [torch.stack([own for _, own in its]).sum(0) for its in by_view if its]
    return torch.stack(diagonals), squares, products, sums


def _gram(
    every: Tensor, s: Tensor, wanted: bool, comm: Collective
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Compute the same from this process's rows of one N x N matrix per view: ``sum_b S_b C_ab^T = sum_b G_b S_a``."""
    grams = s @ every.mT
    total = grams.sum(0)
    squares = (squared_norm(total) - squared_norm(grams)) / 2
    diagonals = torch.stack([(every[a] * every[b]).sum(0) for a, b in combinations(range(len(s)), 2)])
    if not wanted:
        return diagonals, comm.sum(squares), [], []
    products = torch.sub(total, grams) @ every
    sums = torch.cat([squares.reshape(1), (s * products).sum(1).flatten()])
    squares, *_ = sums = comm.sum(sums)
    return diagonals, squares, list(products.unbind()), list(sums[1:].view(len(s), -1).unbind())


def _standardized(
    views: Sequence[Float[Tensor, "B D"]], rows: int, comm: Collective
) -> tuple[list[Float[Tensor, "B D"]], Float[Tensor, "V 1 D"]]:
    """Return S_v, standardised columns over the square root of N, and ``1 / sqrt(N (var + eps))``."""
    means = comm.sum(torch.stack([z.sum(0, keepdim=True) for z in views])) / rows
    s = [z - mean for z, mean in zip(views, means, strict=True)]
    # a sum of squares: torch computes norms of columns several times more slowly
    inverse = (comm.sum(torch.stack([z.square().sum(0, keepdim=True) for z in s])) + rows * EPS).rsqrt()
    return [z.mul_(scale) for z, scale in zip(s, inverse, strict=True)], inverse


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
