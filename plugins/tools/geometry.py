"""Changes of the place of an image's content: one flip for all views of an image, and small translations.

The transforms of all frameworks use them. They draw from torch's global generator, which a DataLoader seeds in each
worker.
"""

from typing import Any

import torch
from PIL import Image
from torchvision.transforms import functional as F

from plugins.checks import check_range, check_whole


class SharedFlip:
    """Flip all views of an image horizontally, or none of them.

    It takes the views after their other steps. This is the same as to flip the image before its views are made, as
    AMDIM does (Bachman, Hjelm & Buchwalter 2019, arXiv:1906.00910), because the other steps are as likely for the
    mirrored image. The views should have no flip of their own.

    Args:
        p: probability of the flip.

    Raises:
        ValueError: ``p`` is not in [0, 1].

    >>> [view.tolist() for view in SharedFlip(1.0)([torch.tensor([[[1, 2]]]), torch.tensor([[[3, 4]]])])]
    [[[[2, 1]]], [[[4, 3]]]]
    """

    def __init__(self, p: float = 0.5) -> None:
        check_range("p", p, low=0.0, high=1.0)
        self.p = p

    def __call__(self, views: list[Any]) -> list[Any]:
        """Return the views, tensors ``[..., H, W]`` or PIL images."""
        if torch.rand(()).item() >= self.p:
            return views
        return [F.hflip(view) for view in views]

    def __repr__(self) -> str:
        return f"SharedFlip({self.p})"


class Translate:
    """Move an image by a whole number of pixels in both directions; the gap shows the image's reflection.

    Each offset is uniform in −``pixels`` … ``pixels``. The published CIFAR settings of AMDIM have 4 pixels and a
    probability of 0.8.

    Args:
        pixels: largest offset, ≥ 1, below height and width of the image.
        p: probability that the image is moved; otherwise it is returned as it is.

    Raises:
        ValueError: an argument is out of range.

    >>> Translate(4, 0.0)(Image.new("RGB", (8, 8), (1, 2, 3))).getpixel((0, 0))
    (1, 2, 3)
    """

    def __init__(self, pixels: int = 4, p: float = 0.8) -> None:
        check_whole("pixels", pixels, low=1)
        check_range("p", p, low=0.0, high=1.0)
        self.pixels, self.p = pixels, p

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the moved image."""
        happens = torch.rand(()).item() < self.p
        top, left = torch.randint(2 * self.pixels + 1, (2,)).tolist()
        if not happens:
            return image
        width, height = image.size
        if self.pixels >= min(width, height):
            raise ValueError(
                f"pixels must be below height and width of the image, {width} x {height}, got {self.pixels}"
            )
        given: Any = image  # torchvision's annotations have tensors only
        padded: Any = F.pad(given, [self.pixels], padding_mode="reflect")
        return padded.crop((left, top, left + width, top + height))

    def __repr__(self) -> str:
        return f"Translate({self.pixels}, {self.p})"
