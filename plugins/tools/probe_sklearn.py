"""scikit-learn's linear classifiers as probes of frozen features, as in DISSL's transfer evaluation.

Each feature is scaled to [0, 1] by its minimum and maximum over the training rows.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

CLASSIFIERS = {
    "logistic": "logistic regression over all classes, by L-BFGS",
    "svc": "a linear one-versus-rest support vector machine, in its primal form",
}
MAX_ITERATIONS = 1000
_PRIMAL: Any = False  # typed Any, since type checkers derive from scikit-learn's docstring that only a string is valid


def fit_classifier(
    kind: str, features: Float[Tensor, "N D"], labels: Int[Tensor, " N"], classes: int, *, C: float, seed: int
) -> Callable[[Tensor], Tensor]:
    """Fit a classifier on the CPU.

    Args:
        kind: a key of CLASSIFIERS.
        features: features of the frozen backbone.
        labels: their classes, in [0, classes); some classes may be absent.
        classes: number of classes.
        C: inverse strength of the regularisation, > 0.
        seed: seed of the classifier.

    Returns:
        A function from features ``[M, D]`` to scores ``[M, classes]`` on the same device; the score of a class without
        training rows is -inf.

    Raises:
        ValueError: all labels are of one class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MinMaxScaler
    from sklearn.svm import LinearSVC

    shared: Any = {"C": C, "max_iter": MAX_ITERATIONS, "random_state": seed}
    model = LogisticRegression(**shared) if kind == "logistic" else LinearSVC(**shared, dual=_PRIMAL)
    pipeline = make_pipeline(MinMaxScaler(), model).fit(features.cpu().numpy(), labels.cpu().numpy())
    known = torch.from_numpy(model.classes_)

    def scores(rows: Tensor) -> Tensor:
        found = torch.from_numpy(np.asarray(pipeline.decision_function(rows.cpu().numpy()), dtype=np.float64))
        if found.ndim == 1:  # for two classes, scikit-learn returns only the score of the second
            found = torch.stack([-found, found], dim=1)
        every = torch.full((len(found), classes), -torch.inf, dtype=found.dtype)
        every[:, known] = found
        return every.to(rows.device)

    return scores


def draw_strengths(count: int, seed: int) -> list[float]:
    """Draw ``count`` values of C, log-uniform in [1e-4, 100]."""
    low, high = np.log([1e-4, 100.0])
    return np.exp(np.random.default_rng(seed).uniform(low, high, count)).tolist()
