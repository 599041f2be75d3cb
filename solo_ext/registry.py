"""Which class trains a method: ours, one per MethodSpec, or solo-learn's own.

solo-learn keeps its names. Where both have a method (byol, dino, simsiam), ``method: byol`` is solo-learn's own, unless
the configuration gives an option that only ours has, such as ``log_eigvals``.
"""

from collections.abc import Iterable
from functools import lru_cache

from omegaconf import DictConfig

from plugins.methods import METHODS
from plugins.spec import MethodSpec
from plugins.tools.command import UserError
from solo_ext.compat import MULTICROP, host_release, native_methods, native_options
from solo_ext.compat.common import needs_main
from solo_ext.dino import PublishedDINO
from solo_ext.method import TeacherlessMethod, TeacherMethod

ALIASES = {"ssley": "ssl_ey"}
"""The forks' names of methods."""
MAIN_ONLY = ("all4one", "mae", "mocov3", "supcon", "vibcreg")
"""Methods that solo-learn's main branch has, and 1.0.2 has not."""


@lru_cache(maxsize=1)
def plugin_methods() -> dict[str, type]:
    """A solo-learn class for every MethodSpec, by name, and those that are there for solo-learn alone."""
    return {**{name: _adapt(spec) for name, spec in METHODS.items()}, PublishedDINO.spec.name: PublishedDINO}


def _adapt(spec: MethodSpec) -> type:
    base = TeacherMethod if spec.teacher else TeacherlessMethod
    return type(f"{base.__name__}[{spec.name}]", (base,), {"spec": spec, "__module__": __name__})


def register(methods: dict[str, type] | None = None) -> None:
    """Put our methods into solo-learn's METHODS, beside its own. A second call changes nothing.

    Args:
        methods: {name: class}; all of ours, without the names that solo-learn has itself, when None.

    Raises:
        ValueError: a name is taken by another class.
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
    """The class that trains ``cfg.method``.

    Raises:
        UserError: nobody has a method of that name, or it has no such option.
    """
    name = ALIASES.get(cfg.method, cfg.method)
    natives, plugins = native_methods(), plugin_methods()
    given = dict(cfg.get("method_kwargs") or {})
    if name in MAIN_ONLY and name not in natives:
        raise needs_main(f"method {name}", host_release())
    if name not in natives and name not in plugins:
        known = ", ".join(sorted({*natives, *plugins, *ALIASES}))
        raise UserError(f"unknown method {cfg.method!r}; choose from {known}")
    if name in natives and not (name in plugins and _ours_alone(plugins[name].spec, given)):
        known = native_options(name)
        for key in given:
            if key not in known:
                ours = f", and ours of that name {', '.join(plugins[name].spec.options)}" if name in plugins else ""
                raise UserError(
                    f"solo-learn's method {name} has no option {key!r}; it knows {', '.join(sorted(known))}{ours}"
                )
        _check_native_crops(name, cfg)
        if cfg.get("accumulate", "mean") != "mean":
            raise UserError(
                f"accumulate={cfg.accumulate} is not available for {name}, a method of solo-learn; use mean"
            )
        return natives[name]
    try:
        plugins[name].spec.check_views(cfg.data.num_large_crops, cfg.data.num_small_crops)
        plugins[name].spec.resolve(given)
    except ValueError as error:
        raise UserError(str(error)) from None
    return plugins[name]


def _check_native_crops(name: str, cfg: DictConfig) -> None:
    large, small = cfg.data.num_large_crops, cfg.data.num_small_crops
    if large != 2 and name not in ("mae", "wmse"):
        raise UserError(f"solo-learn's method {name} compares two large crops, the augmentations make {large}")
    if small and name not in MULTICROP:
        raise UserError(
            f"method {name} of solo-learn {host_release()} does not accept small crops, the augmentations make {small}"
        )


def _ours_alone(spec: MethodSpec, given: Iterable[str]) -> bool:
    """Whether one of the given options is known to our method of that name and not to solo-learn's."""
    ours = {*spec.options, *(alias for option in spec.options.values() for alias in option.aliases)}
    return any(key in ours - native_options(spec.name) for key in given)
