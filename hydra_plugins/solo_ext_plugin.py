"""Make the unedited scripts of solo-learn's main branch train the methods of ``plugins``.

Hydra 1.3 finds the class by its scan of the namespace package ``hydra_plugins``, Hydra 1.4 by the entry point of the
group ``hydra.plugins`` in pyproject.toml.
"""

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class SoloExtPlugin(SearchPathPlugin):
    """Register our methods in solo-learn before the script's own function runs.

    Hydra calls this in each of its programs. It does nothing unless the program has imported the main branch of
    solo-learn, and nothing in the commands of ``solo_ext``, which register the methods themselves.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Register the methods, and leave the search path as it is.

        If another package ``plugins`` hides ours, print a line to stderr and let the script continue without our
        methods, because its own methods do not need us.
        """
        # release 1.0.2 has no module solo.backbones
        if "solo.backbones" not in sys.modules or "solo_ext.compat" in sys.modules:
            return
        try:
            from solo_ext.stock import activate
        except ImportError as error:
            if error.name != "plugins":
                raise
            print(f"solo_ext adds no methods: {error}", file=sys.stderr)
        else:
            activate()
