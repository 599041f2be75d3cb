"""The classes of ``lightly_ext.lightning`` for Trainers of ``lightning.pytorch``."""

from typing import Any

from lightly_ext.names import CLASS_NAMES

__all__ = sorted(CLASS_NAMES)


def __getattr__(name: str) -> Any:
    if name not in CLASS_NAMES:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    from lightning.pytorch import LightningModule

    from lightly_ext.lightning.module import bind

    return globals().setdefault(name, bind(name, LightningModule, __name__))
