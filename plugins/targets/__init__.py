"""Targets that the predictions of the online branch are compared with."""

from plugins.linalg import sinkhorn_codes
from plugins.targets.balanced_labels import balanced_labels
from plugins.targets.bank import IndexedBank
from plugins.targets.ema import EMATeacher, cosine_tau, needs_teacher, update_teacher
from plugins.targets.generalized_gaussian import (
    draw_generalized_gaussian,
    rectified_moments,
    rectified_unit_variance_scale,
    unit_variance_scale,
)
from plugins.targets.kmeans import kmeans, whitened
from plugins.targets.queue import RingQueue

__all__ = [
    "EMATeacher",
    "IndexedBank",
    "RingQueue",
    "balanced_labels",
    "cosine_tau",
    "draw_generalized_gaussian",
    "kmeans",
    "needs_teacher",
    "rectified_moments",
    "rectified_unit_variance_scale",
    "sinkhorn_codes",
    "unit_variance_scale",
    "update_teacher",
    "whitened",
]
