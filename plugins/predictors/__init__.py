"""Predictors: maps that the online branch applies to its projections before the comparison with a target."""

from plugins.predictors.closed_form import ClosedFormPredictor
from plugins.predictors.mlp import MLPPredictor
from plugins.predictors.moment import RunningMoment
from plugins.predictors.prototypes import Prototypes

__all__ = ["ClosedFormPredictor", "MLPPredictor", "Prototypes", "RunningMoment"]
