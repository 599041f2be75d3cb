"""VICReg: the views agree, each column varies, and no two columns correlate.

Bardes, Ponce & LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning" (ICLR 2022,
arXiv:2105.04906), eq. 1 to 6, with the factors of the published code: the invariance is a mean over columns too, and
the variance term is the mean over both views, not their sum. Statistics are those of the joined batch.

For more than two views the loss is the mean of the two-view loss over all unordered pairs of views. The published code
has two views only. The squares of a covariance need no D x D matrix if there are few rows: ``||S^T S|| = ||S S^T||``.
"""

from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_choice, check_range, check_result, check_rows, compute_dtype
from plugins.distributed import LOCAL, Collective
from plugins.linalg import FORMS, attach_gradient, centre_distance, gram_is_cheaper, squared_norm, standardized_rows

EPS = 1e-4
"""Added to the variance of each column."""


class VICRegLossTerms(NamedTuple):
    """``loss = sim_coeff * invariance + std_coeff * variance + cov_coeff * covariance``; only it has a gradient."""

    loss: Float[Tensor, ""]
    invariance: Float[Tensor, ""]
    """Mean squared difference of the views, per entry; 0 if they agree."""
    variance: Float[Tensor, ""]
    """Mean of ``max(0, 1 - sqrt(var + 1e-4))`` over columns and views, in [0, 0.99]; 0.99 for a constant embedding."""
    covariance: Float[Tensor, ""]
    """Sum of the squared covariances of different columns over D, added over the two views; 0 if none correlate."""


def vicreg_loss(
    z0: Float[Tensor, "B D"],
    z1: Float[Tensor, "B D"],
    *others: Float[Tensor, "B D"],
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    form: str = "auto",
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """``L = λ mean (z0 - z1)^2 + μ (v(z0) + v(z1)) / 2 + ν (c(z0) + c(z1))``.

    ``v(z) = mean_j max(0, 1 - sqrt(C_jj + 1e-4))`` and ``c(z) = sum_(i != j) C_ij^2 / D``, where C is the unbiased
    covariance of the N joined rows.

    Args:
        z0: projections of the first view, one row per sample of this process.
        z1: projections of the second view, in the same order.
        others: projections of further views, in the same order. With V views the loss is the mean over their
            V (V - 1) / 2 unordered pairs.
        sim_coeff: weight λ of the invariance, ≥ 0.
        std_coeff: weight μ of the variance, ≥ 0. The paper and solo-learn add v over both views: their 25 is 50 here.
        cov_coeff: weight ν of the covariance, ≥ 0.
        form: "covariance" (D x D), "gram" (N x N) or "auto", the cheaper one. The value is the same.
        comm: the processes that share the batch. Means and V D x D statistics or V N x D rows are communicated, and
            nothing in backward.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input).

    Raises:
        ValueError: the shapes differ, the form is unknown, a weight is negative, or all processes together have fewer
            than two rows, or (on the CPU) an argument holds NaN or inf.

    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> vicreg_loss(z, z).item(), round(vicreg_loss(z, -z).item(), 3)  # white views that agree, and that do not
    (0.0, 100.0)
    """
    return vicreg_terms(
        z0, z1, *others, sim_coeff=sim_coeff, std_coeff=std_coeff, cov_coeff=cov_coeff, form=form, comm=comm
    ).loss


def vicreg_terms(
    z0: Float[Tensor, "B D"],
    z1: Float[Tensor, "B D"],
    *others: Float[Tensor, "B D"],
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    form: str = "auto",
    comm: Collective = LOCAL,
) -> VICRegLossTerms:
    """Return :func:`vicreg_loss` and its three parts."""
    named = {f"z{view}": z for view, z in enumerate((z0, z1, *others))}
    check_rows(**named)
    _check(sim_coeff, std_coeff, cov_coeff, form)
    dtype = compute_dtype(reduce(torch.promote_types, [z.dtype for z in named.values()]))
    with torch.autocast(z0.device.type, enabled=False):
        views = [z.to(dtype) for z in named.values()]
        z = torch.stack(views).detach()
        count, width, what = len(z), z0.shape[1], "the VICReg loss"
        away, pull = centre_distance(z, count)
        counts = [] if form == "covariance" else comm.row_counts(len(z0), z0.device)
        gram = form == "gram" or (form == "auto" and gram_is_cheaper(sum(counts), width))
        if gram:
            every, factor = standardized_rows(
                comm.gather_rows(z.transpose(0, 1), counts=counts).transpose(0, 1), what=what
            )
            first = sum(counts[: comm.rank])
            s = every[:, first : first + len(z0)]
            weights = s @ every.mT
            diagonals = every.square().sum(1)
            squares = comm.sum(squared_norm(weights))
        else:
            every, (s, factor) = None, standardized_rows(z, comm, what=what, overwrite=True)
            weights = comm.sum(s.mT @ s)
            diagonals = weights.diagonal(dim1=1, dim2=2).clone()
            squares = squared_norm(weights)
        del z  # z was overwritten by s, or is not needed any more
        entries = factor**2 / (1 + factor**2) / width  # 1 / (N D)
        of_pairs = 2 * entries / (count - 1)  # a mean over the pairs is this multiple of the distances to the mean
        invariance = comm.sum(away) * of_pairs
        deviations = (diagonals + EPS).sqrt()
        short = (1 - deviations).clamp_min(0)
        variance = short.mean()
        covariance = (squares - squared_norm(diagonals)).clamp_min(0) * (2 / (count * width))
        loss = sim_coeff * invariance + std_coeff * variance + cov_coeff * covariance
        if torch.is_grad_enabled() and any(view.requires_grad for view in views):
            by_columns = (short > 0) / deviations * (-std_coeff / (count * width))
            by_columns = by_columns - diagonals * (8 * cov_coeff / (count * width))
            gradient = weights @ every if every is not None else s @ weights
            gradient.mul_(8 * cov_coeff / (count * width)).addcmul_(s, by_columns.unsqueeze(1)).mul_(factor)
            gradient.add_(pull.mul_(sim_coeff * of_pairs)).mul_(comm.size)
            loss = attach_gradient(loss, views, gradient.unbind())
    check_result(what, loss, comm, **named)
    return VICRegLossTerms(loss, invariance, variance, covariance)


def _check(sim_coeff: float, std_coeff: float, cov_coeff: float, form: str) -> None:
    for name, value in (("sim_coeff", sim_coeff), ("std_coeff", std_coeff), ("cov_coeff", cov_coeff)):
        check_range(name, value, low=0)
    check_choice("form", form, FORMS)


class VICRegLoss(nn.Module):
    """Module of :func:`vicreg_loss`; the arguments are the same."""

    def __init__(
        self,
        *,
        sim_coeff: float = 25.0,
        std_coeff: float = 25.0,
        cov_coeff: float = 1.0,
        form: str = "auto",
        comm: Collective = LOCAL,
    ) -> None:
        super().__init__()
        _check(sim_coeff, std_coeff, cov_coeff, form)
        self.weights = {"sim_coeff": sim_coeff, "std_coeff": std_coeff, "cov_coeff": cov_coeff}
        self.form, self.comm = form, comm

    def forward(
        self, z0: Float[Tensor, "B D"], z1: Float[Tensor, "B D"], *others: Float[Tensor, "B D"]
    ) -> Float[Tensor, ""]:
        return vicreg_loss(z0, z1, *others, **self.weights, form=self.form, comm=self.comm)

    def extra_repr(self) -> str:
        weights = ", ".join(f"{name}={value}" for name, value in self.weights.items())
        return f"{weights}, form={self.form!r}, comm={self.comm}"
