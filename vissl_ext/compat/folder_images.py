"""Images of a folder, decoded by :mod:`plugins.tools.images`, once each, with the file's name in an error.

vissl/data/disk_dataset.py:121 decodes an image of a class folder to have its path for a message, and line 132 decodes
it again. Line 148 decodes an image of a list of files with ``convert("RGB")``, which clips 16-bit and floating-point
images.
"""

from types import SimpleNamespace
from typing import Any

from plugins.tools.folders import ImageFolder
from plugins.tools.images import open_image


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


def activate() -> None:
    """Replace VISSL's ways to read an image file."""
    from vissl.data import disk_dataset

    disk_dataset.ImageFolder = PairedReads
    disk_dataset.Image = SimpleNamespace(open=_open)
