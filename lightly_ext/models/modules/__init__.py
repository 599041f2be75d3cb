"""Parts of models: ``from lightly_ext.models.modules import SSLEYProjectionHead``."""

from lightly_ext.models.modules import heads
from lightly_ext.models.modules.heads import *  # noqa: F403

__all__ = list(heads.__all__)
