"""SEER: SwAV with a wider head, more prototypes and more iterations, for RegNets (Goyal et al. 2021, arXiv:2103.01988).

The defaults are those of the published RegNetY-256Gf.
"""

from dataclasses import replace

from plugins.methods import swav
from plugins.spec import Paper

SPEC = replace(
    swav.SPEC,
    name="seer",
    options=swav.swav_options(hidden=8192, output=256, layers=3, norm=False, prototypes=16000, iterations=10),
    paper=Paper("SEER", "Goyal et al. 2021, arXiv:2103.01988"),
)
