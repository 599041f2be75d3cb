"""The methods of ``plugins`` for lightly, under lightly's own names: replace ``lightly`` by ``lightly_ext``.

=================================  =====================================================================
lightly_ext.loss                   losses, with ``gather_distributed``
lightly_ext.models.modules.heads   projection and prediction heads
lightly_ext.transforms             augmentations
lightly_ext.data                   IndexedDataset, for methods that remember images
lightly_ext.models                 model classes for a backbone of your own
lightly_ext.lightning              the same as LightningModules, with the constructor of lightly's benchmarks
lightly_ext.benchmarks             METHODS, and ``python -m lightly_ext.benchmarks``
=================================  =====================================================================

``register()`` puts these names into lightly's own modules, ``unregister()`` takes them out again, and
``import lightly_ext.auto`` registers on import.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "plugins" / "shadow.py"))["check"](__name__)

from lightly_ext.registry import register, unregister  # noqa: E402

__all__ = ["register", "unregister"]
