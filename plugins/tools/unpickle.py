"""Load checkpoints that contain functions and classes, without importing or calling them.

Stock solo-learn stores ``functools.partial(static_lr, …)`` in the scheduler state of a checkpoint. torch rejects such a
file with ``weights_only=True``, since a pickle may call any function. This module loads the file with torch's
restricted unpickler and replaces every unknown class or function by a placeholder without behaviour. Weights and plain
values are loaded unchanged.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from plugins.tools.command import UserError


class Placeholder:
    """Placeholder for a class or function in a checkpoint: accepts any arguments and any state and ignores them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> "Placeholder":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _mapping(*args: Any) -> dict[Any, Any]:
    """Return an empty OrderedDict in place of another mapping, since torch's unpickler can only fill this class."""
    return OrderedDict()


_MAPPINGS = ("collections.defaultdict",)


def load_without_code(path: Path) -> tuple[Any, list[str]]:
    """Load a file of torch.save onto the CPU, without importing or calling the functions and classes in it.

    Functions of the modules os and sys raise an error, and so do files in torch's format before 1.6 that contain
    functions or classes.

    Args:
        path: the file.

    Returns:
        The content of the file, and the sorted names that were replaced by a :class:`Placeholder`.

    Raises:
        Exception: the exception of torch.load for a file that it cannot read or rejects.
    """
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except ValueError:
        names = []  # not a zip file: torch.load raises the error
    placeholders: list[Any] = [(_mapping if name in _MAPPINGS else Placeholder, name) for name in names]
    with torch.serialization.safe_globals(placeholders):
        return torch.load(path, map_location="cpu", weights_only=True), names


def read_without_code(path: Path) -> tuple[Any, list[str]]:
    """Load a file as :func:`load_without_code` does.

    Raises:
        UserError: torch cannot read the file, or rejects it.
    """
    with checkpoint_errors(path):
        return load_without_code(path)


@contextmanager
def checkpoint_errors(path: Path) -> Iterator[None]:
    """Turn the exceptions of torch.load into one-line errors.

    Args:
        path: the file that the block loads.

    Raises:
        UserError: torch cannot read the file, or rejects it.
    """
    try:
        yield
    except Exception as error:
        reason = "it was not written by torch.save, or it contains code that is not safe to load"
        if isinstance(error, OSError | RuntimeError) and str(error).strip():
            reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read as a checkpoint: {reason}") from None
