"""SimDINO: alignment with a teacher, and the coding rate of the student's large views instead of centre and prototypes.

Wu et al., "Simplifying DINO via Coding Rate Regularization" (ICML 2025, arXiv:2502.10385). As in the published code,
``eps`` is the square of the paper's ε, and the expansion has the factor (D + N) / (D N). The published code takes the
covariance of each process alone but divides it by the rows of all; here it is that of the joined rows.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_choice, check_count, check_range, check_result, check_views, compute_dtype
from plugins.distributed import LOCAL, Collective
from plugins.linalg import FORMS, attach_gradient, coding_rate, gram_is_cheaper, tangent, unit_rows

Views = Sequence[Float[Tensor, "B D"]]
EXPANSIONS = ("mean", "student")
LEAST_EPS_D = 1e-5


class SimDINOTerms(NamedTuple):
    """``loss = - weight * similarity - expansion``. Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    similarity: Float[Tensor, ""]
    """Mean cosine of student and teacher over the pairs of different views, in [-1, 1]."""
    expansion: Float[Tensor, ""]
    """Mean coding rate of the large views times (D + N) / (D N), in nats, at least 0."""


def simdino_terms(
    student: Views,
    teacher: Views,
    *,
    eps: float = 0.05,
    similarity_weight: float = 1.0,
    expansion_of: str = "mean",
    form: str = "auto",
    comm: Collective = LOCAL,
) -> SimDINOTerms:
    """Compute ``L = - λ mean_(v ≠ u) cos(t_u, s_v) - (D + N) / (D N) mean_u ½ logdet(I + D / (N eps) U_uᵀ U_u)``.

    s_v are the student's and t_u the teacher's rows, divided by their lengths, N joined rows. U_u is s_u, or the mean
    of s_u and t_u. The gradient is analytic: a product with the inverse from the Cholesky decomposition.

    Args:
        student: outputs of S ≥ 2 views.
        teacher: outputs of T ≥ 1 large views, the first of the student's; detached here.
        eps: the square of the paper's ε (dimensionless), at least 1e-5 D. A smaller one spreads the rows more.
        similarity_weight: λ ≥ 0.
        expansion_of: "mean" of student and teacher, or "student".
        form: "covariance" (D x D), "gram" (N x N) or "auto", the cheaper one. The value is the same.
        comm: the processes that share the batch. They exchange T D^2 numbers, or the rows if N < D.

    Returns:
        The loss of the joined batch and its terms, float32 (float64 for float64 input). A row shorter than 1e-12 counts
        as zero.

    Raises:
        ValueError: a tensor in place of a list, the shapes differ, the numbers of views do not fit, no rows, a number
            or name is not allowed, or (on the CPU) a view holds NaN or inf.

    >>> views = [torch.eye(4)] * 2  # N = D orthogonal rows: - 1 - log(1 + 1 / eps)
    >>> round(simdino_terms(views, views, eps=0.5).loss.item(), 5)
    -2.09861
    """
    named = check_views(student=student, teacher=teacher)
    if not 1 <= len(teacher) <= len(student) or len(student) < 2:
        raise ValueError(
            "simdino_loss needs at least 2 student views and 1 to as many teacher views, "
            f"got {len(student)} and {len(teacher)}"
        )
    (own_rows, width), device, large = student[0].shape, student[0].device, len(teacher)
    check_range("eps", eps, low=LEAST_EPS_D * width)
    check_range("similarity_weight", similarity_weight, low=0)
    check_choice("expansion_of", expansion_of, EXPANSIONS)
    check_choice("form", form, FORMS)
    dtype = compute_dtype(reduce(torch.promote_types, [view.dtype for view in named.values()]))
    with torch.autocast(device.type, enabled=False):
        views = [view.to(dtype) for view in student]
        counts = comm.row_counts(own_rows, device)
        rows = sum(counts)
        check_count(rows, least=1, what="the SimDINO loss")
        s, inverse = unit_rows(torch.stack([view.detach() for view in views]))
        t, _ = unit_rows(torch.stack([view.to(dtype) for view in teacher]))
        # Σ_u t_u - t_v is the sum over the teacher views that view v is compared with
        others = t.sum(0).expand_as(s).clone()
        others[:large] -= t
        pairs = large * (len(s) - 1)
        similarity = comm.sum((others * s).sum()) / (pairs * rows)
        share = 0.5 if expansion_of == "mean" else 1.0
        spread = (s[:large] + t) / 2 if expansion_of == "mean" else s[:large]
        gram = form == "gram" or (form == "auto" and gram_is_cheaper(rows, width))
        rate, slope = coding_rate(spread, width / (rows * eps), counts if gram else None, comm)
        factor = (width + rows) / (width * rows)
        expansion = factor * rate.mean()
        loss = -similarity_weight * similarity - expansion
        if torch.is_grad_enabled() and any(view.requires_grad for view in views):
            gradient = others.mul_(-similarity_weight / (pairs * rows))
            gradient[:large].sub_(slope, alpha=share * factor / large)
            loss = attach_gradient(loss, views, [*tangent(gradient.mul_(comm.size), s, inverse)])
    check_result("the SimDINO loss", loss, comm, **named)
    return SimDINOTerms(loss, similarity, expansion)


def simdino_loss(
    student: Views,
    teacher: Views,
    *,
    eps: float = 0.05,
    similarity_weight: float = 1.0,
    expansion_of: str = "mean",
    form: str = "auto",
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """Return the loss of :func:`simdino_terms`; the arguments are the same."""
    options = {"eps": eps, "similarity_weight": similarity_weight, "expansion_of": expansion_of, "form": form}
    return simdino_terms(student, teacher, **options, comm=comm).loss


class SimDINOLoss(nn.Module):
    """Module of :func:`simdino_terms`; the arguments are the same."""

    def __init__(
        self,
        *,
        eps: float = 0.05,
        similarity_weight: float = 1.0,
        expansion_of: str = "mean",
        form: str = "auto",
        comm: Collective = LOCAL,
    ) -> None:
        super().__init__()
        self.options = {"eps": eps, "similarity_weight": similarity_weight, "expansion_of": expansion_of, "form": form}
        self.comm = comm

    def forward(self, student: Views, teacher: Views) -> SimDINOTerms:
        return simdino_terms(student, teacher, **self.options, comm=self.comm)
