"""Modules of the user, which register losses, trunks, heads or transforms with VISSL: ``--import MODULE``."""

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

from plugins.tools.command import UserError

KEY = "IMPORTED_MODULES"
"""Key below ``config`` with the modules, which each process of a run imports before VISSL builds anything."""


def import_modules(names: Iterable[str]) -> list[str]:
    """Import modules of the user. Repeated calls have no effect.

    Args:
        names: names of modules, found on Python's path or in the working directory, or paths of .py files.

    Returns:
        What another process imports: absolute paths for files, the names of all others.

    Raises:
        UserError: there is no such module, or its import fails.
    """
    found = []
    for given in names:
        path, name = Path(given).expanduser().absolute(), given
        place = Path.cwd()
        if given.endswith(".py"):
            if not path.is_file():
                raise UserError(f"--import: there is no file {given}")
            place, name, given = path.parent, path.stem, str(path)
        if str(place) not in sys.path:
            sys.path.append(str(place))
        try:
            module = importlib.import_module(name)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--import {given}: the import failed with {type(error).__name__}: {reason}") from error
        if given.endswith(".py") and Path(module.__file__ or "").absolute() != path:
            raise UserError(f"--import {given}: another module has the name {name}; rename the file")
        found.append(given)
    return found
