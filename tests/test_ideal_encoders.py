"""What an ideal encoder is, in numbers: how wide for linear probes, how many labels, where the losses' optima lie.

Dubois, Hashimoto, Ermon & Liang (NeurIPS 2022, arXiv:2209.06235): with K classes of equivalent images, every labelling
of the classes has to be within a probe's reach. For linear probes this takes K - 1 dimensions, in which CISSL's optimum
is the regular simplex.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize_scalar

from plugins.losses import cissl_loss


def _separates(codes, labels, bias=True):
    """Whether some map of the codes, affine or without bias, has the labels' signs, by linear programming."""
    if bias:
        codes = np.hstack([codes, np.ones((len(codes), 1))])
    rows = -labels[:, None] * codes
    found = linprog(np.zeros(rows.shape[1]), A_ub=rows, b_ub=-np.ones(len(codes)), bounds=(None, None))
    return found.status == 0


def _labellings(classes):
    return [np.array(labels) for labels in itertools.product((-1.0, 1.0), repeat=classes)]


def _simplex(classes):
    """K points in K - 1 dimensions, all at the same distance."""
    centred = np.eye(classes) - 1 / classes
    return centred @ np.linalg.svd(centred)[2][: classes - 1].T


# --- how wide -------------------------------------------------------------------------------------------------------


@pytest.mark.sample("4-*")
@pytest.mark.parametrize(("classes", "counts"), [(4, (8, 14, 16)), (6, (12, 32, 52, 62, 64, 64))])
def test_linear_probes_reach_as_many_labellings_as_cover_counts(classes, counts):
    generator = np.random.default_rng(0)
    for width, count in enumerate(counts, 1):
        codes = generator.standard_normal((classes, width))
        cover = 2 * sum(math.comb(classes - 1, k) for k in range(min(width, classes - 1) + 1))
        # a labelling and its opposite are both within reach or neither is
        reached = 2 * sum(_separates(codes, labels) for labels in _labellings(classes) if labels[0] > 0)
        assert reached == count == cover


@pytest.mark.sample("4")
@pytest.mark.parametrize("classes", [4, 6])
def test_without_bias_one_dimension_more_is_needed(classes):
    generator = np.random.default_rng(0)
    for width in range(1, classes + 2):
        codes = generator.standard_normal((classes, width))
        reached = 2 * sum(_separates(codes, labels, bias=False) for labels in _labellings(classes) if labels[0] > 0)
        assert reached == 2 * sum(math.comb(classes - 1, k) for k in range(min(width, classes)))
        assert (reached == 2**classes) == (width >= classes)
    simplex = _simplex(classes)
    assert not _separates(simplex, np.ones(classes), bias=False)  # its centre is the origin


def test_predictable_classes_are_not_enough():
    angles = 2 * np.pi * np.arange(6) / 6
    codes = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert ((codes @ codes.T).argmax(1) == np.arange(6)).all()  # a linear map that distinguishes all classes
    assert sum(_separates(codes, labels) for labels in _labellings(6)) == 32


def test_one_dimension_is_enough_for_universal_probes():
    codes = np.sort(np.random.default_rng(0).standard_normal(6))
    knots = np.concatenate([[codes[0] - 1], (codes[1:] + codes[:-1]) / 2])
    hidden = np.maximum(codes[:, None] - knots, 0)  # K units: each code opens one more of them
    for labels in _labellings(6):
        weights = np.linalg.solve(hidden, labels)
        assert (np.sign(hidden @ weights) == labels).all()


# --- how many labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "labels", "expected"),
    [(4, 4, 0.3164), (8, 16, 0.1181), (16, 16, 0.3561), (16, 64, 0.0161), (32, 64, 0.1311)],
)
def test_worst_error_is_that_of_the_classes_without_label(classes, labels, expected):
    assert (1 - 1 / classes) ** labels == pytest.approx(expected, abs=5e-5)
    drawn = np.random.default_rng(0).integers(classes, size=(20000, labels))
    seen = np.zeros((20000, classes), dtype=bool)
    np.put_along_axis(seen, drawn, True, 1)
    assert (~seen).mean() == pytest.approx(expected, abs=0.005)


def test_some_probe_without_training_error_is_wrong_on_every_unseen_class():
    codes = _simplex(6)
    for labels in _labellings(6):
        seen = np.array([True, True, False, True, False, False])
        assert _separates(codes, np.where(seen, labels, -labels))
    assert not _separates(codes[:, :2], np.array([1.0, -1, 1, -1, 1, -1]))


def test_coarser_classes_need_fewer_labels():
    errors = [(1 - 1 / classes) ** 16 for classes in (2, 4, 8, 16, 32)]
    assert errors == sorted(errors)


# --- optima ---------------------------------------------------------------------------------------------------------


def _optimum(width, positives, classes=8, tau=0.5):
    """Free unit vectors for two views of each class; the loss, and the cosines of all pairs."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, classes, width, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([z], lr=1, max_iter=600, line_search_fn="strong_wolfe", tolerance_grad=1e-11,
                                  tolerance_change=1e-15, history_size=30)  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = cissl_loss(z, z, temperature=tau, positives=positives)
        loss.backward()
        return loss

    optimizer.step(closure)
    unit = torch.nn.functional.normalize(z.detach(), dim=2)
    same = torch.eye(classes, dtype=torch.bool)
    cosines = unit[0] @ unit[1].T
    return closure().item(), cosines[same], cosines[~same]


@pytest.mark.parametrize("width", [7, 10])
@pytest.mark.parametrize(("positives", "own", "value"), [("all", 2, 1.2307567), ("other", 1, 0.8853446)])
def test_optimum_is_the_regular_simplex_from_classes_less_one_dimensions(width, positives, own, value):
    loss, positive, negative = _optimum(width, positives)
    assert loss == pytest.approx(math.log(own + 14 * math.exp(-8 / (7 * 0.5))), abs=1e-6)
    assert loss == pytest.approx(value, abs=1e-4)
    assert (positive - 1).abs().max() < 1e-5
    assert (negative + 1 / 7).abs().max() < 1e-4


def test_below_it_the_classes_cannot_lie_alike():
    """Eight classes in three dimensions: two squares, one turned by 45 degrees, at the heights h and -h."""

    def cosines(square):  # h²; of a corner with the others of its square and with those of the other
        return np.array(
            [square] * 2 + [2 * square - 1] + [side * (1 - square) / math.sqrt(2) - square for side in (1, 1, -1, -1)]
        )

    found = minimize_scalar(
        lambda square: math.log(2 + 2 * np.exp((cosines(square) - 1) / 0.5).sum()), bounds=(0, 1), method="bounded",
        options={"xatol": 1e-10},
    )  # fmt: skip
    loss, _, negative = _optimum(3, "all")
    assert loss == pytest.approx(found.fun, abs=1e-9)
    assert loss == pytest.approx(1.38984, abs=1e-5)
    assert np.sort(negative.numpy()) == pytest.approx(np.sort(np.tile(cosines(found.x), 8)), abs=1e-5)
    assert negative.min().item() == pytest.approx(-0.80, abs=5e-3)
    assert negative.max().item() == pytest.approx(0.32, abs=5e-3)
