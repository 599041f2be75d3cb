"""The methods of ``plugins`` in VISSL 0.1.6, which is patched to run with current package versions.

Importing this package applies the patches without which VISSL cannot be imported, also in spawned processes that
unpickle a function of this package.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "plugins" / "shadow.py"))["check"](__name__)

from vissl_ext.compat import activate  # noqa: E402

activate()
