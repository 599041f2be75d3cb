"""List image folders. Each real folder is visited once, since a symbolic link may lead to one of its parents."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torchvision.datasets import ImageFolder as _ImageFolder
from torchvision.datasets.folder import has_file_allowed_extension

from plugins.tools.command import UserError


def walk(folder: str | Path) -> Iterator[tuple[str, list[str]]]:
    """List a folder and its subfolders, and follow symbolic links.

    Args:
        folder: the top folder.

    Yields:
        The path of each real folder, once, and the sorted names of the files in it.
    """
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield place, sorted(names)


def class_names(folder: str | Path) -> list[str]:
    """Return the sorted names of the folders in a folder, which number the classes."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def check_same_classes(
    train: str | Path, train_classes: Iterable[str], val: str | Path, val_classes: Iterable[str]
) -> None:
    """Require the same classes for training and validation; otherwise one label would mean two classes.

    Args:
        train: folder or file of the training images, for the error message.
        train_classes: names of its classes.
        val: folder or file of the validation images, for the error message.
        val_classes: names of its classes.

    Raises:
        UserError: the classes differ; the message names up to five that only one of the two has.
    """
    alone = sorted(set(train_classes) ^ set(val_classes))
    if alone:
        raise UserError(f"{train} and {val} have different class folders: only one of them has {', '.join(alone[:5])}")


class ImageFolder(_ImageFolder):
    """torchvision's ImageFolder with each image once; torchvision lists it 41 times if a folder links to itself."""

    @staticmethod
    def make_dataset(
        directory: str | Path,
        class_to_idx: dict[str, int],
        extensions: tuple[str, ...] | None = None,
        is_valid_file: Callable[[str], bool] | None = None,
        allow_empty: bool = False,
    ) -> list[tuple[str, int]]:
        """List the images of each class in torchvision's order.

        Raises:
            FileNotFoundError: a class has no images.
        """
        samples, empty = [], []
        for name in sorted(class_to_idx):
            paths = [f"{place}/{file}" for place, files in sorted(walk(Path(directory, name))) for file in files]
            valid = is_valid_file or (lambda path: has_file_allowed_extension(path, extensions or ()))
            found = [(path, class_to_idx[name]) for path in paths if valid(path)]
            samples += found
            empty += [] if found else [name]
        if empty and not allow_empty:
            raise FileNotFoundError(f"Found no valid file for the classes {', '.join(empty)}.")
        return samples
