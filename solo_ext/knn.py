"""Weighted k-nearest-neighbour accuracy in bounded memory.

solo-learn's own classifier keeps every feature on the GPU, forgets to normalise for the cosine, and counts the classes
among the labels that happen to be present.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class WeightedKNNClassifier:
    """k-NN on features, weighted by similarity (Wu et al. 2018, arXiv:1805.01978, §3.4).

    The weight of a neighbour at cosine s is ``exp(s / T)``; at Euclidean distance d it is ``1 / (d + epsilon)``.
    Features wait on the CPU; a distance matrix never exceeds ``max_distance_matrix_size`` elements. Rows labelled -1
    (unlabelled) are left out. Over several processes each counts all rows.

    Args:
        k: neighbours, >= 1.
        T: temperature, > 0, for the cosine.
        distance_fx: "cosine" or "euclidean".
        max_distance_matrix_size: elements.
        epsilon: > 0, for the Euclidean distance.
        device: where distances are computed; where the features came from when None.
    """

    def __init__(
        self,
        k: int = 20,
        T: float = 0.07,
        distance_fx: str = "cosine",
        max_distance_matrix_size: int = 5_000_000,
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
        """Forget all features."""
        self._rows: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "test": []}
        self._features_from = torch.device("cpu")

    def __call__(
        self,
        train_features: Tensor | None = None,
        train_targets: Tensor | None = None,
        test_features: Tensor | None = None,
        test_targets: Tensor | None = None,
    ) -> None:
        """Add a batch of labelled features ``[B, D]``, ``[B]`` to one side or both."""
        self._add("train", train_features, train_targets)
        self._add("test", test_features, test_targets)

    update = __call__

    def _add(self, side: str, features: Tensor | None, targets: Tensor | None) -> None:
        if (features is None) != (targets is None):
            raise ValueError(f"{side} features and {side} targets come together")
        if features is None or targets is None:
            return
        self._features_from = features.device
        labelled = targets != -1
        features = features.detach()[labelled].float()
        if self.distance_fx == "cosine":
            features = F.normalize(features, dim=1)
        self._rows[side].append((features.cpu(), targets.detach()[labelled].cpu()))

    @torch.no_grad()
    def compute(self) -> tuple[float, float]:
        """Accuracy at 1 and at 5 in per cent; (-1, -1) while either side is empty. Forgets the features."""
        train, train_targets = self._joined("train")
        test, test_targets = self._joined("test")
        device = self.device or self._features_from
        self.reset()
        if not len(train) or not len(test):
            return -1.0, -1.0
        classes = int(max(train_targets.max(), test_targets.max())) + 1
        hits = torch.zeros(2, dtype=torch.int64)
        # a block of test rows against a block of training rows at a time
        test_block = min(len(test), 1024)
        train_block = max(self.k, self.max_distance_matrix_size // test_block)
        for start in range(0, len(test), test_block):
            rows = test[start : start + test_block].to(device)
            similarity, labels = self._neighbours(rows, train, train_targets, train_block)
            weight = (similarity / self.T).exp() if self.distance_fx == "cosine" else similarity
            votes = torch.zeros(len(rows), classes, device=device).scatter_add_(1, labels, weight)
            ranked = votes.argsort(dim=1, descending=True)
            correct = ranked.cpu() == test_targets[start : start + test_block, None]
            hits += torch.stack([correct[:, :1].sum(), correct[:, :5].sum()])
        accuracy = hits * 100.0 / len(test)
        return accuracy[0].item(), accuracy[1].item()

    def _neighbours(self, rows: Tensor, train: Tensor, targets: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Similarities and labels ``[B, k]`` of the nearest training rows."""
        best = torch.empty(len(rows), 0, device=rows.device)
        labels = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
        for start in range(0, len(train), block):
            candidates = train[start : start + block].to(rows.device)
            if self.distance_fx == "cosine":
                similarity = rows @ candidates.T
            else:
                similarity = 1 / (torch.cdist(rows, candidates) + self.epsilon)
            best = torch.cat([best, similarity], dim=1)
            block_labels = targets[start : start + block].to(rows.device).expand(len(rows), -1)
            labels = torch.cat([labels, block_labels], dim=1)
            best, order = best.topk(min(self.k, best.shape[1]), dim=1)
            labels = labels.gather(1, order)
        return best, labels

    def _joined(self, side: str) -> tuple[Tensor, Tensor]:
        """All rows of one side, of all processes."""
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
