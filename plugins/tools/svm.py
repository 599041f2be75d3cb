"""Linear support vector machines on frozen features, one per class, for images that may have several classes.

The protocol of Goyal, Mahajan, Gupta & Misra (arXiv:1905.01235) on VOC07, which VISSL's tools use: the cost of a class
is the one with the largest cross-validated average precision, and the result is the mean average precision (mAP) of the
test images. In the low-shot protocol the machines are trained on ``k`` images of each class, in several independent
samples. The classifiers are scikit-learn's LinearSVC.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from plugins.tools.command import UserError

IGNORED = -1
"""Target of an image that counts neither as positive nor as negative, such as VOC07's "difficult" ones."""


class Settings(NamedTuple):
    """Settings of the classifiers; the defaults are those of VISSL's configurations for VOC07."""

    costs: Sequence[float] = (0.01, 0.1, 1.0, 2, 5, 10, 15, 20, 50, 100, 1000)
    """Values of C, inverse strengths of the regularisation, > 0."""
    loss: str = "squared_hinge"
    penalty: str = "l2"
    dual: bool = True
    max_iter: int = 2000
    folds: int = 3
    """Number of folds of the cross-validation, ≥ 2."""
    seed: int = 0
    workers: int = 1
    """Number of processes, ≥ 1."""


def check_settings(settings: Settings) -> None:
    """Fit a classifier to four rows, so that an invalid combination of settings is found before the long work.

    Raises:
        ValueError: a cost is not positive, there are fewer than two folds, or scikit-learn rejects the settings.
    """
    if not settings.costs or min(settings.costs) <= 0:
        raise ValueError(f"the costs must be positive numbers, got {list(settings.costs)}")
    if settings.folds < 2:
        raise ValueError(f"the number of folds must be at least 2, got {settings.folds}")
    rows = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    _fitted(rows, np.array([1, -1, 1, -1]), settings.costs[0], settings)


def unit_rows(features: np.ndarray, dtype: type = np.float64) -> np.ndarray:
    """Divide the rows ``[N, D]`` by their length plus 1e-5, as VISSL does."""
    rows = features.reshape(len(features), -1).astype(dtype)
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-5)


