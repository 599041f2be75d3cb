"""Images of a folder, decoded by :mod:`plugins.tools.images`, once each, with the file's name in an error.

vissl/data/disk_dataset.py:121 decodes an image of a class folder to have its path for a message, and line 132 decodes
it again. Line 148 decodes an image of a list of files with ``convert("RGB")``, which clips 16-bit and floating-point
images. An image of a list that cannot be read is replaced, at line 146, by a grey one, of which the log alone hears.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from plugins.tools.command import UserError
from plugins.tools.folders import ImageFolder
from plugins.tools.images import open_image

_UNREADABLE = "unreadable_images.txt"
"""In the run's folder: the images that have been named, by all processes, whose loaders begin anew each epoch."""


class PairedReads(ImageFolder):
    """torchvision's ImageFolder for a reader that asks for each image twice in a row and decodes it once.

    Args:
        root: the folder with a folder for each class.
    """

    last: tuple[int, Any] | None = None

    def __init__(self, root: str) -> None:
        super().__init__(root, loader=open_image)

    def __getitem__(self, index: int) -> Any:
        """Return the image and its class.

        Raises:
            UserError: the image cannot be decoded.
        """
        if self.last is not None and self.last[0] == index:
            sample, self.last = self.last[1], None
            return sample
        sample = super().__getitem__(index)
        self.last = index, sample
        return sample


def _open(file: Any) -> Any:
    """Decode an open file of a list, in place of ``PIL.Image.open``."""
    return open_image(file, file.name)


def forget_unreadable(folder: Path) -> None:
    """Let images that cannot be read be named anew.

    Args:
        folder: of the run.
    """
    (folder / _UNREADABLE).unlink(missing_ok=True)


def _name(path: str, folder: Path) -> None:
    """Say that an image cannot be read, unless a process of the run has said so."""
    said = folder / _UNREADABLE
    if said.is_file() and path in said.read_text().splitlines():
        return
    try:
        open_image(path)
        reason = "it cannot be read"
    except UserError as error:
        reason = str(error)
    print(f"{reason}; a grey image, or another one, takes its place in the training", flush=True)
    try:
        with said.open("a") as file:
            file.write(f"{path}\n")
    except OSError:
        pass  # then it is said again


def _named(get: Callable[..., Any]) -> Callable[..., Any]:
    """An item of VISSL's data set; an image that cannot be read is named on the console."""

    @wraps(get)
    def item(self: Any, index: int) -> Any:
        image, success = get(self, index)
        if not success and self.data_source == "disk_filelist":
            path = self._replace_img_path_prefix(str(self.image_dataset[index]), self._remove_prefix, self._new_prefix)
            _name(path, Path(self.cfg["CHECKPOINT"]["DIR"]))
        return image, success

    return item


def activate() -> None:
    """Replace VISSL's ways to read an image file."""
    from vissl.data import disk_dataset

    disk_dataset.ImageFolder = PairedReads
    disk_dataset.Image = SimpleNamespace(open=_open)
    dataset = disk_dataset.DiskImageDataset
    if not hasattr(dataset.__getitem__, "__wrapped__"):
        dataset.__getitem__ = _named(dataset.__getitem__)
