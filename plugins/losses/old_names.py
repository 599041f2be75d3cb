"""The former names of the arguments of Matrix-SSL's and MEC's losses, taken for one release more."""

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])
NEW = {"z0": "p0", "z1": "p1", "p0": "target0", "p1": "target1"}
"""Former name → name. What was p is target now, and what was z is p, as in all other losses."""


def takes_old_names(function: Function) -> Function:
    """Let a loss of ``(p0, p1, target0, target1)`` be called by the keywords z0, z1, p0 and p1, too, with a warning.

    A call is an old one if it names z0 or z1, or names p0 or p1 though their places are taken by position. The value is
    what it has always been.

    Args:
        function: the loss, or a method of that name.

    Raises:
        TypeError: at the call, old and new names are mixed.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **_translated(args, kwargs))

    # torch.compile counts recompilations by code object: one for each loss, not one for all
    call.__code__ = call.__code__.replace(co_name=function.__name__)
    return cast(Function, wraps(function)(call))


def _translated(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    by_place = sum(hasattr(argument, "ndim") for argument in args)  # a module's method has itself before its tensors
    taken = [name for place, name in enumerate(("p0", "p1")) if place < by_place and name in kwargs]
    if "z0" not in kwargs and "z1" not in kwargs and not taken:
        return kwargs
    new = [name for name in ("target0", "target1") if name in kwargs]
    if new:
        old = [name for name in NEW if name in kwargs]
        raise TypeError(
            f"the arguments are p0, p1 (predictions) and target0, target1 (the teacher's); got the former names "
            f"{', '.join(old)} mixed with {', '.join(new)}"
        )
    warnings.warn(
        "z0, z1, p0, p1 are now called p0, p1 (predictions, with gradient), target0, target1 (the teacher's), as in "
        "all losses; the former names will be errors in the next release",
        FutureWarning,
        stacklevel=3,
    )
    return {NEW.get(name, name): value for name, value in kwargs.items()}