def class_targets(targets: np.ndarray, classes: int | None = None) -> np.ndarray:
    """Convert class numbers to one column per class; targets that have the columns already are checked.

    Args:
        targets: ``[N, C]`` of 1 (the image has the class), 0 (it does not) and -1 (ignored), or class numbers ``[N]``
            or ``[N, 1]``, of which -1 is ignored.
        classes: number of classes C for class numbers; None is the largest class plus one.

    Returns:
        ``[N, C]`` of 1, 0 and -1.

    Raises:
        UserError: a value is not allowed.

    >>> class_targets(np.array([1, 0, -1])).tolist()
    [[0, 1], [1, 0], [-1, -1]]
    """
    if targets.ndim == 2 and targets.shape[1] > 1:
        if wrong := set(np.unique(targets)) - {-1, 0, 1}:
            raise UserError(f"the labels of several classes must be 1, 0 or -1 (ignored), got {min(wrong)}")
        return targets.astype(np.int64)
    numbers = targets.reshape(-1).astype(np.int64)
    if numbers.size == 0 or numbers.min() < IGNORED:
        raise UserError(f"the labels must be classes of at least 0, or -1 (ignored), got {targets.shape} {numbers[:3]}")
    columns = (numbers[:, None] == np.arange(classes or int(numbers.max()) + 1)).astype(np.int64)
    columns[numbers == IGNORED] = IGNORED
    return columns


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Compute the average precision of a ranking, as VOC since 2010 and VISSL define it.

    ``Σ_i (R_i - R_{i-1}) max_{j ≥ i} P_j`` for precision P and recall R of the i images with the largest scores.

    Args:
        scores: ``[N]``, the larger the more probable.
        positive: ``[N]``, whether the image has the class.

    Returns:
        A number in [0, 1]; NaN if no image is positive.

    >>> average_precision(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False]))
    0.8333333333333333
    """
    hits = np.asarray(positive, dtype=bool)[np.argsort(-scores, kind="stable")]
    if not hits.any():
        return float("nan")
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[hits].mean())


def check_counts(targets: np.ndarray, needed: int, why: str) -> None:
    """Require a number of positive training images in each class.

    Args:
        targets: ``[N, C]`` of 1, 0 and -1.
        needed: the number.
        why: what needs them, for the error message.

    Raises:
        UserError: a class has fewer.
    """
    for number, column in enumerate(targets.T):
        if (count := int((column == 1).sum())) < needed:
            raise UserError(f"class {number} has {count} training images, but {why} needs {needed} of each class")


class Result(NamedTuple):
    """Result of :func:`evaluate`."""

    precisions: list[float]
    """Average precision of each class over the test images, in [0, 1]; NaN without a positive one."""
    costs: list[float]
    """The chosen cost of each class."""
    validated: np.ndarray
    """``[C, number of costs]``: cross-validated average precisions."""
    stopped: int
    """Number of chosen classifiers that reached ``max_iter`` before they converged."""

    @property
    def mean(self) -> float:
        """The mAP over the classes with positive test images, in [0, 1]."""
        return float(np.nanmean(self.precisions))


def evaluate(
    features: np.ndarray,
    targets: np.ndarray,
    test_features: np.ndarray,
    test_targets: np.ndarray,
    settings: Settings,
    bar: Any = iter,
) -> Result:
    """Choose the cost of each class by cross-validation on the training images, and test.

    Ignored images are negatives in the training, as in VISSL, and do not count in the test.

    Args:
        features: training features ``[N, D]``, usually of :func:`unit_rows`.
        targets: ``[N, C]`` of 1, 0 and -1, of :func:`class_targets`.
        test_features: ``[M, D]``.
        test_targets: ``[M, C]``.
        settings: of the classifiers.
        bar: called with the list of (class, cost), returns an iterable over it that shows the progress.

    Raises:
        UserError: a class has fewer positive training images than folds.
    """
    from sklearn.model_selection import cross_val_score

    numbers = list(range(targets.shape[1]))
    check_counts(targets, settings.folds, f"a cross-validation with {settings.folds} folds")

    def validated(number: int, cost: float) -> float:
        signs = np.where(targets[:, number] == 1, 1, -1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of convergence
            machine = _machine(cost, settings)
            return float(
                cross_val_score(machine, features, signs, cv=settings.folds, scoring="average_precision").mean()
            )

    def tested(number: int, cost: float) -> tuple[float, int]:
        machine = _fitted(features, np.where(targets[:, number] == 1, 1, -1), cost, settings)
        precision = _precision(machine, test_features, test_targets[:, number])
        return precision, int(machine.n_iter_ >= settings.max_iter)

    jobs = [(number, cost) for number in numbers for cost in settings.costs]
    table = np.array(_parallel(validated, jobs, settings.workers, bar)).reshape(len(numbers), -1)
    costs = [float(settings.costs[place]) for place in table.argmax(1)]
    found = _parallel(tested, list(zip(numbers, costs, strict=True)), settings.workers, iter)
    return Result([ap for ap, _ in found], costs, table, sum(stop for _, stop in found))


def low_shot_targets(targets: np.ndarray, k: int, sample: int, seed: int) -> np.ndarray:
    """Draw k positive and (C - 1) k negative images of each class; all others become ignored.

    If each image has one class, the negatives of a class are the k images of each other class.

    Args:
        targets: ``[N, C]`` of 1, 0 and -1.
        k: number of positive images of each class, ≥ 1.
        sample: number of the independent sample, ≥ 0.
        seed: ≥ 0; the images depend on seed, sample and k only.

    Returns:
        ``[N, C]``.

    Raises:
        UserError: a class has fewer images.
    """
    check_counts(targets, k, f"the low-shot evaluation with k={k}")
    rng, classes = np.random.default_rng([seed, sample, k]), targets.shape[1]
    drawn = np.full_like(targets, IGNORED)
    positives = [rng.choice(np.flatnonzero(column == 1), k, replace=False) for column in targets.T]
    if bool(((targets == 1).sum(1) <= 1).all()):
        rows = np.concatenate(positives)
        drawn[rows] = targets[rows]
        return drawn
    for number, column in enumerate(targets.T):
        others = np.flatnonzero(column == 0)
        if len(others) < (classes - 1) * k:
            raise UserError(
                f"class {number} has {len(others)} negative training images, but the low-shot evaluation with k={k} "
                f"needs {(classes - 1) * k}"
            )
        drawn[positives[number], number] = 1
        drawn[rng.choice(others, (classes - 1) * k, replace=False), number] = 0
    return drawn


def low_shot(
    features: np.ndarray,
    targets: np.ndarray,
    test_features: np.ndarray,
    test_targets: np.ndarray,
    settings: Settings,
    counts: Sequence[int],
    samples: Sequence[int],
    bar: Any = iter,
) -> np.ndarray:
    """Train on k images of each class, in independent samples, and test at each cost. Ignored images are not used.

    Args:
        features: training features ``[N, D]``.
        targets: ``[N, C]`` of 1, 0 and -1.
        test_features: ``[M, D]``.
        test_targets: ``[M, C]``.
        settings: of the classifiers; there is no cross-validation.
        counts: the values of k.
        samples: numbers of the samples.
        bar: called with the list of (k, sample, cost), returns an iterable over it that shows the progress.

    Returns:
        ``[len(counts), len(samples), number of costs]``: mAP in [0, 1].

    Raises:
        UserError: a class has fewer images than the largest k.
    """
    for k in counts:  # before the first fit
        low_shot_targets(targets, k, 0, settings.seed)

    def tested(k: int, sample: int, cost: float) -> float:
        drawn, precisions = low_shot_targets(targets, k, sample, settings.seed), []
        for number, column in enumerate(drawn.T):
            rows = column != IGNORED
            machine = _fitted(features[rows], np.where(column[rows] == 1, 1, -1), cost, settings)
            precisions.append(_precision(machine, test_features, test_targets[:, number]))
        return float(np.nanmean(precisions))

    jobs = [(k, sample, cost) for k in counts for sample in samples for cost in settings.costs]
    return np.array(_parallel(tested, jobs, settings.workers, bar)).reshape(len(counts), len(samples), -1)


def summarise(values: np.ndarray, costs: Sequence[float]) -> dict[str, float]:
    """Summarise the mAP of one k over its samples, at the cost with the largest mean.

    The cost is chosen on the test images, as in VISSL.

    Args:
        values: ``[samples, number of costs]``, in [0, 1].
        costs: the costs.

    Returns:
        mean, min, max and std in per cent, and the cost.
    """
    place = int(values.mean(0).argmax())
    chosen = 100 * values[:, place]
    names = ("mean", "min", "max", "std")
    return {**{name: float(getattr(chosen, name)()) for name in names}, "cost": float(costs[place])}


def _machine(cost: float, settings: Settings) -> Any:
    from sklearn.svm import LinearSVC

    shared: Any = {"loss": settings.loss, "penalty": settings.penalty, "dual": settings.dual}
    weights = {1: 2, -1: 1}  # a positive image counts twice
    return LinearSVC(C=cost, class_weight=weights, max_iter=settings.max_iter, random_state=settings.seed, **shared)


def _fitted(features: np.ndarray, signs: np.ndarray, cost: float, settings: Settings) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence, which is counted
        return _machine(cost, settings).fit(features, signs)


def _precision(machine: Any, features: np.ndarray, column: np.ndarray) -> float:
    """Return the average precision of a class over the test images that are not ignored."""
    used = column != IGNORED
    return average_precision(machine.decision_function(features[used]), column[used] == 1)


def _parallel(function: Any, jobs: Sequence[tuple[Any, ...]], workers: int, bar: Any) -> list[Any]:
    """Call a function with each job in several processes; threads would share liblinear's random numbers."""
    if workers < 2:
        return [function(*job) for job in bar(jobs)]
    from joblib import Parallel, delayed

    return list(Parallel(n_jobs=workers)(delayed(function)(*job) for job in bar(jobs)))
