"""DeepCluster: predict the cluster of each image, where k-means makes the clusters anew in each epoch.

Caron, Bojanowski, Joulin & Douze, "Deep Clustering for Unsupervised Learning of Visual Features" (ECCV 2018,
arXiv:1807.05520), eq. 1. The published code samples the same number of images from each cluster; weights of the images
in the ordinary order have the same expectation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from plugins.checks import check_result, check_rows, compute_dtype
from plugins.distributed import LOCAL, Collective
from plugins.linalg import labelled_mean


class DeepClusterTerms(NamedTuple):
    """Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    """In nats."""
    agreement: Float[Tensor, ""]
    """Share of the images whose cluster has the largest logit, in [0, 1]."""


def cluster_weights(labels: Int64[Tensor, " N"], clusters: int) -> Float[Tensor, " K"]:
    """Return the weight of an image by its cluster, ``n / (k' n_c)``: each of the k' clusters with images counts alike.

    Args:
        labels: clusters of all n images, in [0, K).
        clusters: K.

    >>> cluster_weights(torch.tensor([0, 0, 0, 2]), 3)
    tensor([0.6667, 0.0000, 2.0000])
    """
    sizes = torch.bincount(labels, minlength=clusters)
    weights = len(labels) / ((sizes > 0).sum() * sizes.clamp(min=1))
    return torch.where(sizes > 0, weights, 0)


def deepcluster_loss(
    logits: Float[Tensor, "B K"],
    labels: Int64[Tensor, " B"],
    *,
    weights: Float[Tensor, " K"] | None = None,
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """Mean over rows i of ``-w[label_i] log softmax(logits_i)[label_i]``, a sum over the number of rows, not of w.

    Args:
        logits: outputs of the top layer for K clusters.
        labels: clusters in [0, K); -100 leaves a row out.
        weights: w of each cluster, ≥ 0, see :func:`cluster_weights`; None is 1.
        comm: the processes that share the batch. They exchange two sums; backward communicates nothing.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input); 0 without labels.

    Raises:
        ValueError: a shape or dtype is wrong, or (on the CPU) a logit is NaN or inf.

    Reference:
        arXiv:1807.05520, eq. 1.

    >>> round(deepcluster_loss(torch.zeros(3, 5), torch.tensor([0, 1, 4])).item(), 5)  # log 5
    1.60944
    """
    return deepcluster_terms(logits, labels, weights=weights, comm=comm).loss


def deepcluster_terms(
    logits: Float[Tensor, "B K"],
    labels: Int64[Tensor, " B"],
    *,
    weights: Float[Tensor, " K"] | None = None,
    comm: Collective = LOCAL,
) -> DeepClusterTerms:
    """Return :func:`deepcluster_loss` and the share of labels that are predicted."""
    check_rows(logits=logits)
    if labels.dtype != torch.int64 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels must be int64 [B] with B = {len(logits)} rows, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if weights is not None and weights.shape != logits.shape[1:]:
        raise ValueError(f"weights must be [K] with K = {logits.shape[1]}, got shape {tuple(weights.shape)}")
    with torch.autocast(logits.device.type, enabled=False):
        scores, labelled, classes = logits.to(compute_dtype(logits.dtype)), labels >= 0, labels.clamp(min=0)
        losses = F.cross_entropy(scores, classes, reduction="none")
        if weights is not None:
            losses = losses * weights.to(losses.dtype)[classes]
        hits = (scores.detach().argmax(1) == labels).to(scores.dtype)
        values = torch.stack([losses, hits], 1)
        loss, agreement = labelled_mean(values, labelled.unsqueeze(1).expand(-1, 2), comm)
    check_result("the DeepCluster loss", loss, comm, logits=logits)
    return DeepClusterTerms(loss, agreement.detach())


class DeepClusterLoss(nn.Module):
    """Module of :func:`deepcluster_loss`; the arguments are the same."""

    def __init__(self, *, comm: Collective = LOCAL) -> None:
        super().__init__()
        self.comm = comm

    def forward(
        self, logits: Float[Tensor, "B K"], labels: Int64[Tensor, " B"], weights: Float[Tensor, " K"] | None = None
    ) -> Float[Tensor, ""]:
        return deepcluster_loss(logits, labels, weights=weights, comm=self.comm)

    def extra_repr(self) -> str:
        return f"comm={self.comm}"
