"""DirectCopy: the predictor is the second moment itself, without eigenvectors (Wang et al. 2021, arXiv:2110.04947)."""

from dataclasses import replace

from plugins.methods import directpred

SPEC = replace(
    directpred.SPEC,
    name="directcopy",
    title="DirectCopy",
    options=directpred.closed_form_options(alpha=1.0, eps=0.25, iso=False),
    reference="Wang, Chen, Du and Tian 2021, arXiv:2110.04947",
)
