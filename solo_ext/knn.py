"""A replacement for solo-learn's k-nearest-neighbour classifier, with bounded memory and for several processes.

solo-learn's own classifier keeps all features on the GPU, does not normalise them for the cosine distance, and takes
the number of classes from the labels of a batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from plugins.tools.knn import MAX_ELEMENTS, knn_accuracy


class WeightedKNNClassifier:
    """k-NN classifier with votes weighted by similarity (Wu et al. 2018, arXiv:1805.01978, §3.4).

    See :func:`plugins.tools.knn.knn_accuracy`. Features are stored on the CPU. Each process evaluates the features of
    all processes.

    Args:
        k: number of neighbours, >= 1.
        T: temperature for the cosine distance, > 0.
        distance_fx: "cosine" or "euclidean".
        max_distance_matrix_size: maximum number of elements of a distance matrix.
        epsilon: added to the Euclidean distance, > 0.
        device: the device that computes distances; None means the device of the features.
    """

    def __init__(
        self,
        k: int = 20,
        T: float = 0.07,
        distance_fx: str = "cosine",
        max_distance_matrix_size: int = MAX_ELEMENTS,
        epsilon: float = 1e-5,
        device: torch.device | None = None,
    ) -> None:
        if distance_fx not in ("cosine", "euclidean"):
            raise ValueError(f"distance_fx must be cosine or euclidean, got {distance_fx!r}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k
        self.T = T
        self.distance_fx = distance_fx
        self.max_distance_matrix_size = max_distance_matrix_size
        self.epsilon = epsilon
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Remove all features."""
        self._rows: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "test": []}
        self._features_from = torch.device("cpu")

    def __call__(
        self,
        train_features: Tensor | None = None,
        train_targets: Tensor | None = None,
        test_features: Tensor | None = None,
        test_targets: Tensor | None = None,
    ) -> None:
        """Add a batch of features ``[B, D]`` and labels ``[B]`` to the training side, the test side or both."""
        self._add("train", train_features, train_targets)
        self._add("test", test_features, test_targets)

    update = __call__

    def _add(self, side: str, features: Tensor | None, targets: Tensor | None) -> None:
        if (features is None) != (targets is None):
            raise ValueError(f"{side}_features and {side}_targets must be given together")
        if features is None or targets is None:
            return
        self._features_from = features.device
        self._rows[side].append((features.detach().float().cpu(), targets.detach().cpu()))

    def compute(self) -> tuple[float, float]:
        """Return the top-1 and top-5 accuracy in per cent, or (-1, -1) if a side is empty, and remove all features."""
        rows = (*self._joined("train"), *self._joined("test"))
        device = self.device or self._features_from
        self.reset()
        return knn_accuracy(
            *rows,
            k=self.k,
            temperature=self.T,
            distance=self.distance_fx,
            epsilon=self.epsilon,
            max_elements=self.max_distance_matrix_size,
            device=device,
        )

    def _joined(self, side: str) -> tuple[Tensor, Tensor]:
        """Return the features and labels of one side, gathered from all processes."""
        rows = self._rows[side]
        features = torch.cat([f for f, _ in rows]) if rows else torch.empty(0, 0)
        targets = torch.cat([t for _, t in rows]) if rows else torch.empty(0, dtype=torch.int64)
        if not dist.is_available() or not dist.is_initialized():
            return features, targets
        parts: list[tuple[Tensor, Tensor] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (features, targets))
        filled = [part for part in parts if part is not None and len(part[0])]
        if not filled:
            return features, targets
        return torch.cat([f for f, _ in filled]), torch.cat([t for _, t in filled])
