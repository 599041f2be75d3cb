"""Makes VISSL's Hydra find our configurations, in every command that composes them."""

import sys
from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class VisslExtPlugin(SearchPathPlugin):
    """Appends our folder, which VISSL's own names therefore cannot be hidden by, where VISSL is what composes."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra once per search path."""
        spec = find_spec("vissl_ext") if "vissl" in sys.modules else None
        for place in spec.submodule_search_locations or () if spec else ():
            package = Path(place)
            # an installed copy has the folder in the package, a checkout beside it
            for folder in (package / "configs", package.parent / "configs" / "vissl"):
                if folder.is_dir():
                    search_path.append("vissl_ext", f"file://{folder}")
                    return
