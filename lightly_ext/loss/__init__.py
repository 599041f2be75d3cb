"""Losses in lightly's dialect: ``from lightly_ext.loss import SSLEYLoss``.

Every loss module of ``plugins.losses`` is here, with ``gather_distributed`` in place of ``comm``. Its default is
False, as in lightly. BYOLLoss, IsoLoss and SSLEYLoss have lightly's order of arguments; the others keep that of
``plugins.losses``. DISSLLoss and CISSLLoss take lists of views: ``DISSLLoss()([t0, t1], [s0, s1])``.
"""

from torch import nn

from lightly_ext.collective import collective
from lightly_ext.loss.byol_loss import BYOLLoss
from lightly_ext.loss.iso_loss import IsoLoss
from lightly_ext.loss.ssley_loss import SSLEYLoss
from plugins import losses

__all__ = ["BYOLLoss", "IsoLoss", "SSLEYLoss"]


def _in_lightlys_dialect(ours: type[nn.Module]) -> type[nn.Module]:
    """Make a class of a loss with ``gather_distributed`` in place of ``comm``."""

    def __init__(self, *args, gather_distributed: bool = False, **kwargs) -> None:
        ours.__init__(self, *args, comm=collective(gather_distributed), **kwargs)
        self.gather_distributed = gather_distributed

    doc = f"""Implementation of {ours.__name__}.

    The arguments are those of ``plugins.losses.{ours.__name__}``, with one more in place of ``comm``.

    Attributes:
        gather_distributed:
            If True, the rows of all processes make one batch, and the gradients that DistributedDataParallel averages
            are exactly those of that batch.
    """
    return type(ours.__name__, (ours,), {"__init__": __init__, "__doc__": doc, "__module__": __name__})


for _name in losses.__all__:
    if _name.endswith("Loss") and _name not in __all__:
        globals()[_name] = _in_lightlys_dialect(vars(losses)[_name])
        __all__.append(_name)
__all__.sort()
