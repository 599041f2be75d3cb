"""Both generations of solo-learn with the interface of its main branch.

The generations are 1.0.2, the only release on PyPI, and the main branch on GitHub (1.0.6). The main branch is used if
the environment variable SOLO_LEARN_CHECKOUT is the folder of a checkout, or if ``import solo`` finds it. The other
modules of ``solo_ext`` import solo-learn, called the host, from here and not from ``solo``:

* ``GENERATION``: "1.0.2" or "main",
* ``pl``: the Lightning package that the host's modules derive from,
* ``BaseMethod``, ``BaseMomentumMethod``: built from one ``cfg``, with ``backbone`` and ``momentum_backbone``,
* ``LinearModel``: the host's linear evaluation, built from a backbone and one ``cfg``,
* ``native_methods()``: the host's own methods by name, also built from one ``cfg``,
* ``native_options(name)``: the ``method_kwargs`` of a native method,
* ``MULTICROP``: the native methods that accept small crops,
* ``backbones()``: the values of ``backbone.name``,
* ``host_data``: the host's module of augmentations and datasets.

The modules ``solo_1_0_2`` and ``solo_main`` contain only what differs between the generations.
"""

import os
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from plugins.install import not_installed
from plugins.tools.command import UserError
from solo_ext.compat.common import CHECKOUT, IGNORED_OPTIONS, LinearMixin, MethodMixin, MomentumMixin


def _generation() -> str:
    """Return the generation of the solo-learn that will be imported.

    Raises:
        UserError: solo-learn is not installed, or SOLO_LEARN_CHECKOUT is not the folder of a checkout.
    """
    checkout = os.environ.get(CHECKOUT)
    if checkout and "solo" not in sys.modules:
        if not (Path(checkout) / "solo" / "backbones").is_dir():
            raise UserError(f"{CHECKOUT} must be the folder of a checkout of solo-learn's main branch, got {checkout}")
        folder = str(Path(checkout).resolve())
        if folder not in sys.path:
            sys.path.insert(0, folder)
    host = find_spec("solo")
    if host is None:
        raise UserError(f"{not_installed('solo')}; or set {CHECKOUT} to the folder of a checkout of its main branch")
    # importing the package would run code that the compat module must patch before
    folders = host.submodule_search_locations or ()
    return "main" if any((Path(folder) / "backbones").is_dir() for folder in folders) else "1.0.2"


GENERATION = _generation()

if GENERATION == "main":
    from solo_ext.compat import solo_main as _host
else:
    from solo_ext.compat import solo_1_0_2 as _host

MULTICROP = _host.MULTICROP
backbones = _host.backbones
host_data = _host.host_data
pl = _host.pl


class BaseMethod(_host.MainInterface, _host.HostBase):
    """The host's BaseMethod with main's interface."""


class BaseMomentumMethod(MomentumMixin, _host.MainInterface, _host.HostMomentumBase):
    """The host's BaseMomentumMethod with main's interface."""


class LinearModel(LinearMixin, _host.Linear):
    """The host's LinearModel with main's interface."""


@lru_cache(maxsize=1)
def native_methods() -> dict[str, type]:
    """Return solo-learn's own methods by name, each built from a ``cfg``."""
    natives = {}
    for name, cls in _host.METHODS.items():
        if name in ("base", "linear") or not issubclass(cls, _host.HostBase) or issubclass(cls, MethodMixin):
            continue
        momentum = (MomentumMixin,) if issubclass(cls, _host.HostMomentumBase) else ()
        content = {"native": True, "__module__": __name__}
        natives[name] = type(cls.__name__, (*momentum, _host.MainInterface, cls), content)
    return natives


def native_options(name: str) -> frozenset[str]:
    """Return the ``method_kwargs`` of a native method."""
    return frozenset({*_host.method_options(native_methods()[name]), *IGNORED_OPTIONS.get(name, ())})


def host_release() -> str:
    """Return the version of solo-learn."""
    return _host.RELEASE
