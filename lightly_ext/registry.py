"""``register()`` puts our names into lightly's own modules: ``from lightly.loss import SSLEYLoss`` then works.

It is a convenience for scripts that import from lightly. ``lightly_ext`` is the import to prefer, for the names that
are injected exist in this process alone: a spawned worker that imports one from lightly has to register first, which
``import lightly_ext.auto`` does in one line. What is pickled names ``lightly_ext``, and needs no registration to load.
"""

import importlib
import importlib.util
import sys
import warnings
from types import ModuleType
from typing import Any

from plugins.install import not_installed

_MIRRORED = ("loss", "transforms", "models", "models.modules", "models.modules.heads")
_injected: dict[tuple[str, str], Any] = {}


def register() -> list[str]:
    """Put what lightly lacks into its modules; calling it again adds what is missing.

    A name that lightly has already stays lightly's; one warning lists those where ours is another object.

    Returns:
        The dotted names that are ours, sorted.

    Raises:
        ImportError: lightly is not installed.
    """
    if importlib.util.find_spec("lightly") is None:
        raise ImportError(not_installed("lightly"))
    kept = []
    for path in _MIRRORED:
        ours, theirs = (importlib.import_module(f"{package}.{path}") for package in ("lightly_ext", "lightly"))
        for name in ours.__all__:
            known = (theirs.__name__, name)
            present = vars(theirs).get(name)
            if present is None or present is _injected.get(known):
                if present is not vars(ours)[name]:
                    setattr(theirs, name, vars(ours)[name])
                _injected[known] = vars(ours)[name]
            elif present is not vars(ours)[name]:
                kept.append(f"{theirs.__name__}.{name}")
        _alias_files(ours, theirs)
    if kept:
        warnings.warn(
            f"lightly has its own {', '.join(kept)}, which stay as they are; ours are in lightly_ext", stacklevel=2
        )
    return sorted(f"{module}.{name}" for module, name in _injected)


def unregister() -> None:
    """Take out of lightly's modules what ``register`` put there, unless something else has taken its place."""
    for (module, name), ours in _injected.items():
        if sys.modules.get(f"{module}.{name}") is ours:
            del sys.modules[f"{module}.{name}"]
        if vars(sys.modules.get(module, object)).get(name) is ours:
            delattr(sys.modules[module], name)
    _injected.clear()


def _alias_files(ours: ModuleType, theirs: ModuleType) -> None:
    """``lightly.loss.ssley_loss`` for ``lightly_ext.loss.ssley_loss``, where lightly has no such file."""
    for full, module in list(sys.modules.items()):
        package, _, name = full.rpartition(".")
        if package != ours.__name__ or not name.endswith(("_loss", "_transform")):
            continue
        alias = f"{theirs.__name__}.{name}"
        known = (theirs.__name__, name)
        if sys.modules.get(alias) is module or importlib.util.find_spec(alias) is None:
            sys.modules[alias] = module
            setattr(theirs, name, module)
            _injected[known] = module
