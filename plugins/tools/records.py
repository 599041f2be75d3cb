"""Read and write the JSON and CSV files of commands, and collect the package versions that a result depends on.

Files are written atomically: an interrupted call keeps the previous content of the file.
"""

import csv
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from plugins.tools.files import atomic

_PACKAGES = ("ssl-plugins", "torch", "torchvision", "numpy")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: the file is not valid JSON, is no UTF-8 text, or nests too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(str(error)) from None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically; its folder is created if it does not exist."""
    with atomic(path, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the complete rows of a CSV file; an incomplete last line of a killed process is skipped.

    Args:
        path: the file.

    Returns:
        A dictionary column → text for each row; an empty list if the file does not exist.
    """
    if not path.is_file():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0].decode(errors="replace").replace("\0", "")
    rows = list(csv.DictReader(whole.splitlines()))
    return [row for row in rows if None not in row and None not in row.values()]


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file atomically.

    Args:
        path: the file.
        columns: names of the columns, in order. Other keys of a row are ignored; a missing key gives an empty cell.
        rows: dictionaries column → value.
    """
    with atomic(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_row(path: Path, epoch: int, row: Mapping[str, float]) -> None:
    """Append the row of an epoch to a CSV file; existing rows of this epoch and of later ones are deleted.

    Args:
        path: the file. Its columns become ``epoch`` and the keys of the row.
        epoch: number of the epoch, from 0.
        row: column → value.
    """
    kept = [line for line in read_rows(path) if int(line["epoch"]) < epoch]
    write_rows(path, ["epoch", *row], [*kept, {"epoch": epoch, **row}])


def versions(*packages: str) -> dict[str, str | None]:
    """Return the versions of Python, of ssl-plugins, torch, torchvision and numpy, and of further packages.

    The version of a package that is not installed is None.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*_PACKAGES, *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def difference(name: str, theirs: Any, ours: Any) -> tuple[str, Any, Any]:
    """Return the first entry in which two nested values differ: its full name and both values.

    ``name`` comes before the other entries of a dictionary, which may be derived from it, and values before sections.

    >>> difference("net", {"kwargs": {"small": True}, "name": "a"}, {"kwargs": {"small": False}, "name": "b"})
    ('net.name', 'a', 'b')
    """
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = theirs.keys() | ours.keys()
        for key in sorted(keys, key=lambda key: (key.lower() != "name", isinstance(theirs.get(key), dict | list), key)):
            if theirs.get(key) != ours.get(key):
                return difference(f"{name}.{key}", theirs.get(key), ours.get(key))
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for index, (their, our) in enumerate(zip(theirs, ours, strict=True)):
            if their != our:
                return difference(f"{name}.{index}", their, our)
    return name, theirs, ours
