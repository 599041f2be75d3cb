"""DirectCopy: the predictor is the second moment itself, without eigenvectors (Wang et al. 2021, arXiv:2110.04947)."""

from dataclasses import replace

from plugins.methods import directpred
from plugins.spec import Paper

SPEC = replace(
    directpred.SPEC,
    name="directcopy",
    options=directpred.closed_form_options(alpha=1.0, eps=0.25, iso=False),
    paper=Paper("DirectCopy", "Wang, Chen, Du and Tian 2021, arXiv:2110.04947"),
)
