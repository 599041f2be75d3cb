"""ReLICv2: ReLIC with a view's own target among the pairs and few negatives, for several crops (arXiv:2201.05119).

The saliency masks of the paper, which remove the background of some of the large crops, are a transform of the images:
:mod:`plugins.tools.masks`.
"""

from dataclasses import replace

from plugins.methods import relic
from plugins.spec import Paper

SPEC = replace(
    relic.SPEC,
    name="relicv2",
    options={
        **relic.SPEC.options,
        **{
            name: replace(relic.SPEC.options[name], default=default)
            for name, default in {"pairs": "all", "num_negatives": 10, "stop": "entropy"}.items()
        },
    },
    paper=Paper("ReLICv2", "Tomasev et al. 2022, arXiv:2201.05119"),
)
