"""What commands leave behind: JSON and CSV files, whole or not at all, and the versions that a result depends on."""

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
    """What a JSON file holds."""
    return json.loads(path.read_text())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, and its folder where there is none; an interrupted call leaves the file that was there."""
    with atomic(path, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the complete rows of a CSV file; a last line that a killed process cut short is left out.

    Args:
        path: of the file.

    Returns:
        A dictionary column → text for each row; empty if there is no file.
    """
    if not path.is_file():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0].decode(errors="replace").replace("\0", "")
    rows = list(csv.DictReader(whole.splitlines()))
    return [row for row in rows if None not in row and None not in row.values()]


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file; an interrupted call leaves the file that was there.

    Args:
        path: of the file.
        columns: in order; what else a row holds is left out, what it lacks is empty.
        rows: column → value.
    """
    with atomic(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_row(path: Path, epoch: int, row: Mapping[str, float]) -> None:
    """Put an epoch's row into a CSV file, in place of rows of this epoch and later.

    Args:
        path: of the file; its columns become ``epoch`` and those of the row.
        epoch: counted from 0.
        row: column → value.
    """
    kept = [line for line in read_rows(path) if int(line["epoch"]) < epoch]
    write_rows(path, ["epoch", *row], [*kept, {"epoch": epoch, **row}])


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
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for index, (their, our) in enumerate(zip(theirs, ours, strict=True)):
            if their != our:
                return difference(f"{name}.{index}", their, our)
    return name, theirs, ours
