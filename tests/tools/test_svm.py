"""Support vector machines on features: average precision by definition, choice of costs, low-shot samples."""

from fractions import Fraction

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from plugins.tools import svm
from plugins.tools.command import UserError

SETTINGS = svm.Settings(costs=(0.01, 1.0, 20.0), folds=3, seed=3)


def _reference_average_precision(scores, positive):
    """Area under "largest precision at this recall or above", image by image, in exact fractions."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    found, points = 0, []
    for rank, image in enumerate(order, 1):
        found += bool(positive[image])
        points.append((Fraction(found, int(sum(positive))), Fraction(found, rank)))
    area, before = Fraction(0), Fraction(0)
    for place, (recall, _) in enumerate(points):
        area += (recall - before) * max(precision for _, precision in points[place:])
        before = recall
    return float(area)


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_the_area_under_the_envelope(seed):
    rng = np.random.default_rng(seed)
    scores, positive = rng.normal(size=40), rng.random(40) < 0.3
    assert svm.average_precision(scores, positive) == pytest.approx(
        _reference_average_precision(scores, positive), abs=1e-12
    )


def test_average_precision_by_hand():
    assert svm.average_precision(np.array([3.0, 2.0, 1.0]), np.array([False, True, True])) == pytest.approx(2 / 3)
    assert svm.average_precision(np.array([1.0, 3.0]), np.array([False, True])) == 1
    assert np.isnan(svm.average_precision(np.array([1.0]), np.array([False])))


def test_targets_of_one_and_of_several_classes():
    several = np.array([[1, 0], [-1, 1]])
    assert np.array_equal(svm.class_targets(several), several)
    assert svm.class_targets(np.array([[2], [0]])).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert svm.class_targets(np.array([0]), classes=2).tolist() == [[1, 0]]
    with pytest.raises(UserError, match=r"must be 1, 0 or -1 \(ignored\), got 2"):
        svm.class_targets(np.array([[1, 2]]))
    with pytest.raises(UserError, match="classes of at least 0, or -1"):
        svm.class_targets(np.array([-2, 0]))


def _data(seed, rows):
    """Features that carry two of three classes, and targets with ignored ones."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((rows, 3)) < 0.4).astype(int)
    features = rng.normal(size=(rows, 8)) + 2.0 * np.concatenate([targets, np.zeros((rows, 5))], 1)
    targets[rng.random((rows, 3)) < 0.1] = -1
    return svm.unit_rows(features), targets


@pytest.fixture(scope="module")
def data():
    return (*_data(0, 90), *_data(1, 60))


@pytest.fixture(scope="module")
def result(data):
    return svm.evaluate(*data, SETTINGS)


def test_costs_and_precisions_equal_a_slow_loop(data, result):
    features, targets, test, truth = data
    for number in range(3):
        signs = np.array([1 if value == 1 else -1 for value in targets[:, number]])
        means = []
        for cost in SETTINGS.costs:
            folds = []
            for inside, outside in StratifiedKFold(3).split(features, signs):
                machine = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, random_state=3)
                scores = machine.fit(features[inside], signs[inside]).decision_function(features[outside])
                folds.append(average_precision_score(signs[outside] == 1, scores))
            means.append(sum(folds) / 3)
        assert result.validated[number] == pytest.approx(means, abs=1e-12)
        best = SETTINGS.costs[int(np.argmax(means))]
        assert result.costs[number] == best
        machine = LinearSVC(C=best, class_weight={1: 2, -1: 1}, max_iter=2000, random_state=3).fit(features, signs)
        rows = [row for row in range(len(test)) if truth[row, number] != -1]
        assert len(rows) < len(test)
        expected = _reference_average_precision(
            machine.decision_function(test[rows]), [truth[row, number] == 1 for row in rows]
        )
        assert result.precisions[number] == pytest.approx(expected, abs=1e-12)
    assert result.mean == pytest.approx(sum(result.precisions) / 3) and result.stopped == 0
    assert min(result.precisions[:2]) > 0.7


