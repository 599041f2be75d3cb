"""I-VNE+: views of an image agree, and the autocorrelation matrix of each view has a large von Neumann entropy.

Kim, Kang, Hwang, Shin & Rhee, "VNE: An Effective Method for Improving Deep Representation by Manipulating Eigenvalue
Distribution" (CVPR 2023, arXiv:2304.01434), with the weights and the pairs of views of the published code. The code
differentiates singular values: one that is 0, as in a constant embedding, gives NaN in the gradient. Here the gradient
``U log C`` comes from one symmetric eigendecomposition, of C or of the Gram matrix, and is finite for all batches.
Entropy and cosines are those of the joined batch.
"""

from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_choice, check_count, check_range, check_result, check_rows, check_whole, compute_dtype
from plugins.distributed import LOCAL, Collective
from plugins.linalg import FORMS, attach_gradient, eigh, gram_is_cheaper, tangent, unit_rows

ROUNDING = 8
"""Eigenvalues below this many units of rounding of the largest one count as 0."""


class IVNELossTerms(NamedTuple):
    """``loss = -alpha_1 * cosine - alpha_2 * entropy``. Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    cosine: Float[Tensor, ""]
    """Mean cosine over the pairs of views and the joined rows, in [-1, 1]; 1 if the views agree."""
    entropy: Float[Tensor, ""]
    """Mean entropy over the views, in nats: 0 if all rows are on a line, at most log min(N, D). Its exponential is an
    effective number of dimensions."""


def i_vne_loss(
    z0: Float[Tensor, "B D"],
    z1: Float[Tensor, "B D"],
    *others: Float[Tensor, "B D"],
    alpha_1: float = 4.16,
    alpha_2: float = 1.0,
    large: int = 2,
    form: str = "auto",
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """``L = -α₁ mean cos(z_a, z_b) - α₂ mean_v S(C_v)`` with ``S(C) = -tr(C log C)`` and ``C_v = U_v^T U_v / N``.

    U_v has the rows of z_v divided by their lengths, N joined rows; C_v is not centred. The pairs (a, b), a < b, have a
    large view a.

    Args:
        z0: projections of the first view, one row per sample of this process.
        z1: projections of the second view, in the same order.
        others: projections of further views, in the same order, large views first.
        alpha_1: weight α₁ of the cosine, ≥ 0 (dimensionless). The published 4.16 is log 64 for 64 images a step.
        alpha_2: weight α₂ of the entropy, ≥ 0 (dimensionless).
        large: number of large views, which are compared with all others; from 1 to the number of views.
        form: "covariance" (D x D), "gram" (N x N) or "auto", the smaller one. The value is the same.
        comm: the processes that share the batch. V D x D statistics or V N x D rows are communicated, and nothing in
            backward.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input). A row with a norm below 1e-12 counts as zero.

    Raises:
        ValueError: the shapes differ, the form is unknown, a weight or the number of large views is out of range, or
            all processes together have fewer than two rows, or (on the CPU) an argument holds NaN or inf.

    >>> z = torch.eye(4)
    >>> round(i_vne_loss(z, z, alpha_1=1.0).item(), 4)  # -1 - log 4
    -2.3863
    >>> round(i_vne_loss(torch.ones(4, 3), torch.ones(4, 3)).item(), 4)  # collapsed
    -4.16
    """
    return i_vne_terms(z0, z1, *others, alpha_1=alpha_1, alpha_2=alpha_2, large=large, form=form, comm=comm).loss


def i_vne_terms(
    z0: Float[Tensor, "B D"],
    z1: Float[Tensor, "B D"],
    *others: Float[Tensor, "B D"],
    alpha_1: float = 4.16,
    alpha_2: float = 1.0,
    large: int = 2,
    form: str = "auto",
    comm: Collective = LOCAL,
) -> IVNELossTerms:
    """Return :func:`i_vne_loss` and its two parts."""
    named = {f"z{view}": z for view, z in enumerate((z0, z1, *others))}
    check_rows(**named)
    _check(alpha_1, alpha_2, large, form)
    count, what = len(named), "the I-VNE+ loss"
    check_range("large", large, low=1, high=count)
    dtype = compute_dtype(reduce(torch.promote_types, [z.dtype for z in named.values()]))
    with torch.autocast(z0.device.type, enabled=False):
        views = [z.to(dtype) for z in named.values()]
        unit, inverse = unit_rows(torch.stack(views))
        counts = comm.row_counts(len(z0), z0.device)
        rows = sum(counts)
        check_count(rows, least=2, what=what)
        every = None
        if form == "gram" or (form == "auto" and gram_is_cheaper(rows, z0.shape[1])):
            every = comm.gather_rows(unit.transpose(0, 1), counts=counts).transpose(0, 1)
            values, log = _spectrum(every @ every.mT / rows)
        else:
            values, log = _spectrum(comm.sum(unit.mT @ unit / rows))
        entropy = torch.special.entr(values).sum() / count
        pairs = large * (large - 1) // 2 + large * (count - large)
        partners = unit[:large].sum(0).expand_as(unit).clone()  # of each view: the sum of those it is compared with
        partners[:large] = unit.sum(0) - unit[:large]
        cosine = comm.sum((unit * partners).sum()) / (2 * pairs * rows)  # each pair twice
        loss = -alpha_1 * cosine - alpha_2 * entropy
        if torch.is_grad_enabled() and any(view.requires_grad for view in views):
            first = sum(counts[: comm.rank])
            slope = unit @ log if every is None else log[:, first : first + len(z0)] @ every
            gradient = slope.mul_(2 * alpha_2 / (count * rows)).add_(partners, alpha=-alpha_1 / (pairs * rows))
            loss = attach_gradient(loss, views, tangent(gradient, unit, inverse).mul_(comm.size).unbind())
    check_result(what, loss, comm, **named)
    return IVNELossTerms(loss, cosine, entropy)


def _spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, ≥ 0, and the logarithm of the matrix.

    The logarithm of an eigenvalue λ is bounded from below by that of a rounding error. ``U q`` is about sqrt(N λ) for
    its eigenvector q, so that the gradient ``U log C`` loses nothing. NaN is left out, because solvers raise errors for
    it: the cosines carry it to the loss.
    """
    values, vectors = eigh(matrix.nan_to_num())
    precision = torch.finfo(values.dtype)
    smallest = (ROUNDING * precision.eps * values.amax(-1, keepdim=True)).clamp_min(precision.tiny)
    log = (vectors * values.clamp_min(smallest).log().unsqueeze(-2)) @ vectors.mT
    return torch.where(values > smallest, values, 0), log


