"""Check or fetch data sets: ``python -m plugins.experiments.suites.prepare cifar10 stl10 --folder datasets``.

CIFAR and STL-10 are downloaded by torchvision if they are missing. If a data set cannot be
downloaded, the command prints a one-line error and exits with status 2, before anything is trained.
"""

import argparse
import contextlib
import io
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 30.0
"""Timeout of the connection to a server."""
DOWNLOADED: dict[str, tuple[str, dict[str, str]]] = {
    "cifar10": ("CIFAR10", {}),
    "cifar100": ("CIFAR100", {}),
    "stl10": ("STL10", {"split": "train+unlabeled"}),
}
"""data set → (class in torchvision.datasets, its options)."""
FOLDERS = {
    "tinyimagenet": "create it from its archive with: "
    "python -m plugins.tools.data tinyimagenet --archive tiny-imagenet-200.zip --out {place}",
    "imagenet": "download it manually, and put one folder per class into {place}/train and {place}/val",
    "imagenet100": "create it from ImageNet, and put one folder per class into {place}/train and {place}/val",
}
"""Data set → instructions to obtain it."""
CLASSES = {"tinyimagenet": 200, "imagenet": 1000, "imagenet100": 100}
"""Data set → number of class folders."""


class DataError(Exception):
    """A data set is missing or incomplete, and cannot be downloaded. The message is one line."""


def prepare(datasets: Sequence[str], folder: Path) -> None:
    """Check that data sets exist; download those that torchvision can download.

    Args:
        datasets: keys of DOWNLOADED and FOLDERS.
        folder: folder of the data sets.

    Raises:
        DataError: a data set is missing or incomplete and cannot be downloaded.
    """
    missing = []
    for name in datasets:
        place = folder / name
        if name not in FOLDERS:
            continue
        classes = [_classes(place / split) for split in ("train", "val")]
        if not all(classes):
            missing.append(f"{name} is not in {place}: {FOLDERS[name].format(place=place)}")
        elif len(classes[0]) != CLASSES[name] or classes[0] != classes[1]:
            found = "{} and {}".format(*map(len, classes))
            missing.append(
                f"{place}/train and {place}/val must have the same {CLASSES[name]} class folders, got {found}: "
                f"{FOLDERS[name].format(place=place)}"
            )
    if missing:
        raise DataError("; ".join(missing) + "; or choose other data sets with --data")
    for name in datasets:
        if name in DOWNLOADED:
            _download(name, folder)


def _classes(folder: Path) -> set[str]:
    """Return the names of the class folders that are not empty."""
    if not folder.is_dir():
        return set()
    return {entry.name for entry in folder.iterdir() if entry.is_dir() and any(entry.iterdir())}


def _download(name: str, folder: Path) -> None:
    from torchvision import datasets

    title, options = DOWNLOADED[name]
    dataset: Any = getattr(datasets, title)
    with contextlib.suppress(RuntimeError), contextlib.redirect_stdout(io.StringIO()):
        dataset(folder, **options)
        print(f"{name}: in {folder}", file=sys.stderr)
        return
    print(f"{name}: downloading into {folder}", flush=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        dataset(folder, download=True, **options)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name} is not in {folder} and could not be downloaded ({reason}): "
            f"put its archive {dataset.filename} there, or choose other data sets with --data"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m plugins.experiments.suites.prepare", description="Check or fetch data."
    )
    parser.add_argument("datasets", nargs="+", choices=[*DOWNLOADED, *FOLDERS], metavar="DATASET")
    parser.add_argument(
        "--folder", type=Path, default=Path("datasets"), help="folder of the data sets (default: datasets)"
    )
    parser.add_argument(
        "--elsewhere", action="store_true", help="the training runs on another machine than this command"
    )
    options = parser.parse_args(argv)
    try:
        prepare(options.datasets, options.folder)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.elsewhere:
        return 0
    import torch

    if not torch.cuda.is_available():
        print("no GPU is available: full training takes weeks on a CPU; shorten it with --epochs N")
    return 0


if __name__ == "__main__":
    sys.exit(main())
