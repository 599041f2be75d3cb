"""``register()`` puts our names into lightly's own modules: ``from lightly.loss import SSLEYLoss`` then works.

It is a convenience for scripts that import from lightly. Prefer imports from ``lightly_ext``, because the injected
names exist in this process only: a spawned worker that imports one from lightly has to register first, with
``import lightly_ext.auto``. Pickled objects refer to ``lightly_ext`` and load without registration.
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
    """Add our names to lightly's modules; a second call adds names that are missing.

    Names that exist are not replaced: lightly's own, such as ``DINOTransform``, and those of others, which one warning
    lists.

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
            elif present is not vars(ours)[name] and not _is_of_lightly(present):
                kept.append(f"{theirs.__name__}.{name}")
        _alias_files(ours, theirs)
    if kept:
        warnings.warn(
            f"{', '.join(kept)} are of another package and are not replaced; import ours from lightly_ext", stacklevel=2
        )
    return sorted(f"{module}.{name}" for module, name in _injected)


def _is_of_lightly(thing: Any) -> bool:
    return getattr(thing, "__module__", "").startswith("lightly.")


def unregister() -> None:
    """Remove from lightly's modules the names that ``register`` added, unless they have been replaced since."""
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
