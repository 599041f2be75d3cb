"""MoCo: identify the key of an image among the keys of earlier images, which a queue stores.

He, Fan, Wu, Xie & Girshick, "Momentum Contrast for Unsupervised Visual Representation Learning" (CVPR 2020,
arXiv:1911.05722), eq. 1, and Chen, Fan, Girshick & He, "Improved Baselines with Momentum Contrastive Learning"
(2020, arXiv:2003.04297), which has the same loss at another temperature. The keys of the batch itself are not
negatives.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_range, check_result, check_rows, compute_dtype
from plugins.distributed import LOCAL, Collective
from plugins.linalg import directions, joined_mean


class MoCoTerms(NamedTuple):
    """Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    """In nats."""
    similarity: Float[Tensor, ""]
    """Mean cosine of query and key, in [-1, 1]."""
    accuracy: Float[Tensor, ""]
    """Share of the rows whose key has a larger cosine than all rows of the queue, in [0, 1]."""


def moco_loss(
    query: Float[Tensor, "B D"],
    key: Float[Tensor, "B D"],
    queue: Float[Tensor, "K D"],
    *,
    temperature: float = 0.2,
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """Mean over rows i of ``-log [exp(q_i · k_i / τ) / (exp(q_i · k_i / τ) + Σ_j exp(q_i · n_j / τ))]``.

    q and k are the rows of ``query`` and ``key``, normalised; n are the rows of the queue.

    Args:
        query: projections of the trained network.
        key: projections of the teacher, of another view of the same images; detached.
        queue: K ≥ 1 unit rows, the same on all processes; detached, and not normalised. Write the keys to it after
            this call.
        temperature: τ > 0; 0.07 in MoCo v1, 0.2 in v2.
        comm: the processes that share the batch. They exchange a few numbers.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input). The cosines of a row with a norm below 1e-8
        are 0, and it gets no gradient: its loss is log(K + 1).

    Raises:
        ValueError: the shapes do not fit, the temperature is out of range, or (on the CPU) an argument holds NaN or
            inf.

    Reference:
        arXiv:1911.05722, eq. 1.

    >>> round(moco_loss(torch.eye(2), torch.eye(2), torch.zeros(1, 2), temperature=1.0).item(), 4)  # log(1 + 1 / e)
    0.3133
    """
    return moco_terms(query, key, queue, temperature=temperature, comm=comm).loss


def moco_terms(
    query: Float[Tensor, "B D"],
    key: Float[Tensor, "B D"],
    queue: Float[Tensor, "K D"],
    *,
    temperature: float = 0.2,
    comm: Collective = LOCAL,
) -> MoCoTerms:
    """Return :func:`moco_loss`, the mean cosine of the pairs and the accuracy."""
    check_rows(query=query, key=key)
    check_rows(queue=queue)
    check_range("temperature", temperature, low=1e-6)
    if queue.shape[1] != query.shape[1] or not len(queue):
        raise ValueError(f"queue must have shape [K, {query.shape[1]}] with K >= 1, got {tuple(queue.shape)}")
    dtype = compute_dtype(query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        q, k = directions(query.to(dtype)), directions(key.detach().to(dtype))
        positive = (q * k).sum(1, keepdim=True)
        # a copy: autograd stores it for backward, and the caller writes the keys to the queue before that
        negatives = q @ queue.detach().to(dtype, copy=True).T
        log_mass = torch.cat([positive, negatives], 1).div(temperature).logsumexp(1, keepdim=True)
        rows = log_mass - positive / temperature
        shown = torch.cat([positive, (positive > negatives.amax(1, keepdim=True)).to(dtype)], 1).detach()
        loss, similarity, accuracy = joined_mean(torch.cat([rows, shown], 1), comm).unbind()
    check_result("the MoCo loss", loss, comm, query=query, key=key, queue=queue)
    return MoCoTerms(loss, similarity.detach(), accuracy.detach())


class MoCoLoss(nn.Module):
    """Module of :func:`moco_loss`; the arguments are the same. The caller owns the queue."""

    def __init__(self, *, temperature: float = 0.2, comm: Collective = LOCAL) -> None:
        super().__init__()
        check_range("temperature", temperature, low=1e-6)
        self.temperature, self.comm = temperature, comm

    def forward(
        self, query: Float[Tensor, "B D"], key: Float[Tensor, "B D"], queue: Float[Tensor, "K D"]
    ) -> Float[Tensor, ""]:
        return moco_loss(query, key, queue, temperature=self.temperature, comm=self.comm)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, comm={self.comm}"
