"""IsoCopy: IsoLoss with DirectCopy's predictor (arXiv:2212.04858)."""

from dataclasses import replace

from plugins.methods import directpred
from plugins.spec import Paper

SPEC = replace(
    directpred.SPEC,
    name="isocopy",
    options=directpred.closed_form_options(alpha=1.0, eps=0.25, iso=True),
    paper=Paper("IsoCopy", "Halvagal, Laborieux and Zenke 2023, arXiv:2212.04858"),
)