@pytest.mark.slow
def test_processes_give_the_same_result(data, result):
    again = svm.evaluate(*data, SETTINGS._replace(workers=2))
    assert again.precisions == result.precisions and np.array_equal(again.validated, result.validated)


def test_a_class_without_test_images_does_not_count(data, result):
    features, targets, test, truth = data
    truth = truth.copy()
    truth[:, 2] = 0
    found = svm.evaluate(features, targets, test, truth, SETTINGS)
    assert np.isnan(found.precisions[2]) and found.mean == pytest.approx(sum(result.precisions[:2]) / 2)


def test_low_shot_samples_hold_k_positives_and_twice_as_many_negatives(data):
    targets = data[1]
    drawn = svm.low_shot_targets(targets, 4, sample=1, seed=0)
    assert ((drawn == 1).sum(0) == 4).all() and ((drawn == 0).sum(0) == 8).all()
    assert (drawn == targets)[drawn != -1].all()
    assert np.array_equal(drawn, svm.low_shot_targets(targets, 4, sample=1, seed=0))
    assert not np.array_equal(drawn, svm.low_shot_targets(targets, 4, sample=2, seed=0))
    assert not np.array_equal(drawn, svm.low_shot_targets(targets, 4, sample=1, seed=1))


def test_low_shot_samples_of_images_with_one_class():
    targets = svm.class_targets(np.arange(30) % 3)
    drawn = svm.low_shot_targets(targets, 2, sample=0, seed=0)
    used = (drawn != -1).all(1)
    assert used.sum() == 6 and np.array_equal(drawn[used], targets[used]) and (drawn[~used] == -1).all()
    assert (drawn[used].sum(0) == 2).all()


def test_low_shot_trains_on_the_drawn_images(data):
    features, targets, test, truth = data
    values = svm.low_shot(*data, SETTINGS, [2, 8], [1, 2])
    assert values.shape == (2, 2, 3)
    drawn, expected = svm.low_shot_targets(targets, 8, 2, 3), []
    for number in range(3):
        rows = [row for row in range(len(drawn)) if drawn[row, number] != -1]
        machine = LinearSVC(C=20.0, class_weight={1: 2, -1: 1}, max_iter=2000, random_state=3)
        machine.fit(features[rows], [1 if drawn[row, number] == 1 else -1 for row in rows])
        used = [row for row in range(len(test)) if truth[row, number] != -1]
        scores = machine.decision_function(test[used])
        expected.append(_reference_average_precision(scores, [truth[row, number] == 1 for row in used]))
    assert values[1, 1, 2] == pytest.approx(sum(expected) / 3, abs=1e-12)


def test_summary_is_at_the_cost_with_the_largest_mean():
    found = svm.summarise(np.array([[0.1, 0.5], [0.9, 0.7]]), [1.0, 2.0])
    assert found == pytest.approx({"mean": 60.0, "min": 50.0, "max": 70.0, "std": 10.0, "cost": 2.0})


def test_errors_come_before_the_first_fit(data):
    with pytest.raises(
        UserError, match="class 0 has 26 training images, but a cross-validation with 40 folds needs 40"
    ):
        svm.evaluate(*data, SETTINGS._replace(folds=40))
    with pytest.raises(UserError, match="the low-shot evaluation with k=50 needs 50 of each class"):
        svm.low_shot(*data, SETTINGS, [1, 50], [1])
    with pytest.raises(UserError, match=r"class 0 has 1 negative training images, but .* with k=2 needs 2"):
        svm.low_shot_targets(np.array([[1, 1], [1, 1], [0, 1]]), 2, 1, 0)
    for wrong in ({"costs": (0.0,)}, {"costs": ()}, {"folds": 1}, {"loss": "hinge", "dual": False}, {"loss": "huber"}):
        with pytest.raises(ValueError):
            svm.check_settings(SETTINGS._replace(**wrong))
    svm.check_settings(SETTINGS)
