"""BYOL's regression of a prediction onto a target, for one ordered pair of views.

Grill et al., "Bootstrap Your Own Latent" (NeurIPS 2020, arXiv:2006.07733), Eq. 2, as a batch mean; the Euclidean
variant is the one that IsoLoss analyses (Srinath Halvagal, Laborieux & Zenke, NeurIPS 2023, arXiv:2212.04858). A method
sums it over both orders of the views.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_choice, check_result, check_rows, compute_dtype
from plugins.distributed import LOCAL, Collective
from plugins.linalg import joined_mean

METRICS = ("cosine", "euclidean")
EPS = 1e-8


class BYOLLossTerms(NamedTuple):
    """Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    similarity: Float[Tensor, ""]
    """Mean cosine of prediction and target, for either metric."""


def byol_loss(
    p: Float[Tensor, "B D"], target: Float[Tensor, "B D"], *, metric: str = "cosine", comm: Collective = LOCAL
) -> Float[Tensor, ""]:
    """Mean over rows of ``2 - 2 cos(p_i, target_i)``, or of ``||p_i - target_i||^2`` (summed over columns).

    Args:
        p: predictions.
        target: the teacher's projections of the same samples in the other view; detached.
        metric: "cosine" or "euclidean".
        comm: the processes that share the batch. The mean is over the rows of all processes, whose numbers may differ.
            Two floats are communicated.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input); in [0, 4] for "cosine". A row with a norm
        below 1e-8 counts as orthogonal to its target (value 2) and gets no gradient.

    Raises:
        ValueError: the shapes differ, the metric is unknown, there are no rows, or (on the CPU) an argument holds NaN
            or inf.

    >>> p, target = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> byol_loss(p, target).item(), byol_loss(p, target, metric="euclidean").item()
    (1.0, 1.5)
    """
    check_rows(p=p, target=target)
    check_choice("metric", metric, METRICS)
    loss = mean_distance(p, target, metric, comm)
    check_result("the BYOL loss", loss, comm, p=p, target=target)
    return loss


def mean_distance(
    p: Float[Tensor, "B D"], target: Float[Tensor, "B D"], metric: str, comm: Collective
) -> Float[Tensor, ""]:
    """Compute :func:`byol_loss` without checks of the arguments."""
    dtype = compute_dtype(torch.promote_types(p.dtype, target.dtype))
    with torch.autocast(p.device.type, enabled=False):
        p, target = p.to(dtype), target.detach().to(dtype)
        if metric == "euclidean":
            return joined_mean((p - target).square().sum(1), comm)
        lengths = torch.linalg.vector_norm(p, dim=1)
        lengths = torch.where(lengths > EPS, lengths, torch.inf)
        target_lengths = torch.linalg.vector_norm(target, dim=1).clamp_min(EPS)
        return joined_mean(2 - 2 * (p * target).sum(1) / lengths / target_lengths, comm)


def byol_terms(
    p: Float[Tensor, "B D"], target: Float[Tensor, "B D"], *, metric: str = "cosine", comm: Collective = LOCAL
) -> BYOLLossTerms:
    """Return :func:`byol_loss` and the mean cosine."""
    loss = byol_loss(p, target, metric=metric, comm=comm)
    cosine = loss if metric == "cosine" else mean_distance(p.detach(), target, "cosine", comm)
    return BYOLLossTerms(loss, 1 - cosine.detach() / 2)


class BYOLLoss(nn.Module):
    """Module of :func:`byol_loss`; the arguments are the same."""

    def __init__(self, *, metric: str = "cosine", comm: Collective = LOCAL) -> None:
        super().__init__()
        check_choice("metric", metric, METRICS)
        self.metric, self.comm = metric, comm

    def forward(self, p: Float[Tensor, "B D"], target: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
        return byol_loss(p, target, metric=self.metric, comm=self.comm)

    def extra_repr(self) -> str:
        return f"metric={self.metric!r}, comm={self.comm}"
