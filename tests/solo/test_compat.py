"""solo-learn on today's stack: what solo_ext.compat and solo_ext.knn mend."""

import math
import sys

import numpy as np
import pytest
import torch

from solo_ext.compat import GENERATION, native_methods
from solo_ext.compat.optim import LARS, WarmupCosineLR
from solo_ext.knn import WeightedKNNClassifier
from solo_ext.registry import MAIN_ONLY

pytestmark = pytest.mark.solo


# LARS


def test_lars_by_hand():
    # |w| = 5, |g| = 10, wd = 0.1: r = 0.02 * 5 / (10 + 0.5) = 0.1 / 10.5; step = lr r (g + wd w)
    w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    optimizer = LARS([w], lr=0.5, weight_decay=0.1, eta=0.02, eps=0.0)
    w.grad = torch.tensor([[6.0, 8.0]], dtype=torch.float64)
    optimizer.step()
    rate = 0.02 * 5 / 10.5
    expected = np.array([[3.0, 4.0]]) - 0.5 * rate * np.array([[6.3, 8.4]])
    np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-12)


def test_lars_momentum_by_hand():
    w = torch.nn.Parameter(torch.tensor([[1.0]], dtype=torch.float64))
    optimizer = LARS([w], lr=0.1, momentum=0.9, eta=1.0, eps=0.0)
    position, velocity = 1.0, None
    for gradient in (2.0, -1.0, 0.5):
        w.grad = torch.tensor([[gradient]], dtype=torch.float64)
        optimizer.step()
        scaled = abs(position) / abs(gradient) * gradient
        velocity = scaled if velocity is None else 0.9 * velocity + scaled
        position -= 0.1 * velocity
        assert w.item() == pytest.approx(position, rel=1e-12)


def test_lars_clips_the_rate_at_plain_sgd():
    w = torch.nn.Parameter(torch.full((1, 1), 100.0))
    optimizer = LARS([w], lr=0.5, eta=1.0, clip_lr=True)
    w.grad = torch.ones(1, 1)
    optimizer.step()  # r = 100, r / lr = 200, bounded by 1
    assert w.item() == pytest.approx(100 - 0.5)


def test_p16_lars_leaves_vectors_to_plain_sgd():
    vector = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = LARS([vector], lr=0.5, weight_decay=0.1, eta=0.02, exclude_bias_n_norm=True)
    vector.grad = torch.tensor([6.0, 8.0])
    optimizer.step()
    torch.testing.assert_close(vector.detach(), torch.tensor([0.0, 0.0]))


def test_lars_takes_zero_norms():
    w, g = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([w, g], lr=1.0, weight_decay=0.1)
    w.grad, g.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(w.detach(), -torch.ones(2, 2))
    torch.testing.assert_close(g.detach(), torch.ones(2, 2))


def test_lars_sees_gradients_of_the_closure():
    """The wrapper of 1.0.2 scaled the gradients before the closure made them, and so trained with plain SGD."""
    w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = LARS([w], lr=1.0, eta=0.02)

    def closure():
        optimizer.zero_grad()
        loss = 5 * w.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    moved = (torch.tensor([[3.0, 4.0]]) - w.detach()).norm().item()
    assert moved == pytest.approx(0.02 * 5, rel=1e-5)  # eta |w|, whatever the gradient's size


# schedule


def _reference_warmup_cosine(step, base, warmup, total, start, end):
    if step < warmup:
        return start + (base - start) * step / max(warmup - 1, 1)
    return end + (base - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def test_schedule_is_the_published_one_and_groups_can_be_static():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.4)
    schedule = WarmupCosineLR(optimizer, 5, 20, start_lr=3e-5, end_lr=0.01, static={1: 0.7})
    for step in range(20):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(_reference_warmup_cosine(step, 0.4, 5, 20, 3e-5, 0.01))
        assert optimizer.param_groups[1]["lr"] == 0.7 or step == 0
        optimizer.step()
        schedule.step()