def _check(alpha_1: float, alpha_2: float, large: int, form: str) -> None:
    check_range("alpha_1", alpha_1, low=0)
    check_range("alpha_2", alpha_2, low=0)
    check_whole("large", large, low=1)
    check_choice("form", form, FORMS)


class IVNELoss(nn.Module):
    """Module of :func:`i_vne_loss`; the arguments are the same."""

    def __init__(
        self,
        *,
        alpha_1: float = 4.16,
        alpha_2: float = 1.0,
        large: int = 2,
        form: str = "auto",
        comm: Collective = LOCAL,
    ) -> None:
        super().__init__()
        _check(alpha_1, alpha_2, large, form)
        self.weights = {"alpha_1": alpha_1, "alpha_2": alpha_2}
        self.large, self.form, self.comm = large, form, comm

    def forward(
        self, z0: Float[Tensor, "B D"], z1: Float[Tensor, "B D"], *others: Float[Tensor, "B D"]
    ) -> Float[Tensor, ""]:
        return i_vne_loss(z0, z1, *others, **self.weights, large=self.large, form=self.form, comm=self.comm)

    def extra_repr(self) -> str:
        weights = ", ".join(f"{name}={value}" for name, value in self.weights.items())
        return f"{weights}, large={self.large}, form={self.form!r}, comm={self.comm}"
