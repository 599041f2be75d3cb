"""VISSL 0.1.6 on today's stack, with the methods of ``plugins``.

Importing anything from here mends what keeps VISSL from being imported; spawned processes that unpickle one of our
functions need that before they import VISSL themselves.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "plugins" / "shadow.py"))["check"](__name__)

from vissl_ext.compat import activate  # noqa: E402

activate()
