"""Benchmarks of our methods in the format of lightly's benchmarks: ``python -m lightly_ext.benchmarks --help``.

``METHODS`` is {name: {"model": LightningModule class, "transform": transform}}, as in lightly's own
``benchmarks/imagenet/resnet50/main.py``. The option ``--add`` adds the methods of such a file.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "METHODS":
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    from lightly_ext.benchmarks.methods import METHODS

    return METHODS
