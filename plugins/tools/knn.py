"""Weighted k-nearest-neighbour accuracy in bounded memory, shared by all frameworks."""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ELEMENTS = 5_000_000
"""Largest number of elements of a distance matrix; validation against training images of ImageNet would give 6e10."""


@torch.no_grad()
def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    distance: str = "cosine",
    epsilon: float = 1e-5,
    max_elements: int = MAX_ELEMENTS,
    device: torch.device | None = None,
) -> tuple[float, float]:
    """Compute the accuracy of weighted k-nearest-neighbour classification (Wu et al. 2018, arXiv:1805.01978, §3.4).

    The weight of a neighbour with cosine similarity s is ``exp(s / temperature)``; with Euclidean distance d it is
    ``1 / (d + epsilon)``. Unlabelled rows (label -1) are ignored. If there are fewer than k training rows, all of them
    are used.

    Args:
        train: features of the training images, ``[N, D]``.
        train_labels: their classes ``[N]``: integers of at least 0, or -1.
        test: features of the test images, ``[M, D]``.
        test_labels: their classes ``[M]``.
        k: number of neighbours, >= 1.
        temperature: temperature of the cosine weights, > 0.
        distance: "cosine" or "euclidean".
        epsilon: constant in the Euclidean weights, > 0.
        max_elements: largest number of elements of a distance matrix; exceeded only if k requires it.
        device: device of the computation; None means the device of the training features.

    Returns:
        Top-1 and top-5 accuracy in per cent; (-1, -1) if there are no labelled training or test rows.

    Raises:
        ValueError: the distance is unknown, or k is below 1.

    Example:
        >>> train, labels = torch.eye(3), torch.arange(3)
        >>> knn_accuracy(train, labels, train[:2] + 0.1, labels[:2], k=1)
        (100.0, 100.0)
    """
    if distance not in ("cosine", "euclidean"):
        raise ValueError(f"distance must be cosine or euclidean, got {distance!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    train, train_labels = _labelled(train, train_labels, distance)
    test, test_labels = _labelled(test, test_labels, distance)
    if not len(train) or not len(test):
        return -1.0, -1.0
    device = device or train.device
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    hits = torch.zeros(2, dtype=torch.int64)
    # compare one block of test rows with one block of training rows at a time
    test_block = min(len(test), 1024)
    train_block = max(k, max_elements // test_block)
    for start in range(0, len(test), test_block):
        rows = test[start : start + test_block].to(device)
        best = torch.empty(len(rows), 0, device=device)
        labels = torch.empty(len(rows), 0, dtype=torch.int64, device=device)
        for begin in range(0, len(train), train_block):
            candidates = train[begin : begin + train_block].to(device)
            cosine = distance == "cosine"
            similarity = rows @ candidates.T if cosine else 1 / (torch.cdist(rows, candidates) + epsilon)
            best = torch.cat([best, similarity], dim=1)
            block_labels = train_labels[begin : begin + train_block].to(device).expand(len(rows), -1)
            labels = torch.cat([labels, block_labels], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            labels = labels.gather(1, order)
        weight = (best / temperature).exp() if distance == "cosine" else best
        votes = torch.zeros(len(rows), classes, device=device).scatter_add_(1, labels, weight)
        ranked = votes.argsort(dim=1, descending=True).cpu()
        correct = ranked == test_labels[start : start + test_block, None].cpu()
        hits += torch.stack([correct[:, :1].sum(), correct[:, :5].sum()])
    accuracy = hits * 100.0 / len(test)
    return accuracy[0].item(), accuracy[1].item()


def _labelled(features: Tensor, labels: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    kept = labels != -1
    features = features[kept].float()
    return (F.normalize(features, dim=1) if distance == "cosine" else features), labels[kept]
