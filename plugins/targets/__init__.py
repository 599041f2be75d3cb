"""Targets that the predictions of the online branch are compared with."""

from plugins.targets.bank import IndexedBank
from plugins.targets.ema import EMATeacher, cosine_tau, needs_teacher, update_teacher

__all__ = ["EMATeacher", "IndexedBank", "cosine_tau", "needs_teacher", "update_teacher"]
