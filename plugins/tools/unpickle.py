"""Read checkpoints that hold code, without running it.

Stock solo-learn puts ``functools.partial(static_lr, …)`` into the schedule of a checkpoint, which torch rightly refuses
to read with ``weights_only=True``: a pickle may call any function. Here torch's restricted reader reads the file, and
whatever it does not know is replaced by a stand-in that does nothing. Weights and plain values come out as they are.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch


class Inert:
    """Stands in for a class or function that a checkpoint names: takes any arguments and any state, keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _mapping(*args: Any) -> dict[Any, Any]:
    """Stands in for a mapping that is filled after it was made: torch's reader fills this kind only."""
    return OrderedDict()


_MAPPINGS = ("collections.defaultdict",)


def load_inert(path: Path) -> tuple[Any, list[str]]:
    """Load a file of torch.save onto the CPU; nothing that it names is imported or called.

    Functions of the modules os and sys, and files in torch's format of before 1.6 that hold code, are refused.

    Args:
        path: the file.

    Returns:
        What the file holds, and the sorted names of what was replaced by an :class:`Inert`.

    Raises:
        Exception: what torch.load raises of a file that it cannot read or refuses.
    """
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except ValueError:
        names = []  # not a zip file: torch.load will say what it thinks of it
    stand_ins: list[Any] = [(_mapping if name in _MAPPINGS else Inert, name) for name in names]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True), names
