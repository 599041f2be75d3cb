"""Add the configurations of ``vissl_ext`` to the search path of VISSL's Hydra programs.

Hydra 1.3 finds the class by its scan of the namespace package ``hydra_plugins``, Hydra 1.4 by the entry point of the
group ``hydra.plugins`` in pyproject.toml.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class VisslExtPlugin(SearchPathPlugin):
    """Append our folder of configurations if the program has imported VISSL.

    The folder comes last, so a configuration of VISSL's is found before one of ours with the same name.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder."""
        spec = find_spec("vissl_ext") if "vissl" in sys.modules else None
        for place in spec.submodule_search_locations or () if spec else ():
            package = Path(place)
            # the wheel holds the folder inside the package, a checkout holds it in configs/vissl
            for folder in (package / "configs", package.parent / "configs" / "vissl"):
                if folder.is_dir():
                    search_path.append("vissl_ext", f"file://{folder}")
                    return
