"""solo-learn, whichever generation is there, behind the interface of its main branch.

There are two: 1.0.2, the only release in the registry, and the main branch on GitHub (1.0.6), which no registry has.
Main is taken when the environment variable SOLO_LEARN_CHECKOUT names the folder of a checkout, or when it is what
``import solo`` finds. Everything else in ``solo_ext`` takes the host from here and never imports ``solo`` itself:

* ``GENERATION`` – "1.0.2" or "main",
* ``pl`` – the Lightning flavour that the host's modules derive from,
* ``BaseMethod``, ``BaseMomentumMethod`` – built from one ``cfg``, with ``backbone`` and ``momentum_backbone``,
* ``LinearModel`` – the host's linear evaluation, built from a backbone and one ``cfg``,
* ``native_methods()`` – the host's own methods by name, built from one ``cfg`` too,
* ``native_options(name)`` – the ``method_kwargs`` that a native method knows,
* ``MULTICROP`` – the native methods that take small crops beside the large ones,
* ``backbones()`` – the names that ``backbone.name`` can take,
* ``host_data`` – the host's module of augmentations and datasets.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from plugins.install import not_installed
from plugins.tools.command import UserError

CHECKOUT = "SOLO_LEARN_CHECKOUT"
"""Environment variable: the folder of a checkout of solo-learn's main branch."""


def _generation() -> str:
    """Find the host.

    Raises:
        UserError: there is none, or no checkout where there should be one.
    """
    checkout = os.environ.get(CHECKOUT)
    if checkout and "solo" not in sys.modules:
        if not (Path(checkout) / "solo" / "backbones").is_dir():
            raise UserError(f"{CHECKOUT} names no checkout of solo-learn's main branch: {checkout}")
        folder = str(Path(checkout).resolve())
        if folder not in sys.path:
            sys.path.insert(0, folder)
    host = find_spec("solo")
    if host is None:
        raise UserError(f"{not_installed('solo')}; or let {CHECKOUT} name the folder of a checkout of its main branch")
    # looked for as a folder: importing the package would run the code that has yet to be mended
    places = host.submodule_search_locations or ()
    return "main" if any((Path(place) / "backbones").is_dir() for place in places) else "1.0.2"


GENERATION = _generation()

if GENERATION == "main":
    from solo_ext.compat import solo_main as _host
else:
    from solo_ext.compat import solo_1_0_2 as _host

MULTICROP = _host.MULTICROP
BaseMethod = _host.BaseMethod
BaseMomentumMethod = _host.BaseMomentumMethod
LinearModel = _host.LinearModel
backbones = _host.backbones
host_data = _host.host_data
native_methods = _host.native_methods
native_options = _host.native_options
pl = _host.pl


def host_release() -> str:
    """The version of solo-learn."""
    return _host.RELEASE
