"""IsoLoss: BYOL's loss with a gradient that bypasses the predictor, so that all eigenmodes learn at the same rate.

Srinath Halvagal, Laborieux & Zenke, "Implicit variance regularization in non-contrastive SSL" (NeurIPS 2023,
arXiv:2212.04858). The gradient of the published cosine expression with respect to z is ``dL_BYOL/dp``, but its value
is not a distance. This implementation uses a straight-through prediction, ``z + stop_gradient(p - z)``, in BYOL's
loss: the gradient is the same, the value is BYOL's, and any predictor can be used.
"""

from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_choice, check_result, check_rows
from plugins.distributed import LOCAL, Collective
from plugins.losses.byol import METRICS, BYOLLossTerms, mean_distance

IsoLossTerms = BYOLLossTerms


def isoloss(
    z: Float[Tensor, "B D"],
    p: Float[Tensor, "B D"],
    target: Float[Tensor, "B D"],
    *,
    metric: str = "cosine",
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """Compute BYOL's loss of p and target, with the gradient ``dL/dz := dL_BYOL/dp``.

    Args:
        z: projections, the only argument that gets a gradient.
        p: predictions from z; for a closed-form predictor ``z @ W``.
        target: the teacher's projections of the same samples in the other view; detached.
        metric: "cosine" or "euclidean". Under "cosine" the gradient scales as 1 / ||p||, so that the scale of a
            closed-form predictor acts as a learning rate.
        comm: the processes that share the batch; the mean is over the rows of all processes.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input).

    Raises:
        ValueError: the shapes differ, the metric is unknown, there are no rows, or (on the CPU) an argument holds NaN
            or inf.

    >>> import torch
    >>> z = torch.tensor([[1.0, 1.0]], requires_grad=True)
    >>> loss = isoloss(z, z @ torch.diag(torch.tensor([1.0, 0.1])), torch.tensor([[0.0, 0.0]]), metric="euclidean")
    >>> loss.backward()
    >>> round(loss.item(), 4), z.grad  # 2 p, where BYOL's gradient would be 2 p W = [2, 0.02]
    (1.01, tensor([[2.0000, 0.2000]]))
    """
    return isoloss_terms(z, p, target, metric=metric, comm=comm).loss


def isoloss_terms(
    z: Float[Tensor, "B D"],
    p: Float[Tensor, "B D"],
    target: Float[Tensor, "B D"],
    *,
    metric: str = "cosine",
    comm: Collective = LOCAL,
) -> IsoLossTerms:
    """Return :func:`isoloss` and the mean cosine."""
    check_rows(z=z, p=p, target=target)
    check_choice("metric", metric, METRICS)
    loss = mean_distance(straight_through(z, p), target, metric, comm)
    check_result("the IsoLoss", loss, comm, z=z, p=p, target=target)
    cosine = loss if metric == "cosine" else mean_distance(p.detach(), target, "cosine", comm)
    return IsoLossTerms(loss, 1 - cosine.detach() / 2)


def straight_through(z: Float[Tensor, "B D"], p: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """Return the value of p with the gradient of z.

    ``z - z`` is exactly zero, whereas ``z + (p - z)`` would lose digits of p if z is large.
    """
    return p.detach() + (z - z.detach())


class IsoLoss(nn.Module):
    """Module of :func:`isoloss`; the arguments are the same."""

    def __init__(self, *, metric: str = "cosine", comm: Collective = LOCAL) -> None:
        super().__init__()
        check_choice("metric", metric, METRICS)
        self.metric, self.comm = metric, comm

    def forward(
        self, z: Float[Tensor, "B D"], p: Float[Tensor, "B D"], target: Float[Tensor, "B D"]
    ) -> Float[Tensor, ""]:
        return isoloss(z, p, target, metric=self.metric, comm=self.comm)

    def extra_repr(self) -> str:
        return f"metric={self.metric!r}, comm={self.comm}"
