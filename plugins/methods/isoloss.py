"""IsoLoss: DirectPred whose gradient skips the predictor: all eigenmodes learn at one rate (arXiv:2212.04858)."""

from dataclasses import replace

from plugins.methods import directpred
from plugins.spec import Paper

SPEC = replace(
    directpred.SPEC,
    name="isoloss",
    options=directpred.closed_form_options(alpha=0.5, eps=0.0, iso=True),
    paper=Paper("IsoLoss", "Halvagal, Laborieux and Zenke 2023, arXiv:2212.04858"),
)
