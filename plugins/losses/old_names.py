"""Accept the former argument names of the Matrix-SSL and MEC losses for one more release."""

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])
NEW = {"z0": "p0", "z1": "p1", "p0": "target0", "p1": "target1"}
"""Former name → name. The former p is now called target, and the former z is called p, as in all other losses."""


def takes_old_names(function: Function) -> Function:
    """Accept the former keywords z0, z1, p0 and p1 for ``(p0, p1, target0, target1)``, with a FutureWarning.

    A call uses the former names if it passes z0 or z1, or passes p0 or p1 as keywords although positional arguments
    take their places. The result does not change.

    Args:
        function: the loss, or a method of that name.

    Raises:
        TypeError: a call mixes former and present names.
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
