"""All methods as LightningModules: ``from lightly_ext.lightning import IsoLoss``.

They have the constructor and the attributes of the modules of lightly's benchmarks, and are of the flavour that
lightly uses, ``pytorch_lightning``. A Trainer of one flavour refuses modules of the other: for ``lightning.pytorch``
import them from ``lightly_ext.lightning.pytorch``.
"""

from typing import Any

from lightly_ext.names import CLASS_NAMES

__all__ = sorted(CLASS_NAMES)


def __getattr__(name: str) -> Any:
    """A class is made when it is asked for, so that only the flavour that is used is imported."""
    if name not in CLASS_NAMES:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    from pytorch_lightning import LightningModule

    from lightly_ext.lightning.module import bind

    return globals().setdefault(name, bind(name, LightningModule, __name__))
