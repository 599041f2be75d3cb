"""Add our methods to the unmodified scripts of solo-learn's main branch.

Hydra imports every module of the namespace package ``hydra_plugins`` before a script's own function runs. This module
does nothing unless the script has imported solo-learn's main branch, and nothing in our own commands. If another
package ``plugins`` hides ours, it prints a line and the script runs without our methods.
"""

import sys

if "solo.backbones" in sys.modules and "solo_ext.compat" not in sys.modules:  # 1.0.2 has no module of that name
    try:
        from solo_ext.stock import activate
    except ImportError as error:
        if error.name != "plugins":
            raise
        # solo-learn's own methods work without ours
        print(f"solo_ext adds no methods: {error}", file=sys.stderr)
    else:
        activate()
