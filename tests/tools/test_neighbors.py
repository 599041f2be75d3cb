"""Neighbour consistency: known values, a slow reference, chance, and exclusion of the row itself by its index."""

import numpy as np
import pytest
import torch

from plugins.tools.knn import knn_accuracy
from plugins.tools.neighbors import neighbor_consistency


def _reference(features: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Count, for one row at a time in float64, the neighbours of its class."""
    rows = features.astype(np.float64)
    rows = rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))
    shares = []
    for number, row in enumerate(rows):
        order = [other for other in np.argsort(-(rows @ row), kind="stable") if other != number]
        shares.append(np.mean([labels[other] == labels[number] for other in order[:k]]))
    return float(np.mean(shares))


def _noise(rows: int, seed: int = 0, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random features, and labels of ten classes of equal size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator), torch.arange(rows) % 10


@pytest.mark.parametrize("k", [1, 7, 20])
@pytest.mark.parametrize("max_elements", [5_000_000, 1000, 1])
def test_equals_the_reference_in_blocks_of_any_size(k, max_elements):
    features, labels = _noise(90)
    features[:, 0] += labels  # some signal
    expected = _reference(features.numpy(), labels.numpy(), k)
    for dtype in (torch.float32, torch.float64):
        got = neighbor_consistency(features.to(dtype), labels, k, max_elements=max_elements)
        assert got == pytest.approx(expected, abs=1e-12)


def test_all_other_rows_as_neighbours_give_exactly_the_chance():
    for rows in (50, 400):
        features, labels = _noise(rows)
        assert neighbor_consistency(features, labels, rows - 1) == pytest.approx((rows // 10 - 1) / (rows - 1))


def test_noise_is_at_chance_and_clusters_are_at_one():
    features, labels = _noise(10_000)
    # 10000 images of 10 classes, the size of CIFAR-10's test set
    assert neighbor_consistency(features, labels) == pytest.approx(999 / 9999, abs=4e-3)
    few, of_few = _noise(400)
    assert neighbor_consistency(few, of_few) == pytest.approx(39 / 399, abs=0.02)
    clusters = torch.eye(10)[of_few] + 0.01 * few[:, :10]
    assert neighbor_consistency(clusters, of_few) == 1.0


def test_a_row_is_no_neighbour_of_itself_if_a_longer_row_has_a_larger_inner_product():
    # the inner product of row 0 with row 1, twice as long, exceeds that with itself
    features = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 2.0]])
    assert neighbor_consistency(features, torch.tensor([0, 0, 1, 1]), 1) == 1.0
    # four equal rows: each has the three others, whatever their order
    assert neighbor_consistency(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]), 3) == pytest.approx(1 / 3)


def test_ignores_scale_row_order_and_unlabelled_rows():
    features, labels = _noise(60)
    expected = neighbor_consistency(features, labels, 5)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert neighbor_consistency(features[order] * torch.rand(60, 1).add(0.5), labels[order], 5) == expected
    more = torch.cat([features, features[:7]])
    assert neighbor_consistency(more, torch.cat([labels, torch.full((7,), -1)]), 5) == expected


def test_is_below_the_accuracy_of_a_vote():
    features, labels = _noise(2000)
    features[:, :10] += 1.5 * torch.eye(10)[labels]
    consistency = neighbor_consistency(features[1000:], labels[1000:])
    voted, _ = knn_accuracy(features[:1000], labels[:1000], features[1000:], labels[1000:])
    assert 0.1 < consistency < voted / 100


@pytest.mark.parametrize(
    ("rows", "labels", "k", "words"),
    [
        (4, 4, 4, "below the number of labelled rows, 4, got 4"),
        (4, 4, 0, "at least 1"),
        (4, 3, 1, r"labels must have the shape \[4\], got \[3\]"),
    ],
)
def test_refuses(rows, labels, k, words):
    with pytest.raises(ValueError, match=words):
        neighbor_consistency(torch.ones(rows, 2), torch.zeros(labels, dtype=torch.int64), k)
