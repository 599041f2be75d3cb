"""What commands leave behind: JSON files, whole or not at all, and the versions that a result depends on."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("ssl-plugins", "torch", "torchvision", "numpy")


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, and its folder where there is none; an interrupted call leaves the file that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of Python, of what every result depends on, and of further packages; None where one is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*_PACKAGES, *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def difference(name: str, theirs: Any, ours: Any) -> tuple[str, Any, Any]:
    """The first entry in which two values differ: its full name, and both."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key):
                return difference(f"{name}.{key}", theirs.get(key), ours.get(key))
    return name, theirs, ours
