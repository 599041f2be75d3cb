"""What VISSL 0.1.6 needs to run on today's stack, one small module each, named after what it mends.

Every module has ``activate()``, which may be called again without harm, and names in its docstring the file and line
that needs it. The tests show of each that it is still needed.
"""

from importlib.util import find_spec

from vissl_ext.compat import checkpoints, import_warnings, kinetics400, numpy_names, pkg_resources


def activate() -> None:
    """Mend everything; does nothing where VISSL is not installed."""
    if find_spec("vissl") is None:
        return
    for mend in (import_warnings, pkg_resources, numpy_names, kinetics400, checkpoints):
        mend.activate()
