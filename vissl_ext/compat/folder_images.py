"""Decoding of image files by :mod:`plugins.tools.images`, once per image, with the path in error messages.

vissl/data/disk_dataset.py:121 decodes an image of a class folder to find its path for a message, and line 132 decodes
it again. Line 148 decodes an image of a list of files with ``convert("RGB")``, which clips 16-bit and floating-point
images. Line 146 replaces an image of a list that cannot be read by a grey image, which only the log reports.
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
"""File in the run's folder with the images that any process has reported, because workers restart in each epoch."""


class PairedReads(ImageFolder):
    """torchvision's ImageFolder that decodes an image once if it is read twice in succession.

    Args:
        root: folder with one subfolder per class.
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


def reset_unreadable(folder: Path) -> None:
    """Delete the list of images that have been reported as unreadable.

    Args:
        folder: folder of the run.
    """
    (folder / _UNREADABLE).unlink(missing_ok=True)


def _report(path: str, folder: Path) -> None:
    """Print that an image cannot be read, unless a process of the run has reported it."""
    reported = folder / _UNREADABLE
    if reported.is_file() and path in reported.read_text().splitlines():
        return
    try:
        open_image(path)
        reason = "it cannot be read"
    except UserError as error:
        reason = str(error)
    print(f"{reason}; it is replaced by a grey image or by another image of the training", flush=True)
    try:
        with reported.open("a") as file:
            file.write(f"{path}\n")
    except OSError:
        pass  # it will be reported again


def _reporting(get: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``__getitem__`` of VISSL's data set so that it reports images that cannot be read."""

    @wraps(get)
    def item(self: Any, index: int) -> Any:
        image, success = get(self, index)
        if not success and self.data_source == "disk_filelist":
            path = self._replace_img_path_prefix(str(self.image_dataset[index]), self._remove_prefix, self._new_prefix)
            _report(path, Path(self.cfg["CHECKPOINT"]["DIR"]))
        return image, success

    return item


def activate() -> None:
    """Replace the functions with which VISSL reads image files."""
    from vissl.data import disk_dataset

    disk_dataset.ImageFolder = PairedReads
    disk_dataset.Image = SimpleNamespace(open=_open)
    dataset = disk_dataset.DiskImageDataset
    if not hasattr(dataset.__getitem__, "__wrapped__"):
        dataset.__getitem__ = _reporting(dataset.__getitem__)
