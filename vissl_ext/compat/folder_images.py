"""Images of a folder with a folder for each class.

vissl/data/disk_dataset.py:121 decodes such an image to have its path for a message, and line 132 decodes it again; an
image that cannot be read is torchvision's error, which may not name the file.
"""

from typing import Any

from torchvision.datasets import ImageFolder

from plugins.tools.command import UserError


class PairedReads(ImageFolder):
    """torchvision's, for a reader that asks for each image twice in a row: the second answer is the first one's."""

    last: tuple[int, Any] | None = None

    def __getitem__(self, index: int) -> Any:
        """The image and its class.

        Raises:
            UserError: it cannot be read.
        """
        if self.last is not None and self.last[0] == index:
            sample, self.last = self.last[1], None
            return sample
        try:
            sample = super().__getitem__(index)
        except (OSError, SyntaxError, ValueError) as error:  # the three that Pillow has for a torn file
            raise UserError(f"cannot read the image {self.samples[index][0]}: {error}") from None
        self.last = index, sample
        return sample


def activate() -> None:
    """Let VISSL's data set read a folder's images with this."""
    from vissl.data import disk_dataset

    disk_dataset.ImageFolder = PairedReads
