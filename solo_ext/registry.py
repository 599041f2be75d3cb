"""Select the class that trains a method: one that is built from a MethodSpec of this package, or one of solo-learn.

If both have a method of a name (byol, dino, simsiam), solo-learn's class is used, unless the configuration has an
option that only ours has, such as ``log_eigvals``. A name in ``plugins.methods.VARIANTS`` has a third class, which
is used if the configuration has an option that only this class has.
"""

import warnings
from collections.abc import Collection, Iterable
from functools import cache, lru_cache

from omegaconf import DictConfig

from plugins.methods import METHODS, VARIANTS
from plugins.spec import MethodSpec, UnknownOptionError
from plugins.tools.command import UserError, did_you_mean
from plugins.tools.stacks import SHARED_COLOURS
from solo_ext.compat import MULTICROP, host_release, native_methods, native_options
from solo_ext.compat.common import needs_main_error
from solo_ext.config import count_stacks
from solo_ext.method import TeacherlessMethod, TeacherMethod
from solo_ext.transforms import is_stack, patches_of, shares_colours

ALIASES = {alias: name for name, spec in METHODS.items() for alias in spec.fork_names}
"""The forks' names of methods."""
MAIN_ONLY = ("all4one", "mae", "mocov3", "supcon", "vibcreg")
"""Methods of solo-learn's main branch that 1.0.2 does not have."""


@lru_cache(maxsize=1)
def plugin_methods() -> dict[str, type]:
    """Return a solo-learn class for every MethodSpec, by name."""
    return {name: _adapt(spec) for name, spec in METHODS.items()}


@cache
def _variant(name: str) -> type:
    return _adapt(VARIANTS[name])


def _adapt(spec: MethodSpec) -> type:
    base = TeacherMethod if spec.teacher else TeacherlessMethod
    return type(f"{base.__name__}[{spec.name}]", (base,), {"spec": spec, "__module__": __name__})


def register(methods: dict[str, type] | None = None) -> None:
    """Add our methods to solo-learn's METHODS. A second call changes nothing.

    Args:
        methods: {name: class}; None adds all of ours whose name solo-learn does not use.

    Raises:
        ValueError: another class has the name.
    """
    from solo.methods import METHODS as host

    if methods is None:
        natives = native_methods()
        methods = {name: cls for name, cls in plugin_methods().items() if name not in natives}
    for name, cls in methods.items():
        if name in host and host[name] is not cls:
            taken = host[name]
            raise ValueError(
                f"method {name!r} is registered twice: {taken.__module__}.{taken.__qualname__} "
                f"and {cls.__module__}.{cls.__qualname__}"
            )
    host.update(methods)


def method_class(cfg: DictConfig) -> type:
    """Return the class that trains ``cfg.method``.

    Raises:
        UserError: the method or one of its options is unknown, or the number of views is not allowed.
    """
    name = ALIASES.get(cfg.method, cfg.method)
    natives, plugins = native_methods(), plugin_methods()
    given = dict(cfg.get("method_kwargs") or {})
    if name in VARIANTS and set(given) & (_names(VARIANTS[name]) - _names(plugins[name].spec) - native_options(name)):
        plugins = {**plugins, name: _variant(name)}
    if name in MAIN_ONLY and name not in natives:
        raise needs_main_error(f"method {name}", host_release())
    if name not in natives and name not in plugins:
        known = sorted({*natives, *plugins, *ALIASES})
        raise UserError(f"unknown method {cfg.method!r}; choose from {', '.join(known)}{did_you_mean(name, known)}")
    if name in natives and not (name in plugins and _has_our_option(plugins[name].spec, given)):
        ours = f"; options of our {name}: {', '.join(plugins[name].spec.options)}" if name in plugins else ""
        _check_options(f"solo-learn's method {name}", given, native_options(name), ours)
        _check_native_crops(name, cfg)
        if cfg.get("accumulate", "mean") != "mean":
            raise UserError(
                f"accumulate={cfg.accumulate} is not available for solo-learn's own method {name}; use accumulate=mean"
            )
        return natives[name]
    _check_options(f"method {name}", given, _names(plugins[name].spec))
    views = cfg.get("augmentations") or ()
    stacks = count_stacks(views)
    try:
        plugins[name].spec.check_views(cfg.data.num_large_crops, cfg.data.num_small_crops, stacks)
    except ValueError as error:
        raise UserError(f"augmentations: {error}") from None
    try:
        options = plugins[name].spec.resolve(given)
        for view in filter(is_stack, views):
            plugins[name].spec.check_patches(options, patches_of(view))
    except ValueError as error:
        raise UserError(str(error)) from None
    if any(map(shares_colours, views)):
        warnings.warn(f"augmentations: {SHARED_COLOURS}", stacklevel=2)
    return plugins[name]


def _check_options(method: str, given: Collection[str], known: Collection[str], ours: str = "") -> None:
    """Check the names of a method's options; advise to remove those that only other methods have."""
    unknown = [key for key in given if key not in known]
    if not unknown:
        return
    others = set().union(*map(native_options, native_methods()), *map(_names, (*METHODS.values(), *VARIANTS.values())))
    foreign = [f"~method_kwargs.{key}" for key in unknown if key in others]
    it = "it" if len(foreign) == 1 else "such options"
    advice = f"other methods have it: remove {it} ({' '.join(foreign)})" if unknown[0] in others else ""
    raise UserError(f"{UnknownOptionError(method, unknown[0], known, advice)}{ours}")


def _check_native_crops(name: str, cfg: DictConfig) -> None:
    large, small = cfg.data.num_large_crops, cfg.data.num_small_crops
    if count_stacks(cfg.get("augmentations") or ()):
        raise UserError(f"solo-learn's method {name} takes no stacks of patches; remove jigsaw, rotation and grid")
    if large != 2 and name not in ("mae", "wmse"):
        raise UserError(f"solo-learn's method {name} needs 2 large crops, but augmentations produces {large}")
    if small and name not in MULTICROP:
        raise UserError(
            f"method {name} of solo-learn {host_release()} accepts no small crops, but augmentations produces {small}"
        )


def _has_our_option(spec: MethodSpec, given: Iterable[str]) -> bool:
    """Return whether one of the options belongs to our method and not to solo-learn's method of that name."""
    return any(key in _names(spec) - native_options(spec.name) for key in given)


def _names(spec: MethodSpec) -> set[str]:
    """Return the names and aliases of a method's options."""
    return {*spec.options, *(alias for option in spec.options.values() for alias in option.aliases)}