def test_schedule_state_is_plain_and_resumes(tmp_path):
    def fresh():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
        return optimizer, WarmupCosineLR(optimizer, 3, 10, static={4: 0.1})

    optimizer, schedule = fresh()
    for _ in range(6):
        optimizer.step()
        schedule.step()
    torch.save([optimizer.state_dict(), schedule.state_dict()], tmp_path / "state")
    states = torch.load(tmp_path / "state", weights_only=True)
    resumed, again = fresh()
    resumed.load_state_dict(states[0])
    again.load_state_dict(states[1])
    for _ in range(3):
        for one, other in ((optimizer, schedule), (resumed, again)):
            one.step()
            other.step()
        assert optimizer.param_groups[0]["lr"] == resumed.param_groups[0]["lr"]


# k nearest neighbours


def _reference_knn(train, labels, test, targets, k, temperature, distance):
    correct = np.zeros(2)
    for row, target in zip(test, targets, strict=True):
        if distance == "cosine":
            s = train @ row / (np.linalg.norm(train, axis=1) * np.linalg.norm(row))
            weights = np.exp(s / temperature)
        else:
            s = weights = 1 / (np.linalg.norm(train - row, axis=1) + 1e-5)
        nearest = np.argsort(-s)[:k]
        votes = np.zeros(max(labels.max(), targets.max()) + 1)
        for index in nearest:
            votes[labels[index]] += weights[index]
        ranked = np.argsort(-votes, kind="stable")
        correct += [target == ranked[0], target in ranked[:5]]
    return correct * 100 / len(test)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("elements", [5_000_000, 40])
def test_knn_is_the_weighted_vote_in_any_memory(distance, elements):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(8, 5)) * 1.5
    labels, targets = rng.integers(0, 8, 90), rng.integers(0, 8, 50)
    train, test = (centres[y] + rng.normal(size=(len(y), 5)) for y in (labels, targets))
    knn = WeightedKNNClassifier(k=7, T=0.2, distance_fx=distance, max_distance_matrix_size=elements)
    tensors = [torch.from_numpy(a) for a in (train, labels, test, targets)]
    for part in range(0, 90, 30):
        knn(train_features=tensors[0][part : part + 30], train_targets=tensors[1][part : part + 30])
    knn(test_features=tensors[2], test_targets=tensors[3])
    acc1, acc5 = knn.compute()
    expected = _reference_knn(train, labels, test, targets, 7, 0.2, distance)
    assert acc1 == pytest.approx(expected[0])
    assert 30 < acc1 < 100  # neither trivial nor chance
    assert acc5 >= acc1


def test_knn_distance_blocks_stay_below_the_bound(monkeypatch):
    largest = 0
    original = torch.Tensor.__matmul__

    def watched(self, other):
        nonlocal largest
        product = original(self, other)
        largest = max(largest, product.numel())
        return product

    knn = WeightedKNNClassifier(k=5, max_distance_matrix_size=20_000)
    knn(torch.randn(3000, 4), torch.randint(0, 3, (3000,)), torch.randn(500, 4), torch.randint(0, 3, (500,)))
    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    knn.compute()
    assert 0 < largest <= 20_000


def test_knn_counts_classes_that_validation_lacks_and_skips_the_unlabelled():
    knn = WeightedKNNClassifier(k=1)
    features = torch.eye(4)
    knn(features, torch.tensor([0, 1, 9, -1]), features[:2], torch.tensor([0, 1]))
    assert knn.compute()[0] == 100.0
    assert knn.compute() == (-1.0, -1.0)  # forgotten


def test_knn_ignores_the_length_of_features_for_the_cosine():
    knn = WeightedKNNClassifier(k=1)
    train = torch.tensor([[100.0, 60.0], [0.1, 0.0]])
    knn(train, torch.tensor([0, 1]), torch.tensor([[1.0, 0.05]]), torch.tensor([1]))
    assert knn.compute()[0] == 100.0


# the bridge


def test_all_native_methods_are_found():
    fourteen = {
        *("barlow_twins", "byol", "deepclusterv2", "dino", "mocov2plus", "nnbyol", "nnclr", "nnsiam"),
        *("ressl", "simclr", "simsiam", "swav", "vicreg", "wmse"),
    }
    assert set(native_methods()) == fourteen | (set(MAIN_ONLY) if GENERATION == "main" else set())


@pytest.mark.skipif(GENERATION == "main", reason="the main branch does not import pl_bolts")
def test_pl_bolts_stands_in_under_its_own_name_only():
    assert "Replacement for lightning-bolts" in sys.modules["pl_bolts"].__doc__
