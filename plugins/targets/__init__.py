"""Targets that the predictions of the online branch are compared with."""

from plugins.linalg import sinkhorn_codes
from plugins.targets.balanced_labels import balanced_labels
from plugins.targets.bank import IndexedBank
from plugins.targets.ema import EMATeacher, cosine_tau, needs_teacher, update_teacher
from plugins.targets.kmeans import kmeans, whitened
from plugins.targets.queue import RingQueue

__all__ = [
    "EMATeacher",
    "IndexedBank",
    "RingQueue",
    "balanced_labels",
    "cosine_tau",
    "kmeans",
    "needs_teacher",
    "sinkhorn_codes",
    "update_teacher",
    "whitened",
]
