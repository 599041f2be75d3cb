"""Quality of representations without labels: spectra, scatters of views, alignment and uniformity."""

from plugins.linalg import participation_ratio
from plugins.metrics.lidar import lidar
from plugins.metrics.moments import Moments
from plugins.metrics.monitor import KINDS, MAX_WIDTH, Quality, QualityMonitor
from plugins.metrics.spectrum import alpha_req, nesum, rankme, stable_rank
from plugins.metrics.uniformity import RowSample, alignment, uniformity

__all__ = [
    "KINDS",
    "MAX_WIDTH",
    "Moments",
    "Quality",
    "QualityMonitor",
    "RowSample",
    "alignment",
    "alpha_req",
    "lidar",
    "nesum",
    "participation_ratio",
    "rankme",
    "stable_rank",
    "uniformity",
]
