"""Words of messages: suggestions for misspelt names, and numbers of things."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def nearest(name: Any, known: Iterable[Any], *, cutoff: float = 0.6) -> str | None:
    """Find the known name that is most similar to a misspelt one, for an error message.

    Args:
        name: the name that the user gave.
        known: the allowed names.
        cutoff: least similarity, between 0 and 1, as defined by :func:`difflib.get_close_matches`.

    Returns:
        The name, or None if none is similar enough.

    >>> nearest("isolos", ["byol", "isoloss"])
    'isoloss'
    """
    return next(iter(get_close_matches(str(name), map(str, known), 1, cutoff)), None)


def did_you_mean(name: Any, known: Iterable[Any]) -> str:
    """Return the end of an error message that names the most similar known name; empty if none is similar enough.

    Args:
        name: the name that the user gave.
        known: the allowed names.

    >>> did_you_mean("roh", ["alpha", "rho"])
    '; did you mean rho?'
    """
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else ""


def counted(number: int, noun: str) -> str:
    """Return a number and a noun, which gets an ``s`` unless the number is 1; "no" stands for 0.

    >>> counted(1, "epoch"), counted(2, "epoch"), counted(0, "small crop")
    ('1 epoch', '2 epochs', 'no small crops')
    """
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
