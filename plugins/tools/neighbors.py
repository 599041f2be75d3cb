"""Neighbour consistency: how often the nearest neighbours of an image, among the same images, have its class."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from plugins.tools.knn import MAX_ELEMENTS


@torch.no_grad()
def neighbor_consistency(
    features: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    k: int = 20,
    *,
    max_elements: int = MAX_ELEMENTS,
    device: torch.device | None = None,
) -> float:
    """Compute the mean share of the k nearest neighbours of a row that have its class.

    ``1 / (N k) Σ_i #{j in the k nearest to i, j ≠ i : label_j = label_i}``, by cosine similarity. There are no training
    rows, no votes and no weights, so that the value is usually below the accuracy of k-nearest-neighbour classification
    on the same features. Its expectation without signal is (n - 1) / (N - 1) for N rows in classes of n. Unlabelled
    rows (label -1) are ignored.

    The repository Self-Supervised-Vision reports this number as "KNN accuracy". It removes the first hit of each
    search in place of the row itself, which is another row if the features are not normalised.

    Args:
        features: one row per image.
        labels: their classes: integers of at least 0, or -1.
        k: number of neighbours, in [1, N - 1].
        max_elements: largest number of elements of a matrix of similarities; exceeded only by a single row.
        device: device of the computation; None means the device of the features.

    Returns:
        The mean share, in [0, 1].

    Raises:
        ValueError: k is out of range, or there is not one label for each row.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> neighbor_consistency(rows, torch.tensor([0, 0, 1, 0]), k=1)
        0.5
    """
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels must have the shape {list(features.shape[:1])}, got {list(labels.shape)}")
    kept = labels != -1
    device = device or features.device
    rows, labels = features[kept].to(device), labels[kept].to(device)
    if not 1 <= k < len(rows):
        raise ValueError(f"k must be at least 1 and below the number of labelled rows, {len(rows)}, got {k}")
    rows = F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=1)
    same = torch.zeros((), dtype=torch.int64, device=device)
    for own in torch.arange(len(rows), device=device).split(max(max_elements // len(rows), 1)):
        similarity = rows[own] @ rows.T
        similarity[torch.arange(len(own), device=device), own] = -torch.inf  # of each row with itself
        nearest = similarity.topk(k, dim=1).indices
        same += (labels[nearest] == labels[own, None]).sum()
    return same.item() / (len(rows) * k)
