"""DeepCluster v2: predict the clusters of each image, whose centroids are the prototypes of the classifier.

Caron, Misra, Mairal, Goyal, Bojanowski & Joulin, "Unsupervised Learning of Visual Features by Contrasting Cluster
Assignments" (NeurIPS 2020, arXiv:2006.09882), appendix D, with the values of its code.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from plugins.checks import check_range, check_result, check_rows, check_views, compute_dtype
from plugins.distributed import LOCAL, Collective
from plugins.linalg import directions, labelled_mean


class DeepClusterV2Terms(NamedTuple):
    """Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    """In nats; 0 if no image of the batch has a label."""
    agreement: Float[Tensor, ""]
    """Share of the labels whose prototype is the nearest one, in [0, 1]."""
    labelled: Float[Tensor, ""]
    """Share of the images of the batch with a label, in [0, 1]: those that the previous epoch has seen."""


def deepcluster_v2_loss(
    z: Sequence[Float[Tensor, "B D"]],
    labels: Int64[Tensor, "H B"],
    prototypes: Sequence[Float[Tensor, "K D"]],
    *,
    temperature: float = 0.1,
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """Mean over clusterings h of the mean over views and rows of ``-log softmax(u C_hᵀ / τ)[label]``, u = z / ‖z‖.

    Args:
        z: embeddings of V ≥ 1 views.
        labels: cluster of each image in each of H clusterings; -100 leaves an image out.
        prototypes: unit centroids C_h of each clustering; their numbers may differ. They have no gradient.
        temperature: τ > 0.
        comm: the processes that share the batch. They exchange a few sums; backward communicates nothing.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input). A clustering without labels counts as 0, so
        that a batch without labels has the loss 0 and the gradient 0.

    Raises:
        ValueError: a shape or dtype is wrong, the temperature is out of range, or (on the CPU) a view holds NaN or inf.

    Reference:
        arXiv:2006.09882, appendix D.

    >>> labels = torch.tensor([[0, 1, -100]])
    >>> round(deepcluster_v2_loss([torch.eye(3)] * 2, labels, [torch.eye(3)]).item(), 6)  # log(1 + 2 exp(-10))
    9.1e-05
    """
    return deepcluster_v2_terms(z, labels, prototypes, temperature=temperature, comm=comm).loss


def deepcluster_v2_terms(
    z: Sequence[Float[Tensor, "B D"]],
    labels: Int64[Tensor, "H B"],
    prototypes: Sequence[Float[Tensor, "K D"]],
    *,
    temperature: float = 0.1,
    comm: Collective = LOCAL,
) -> DeepClusterV2Terms:
    """Return :func:`deepcluster_v2_loss`, the share of labels that are predicted, and that of labelled images."""
    named = check_views(z=z)
    check_range("temperature", temperature, low=1e-6)
    if not named:
        raise ValueError("the DeepCluster v2 loss needs at least 1 view, got none")
    rows, width = z[0].shape
    if labels.dtype != torch.int64 or labels.shape != (len(prototypes), rows) or not len(prototypes):
        raise ValueError(
            f"labels must be int64 [H, B] with H = {len(prototypes)} clusterings and B = {rows} rows, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    for h, centroids in enumerate(prototypes):
        check_rows(**{f"prototypes[{h}]": centroids})
        if centroids.shape[1] != width:
            raise ValueError(f"prototypes[{h}] must have {width} columns, got shape {tuple(centroids.shape)}")
    dtype = compute_dtype(z[0].dtype)
    with torch.autocast(z[0].device.type, enabled=False):
        u = directions(torch.stack([*z]).to(dtype))
        found = []
        for centroids, of_rows in zip(prototypes, labels, strict=True):
            scores = (u @ centroids.detach().to(dtype).T / temperature).flatten(0, 1)
            classes = of_rows.repeat(len(z))
            losses = F.cross_entropy(scores, classes.clamp(min=0), reduction="none")
            hits = (scores.detach().argmax(1) == classes).to(dtype)
            found.append(torch.stack([losses, hits], 1))
        valid = (labels.T >= 0).repeat(len(z), 1)
        means = labelled_mean(torch.stack(found, 1), valid.unsqueeze(2).expand(-1, -1, 2), comm)
        loss, agreement = means.mean(0)
        share = labelled_mean((labels >= 0).any(0).to(dtype), torch.ones_like(labels[0], dtype=torch.bool), comm)
    check_result("the DeepCluster v2 loss", loss, comm, **named)
    return DeepClusterV2Terms(loss, agreement.detach(), share)


class DeepClusterV2Loss(nn.Module):
    """Module of :func:`deepcluster_v2_loss`; the arguments are the same."""

    def __init__(self, *, temperature: float = 0.1, comm: Collective = LOCAL) -> None:
        super().__init__()
        check_range("temperature", temperature, low=1e-6)
        self.temperature, self.comm = temperature, comm

    def forward(
        self,
        z: Sequence[Float[Tensor, "B D"]],
        labels: Int64[Tensor, "H B"],
        prototypes: Sequence[Float[Tensor, "K D"]],
    ) -> Float[Tensor, ""]:
        return deepcluster_v2_loss(z, labels, prototypes, temperature=self.temperature, comm=self.comm)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, comm={self.comm}"
