"""Our methods in the shape of lightly's benchmarks; ``python -m lightly_ext.benchmarks --help`` runs them.

``METHODS`` is {name: {"model": LightningModule class, "transform": transform}}, as in lightly's own
``benchmarks/imagenet/resnet50/main.py``, whose entries can be added to it and run beside ours.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "METHODS":
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    from lightly_ext.benchmarks.methods import METHODS

    return METHODS
