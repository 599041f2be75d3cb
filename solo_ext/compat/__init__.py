"""solo-learn, whichever release is installed, behind the interface of its main branch.

Everything else in ``solo_ext`` takes the host from here and never imports ``solo`` itself:

* ``pl`` – the Lightning flavour that the host's modules derive from,
* ``BaseMethod``, ``BaseMomentumMethod`` – built from one ``cfg``, with ``backbone`` and ``momentum_backbone``,
* ``LinearModel`` – the host's linear evaluation, built from a backbone and one ``cfg``,
* ``native_methods()`` – the host's own methods by name, built from one ``cfg`` too,
* ``native_options(name)`` – the ``method_kwargs`` that a native method knows,
* ``host_data`` – the host's module of augmentations and datasets,
* ``GENERATION`` – "1.0.2" or "main".
"""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from solo_ext.errors import UserError


def host_release() -> str:
    """The version of the installed solo-learn.

    Raises:
        UserError: there is none, or it is one that this release cannot drive.
    """
    host = find_spec("solo")
    if host is None:
        raise UserError("solo-learn is not installed; run ./run_experiments.sh once, or: uv sync --extra solo")
    # looked for as a folder: importing the package would run the code that has yet to be mended
    if any((Path(place) / "backbones").is_dir() for place in host.submodule_search_locations or ()):
        raise UserError(
            "the solo-learn found here is a checkout of its main branch; this release drives solo-learn 1.0.2"
        )
    try:
        return version("solo-learn")
    except PackageNotFoundError:
        return "unknown"


host_release()

from solo_ext.compat.solo_1_0_2 import (  # noqa: E402  (the host must be known to be there)
    BaseMethod,
    BaseMomentumMethod,
    LinearModel,
    host_data,
    native_methods,
    native_options,
    pl,
)

GENERATION = "1.0.2"

__all__ = [
    "GENERATION",
    "BaseMethod",
    "BaseMomentumMethod",
    "LinearModel",
    "host_data",
    "host_release",
    "native_methods",
    "native_options",
    "pl",
]
