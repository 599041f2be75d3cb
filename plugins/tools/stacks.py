"""Transforms from one image to a stack of small images: shuffled patches, a turned view, or a grid of patches.

PIRL (Misra & van der Maaten 2020, arXiv:1912.01991) compares an image with a stack of the first two kinds. CPC (van den
Oord et al. 2018, arXiv:1807.03748) predicts patches of a grid from others of it. The transforms take PIL images, so
that the DataLoaders of all frameworks can use them. They draw from torch's global generator, which a DataLoader seeds
in each worker.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision import transforms as T

from plugins.checks import check_range, check_whole
from plugins.patches import grid_side

Scale = tuple[float, float]
SHARED_COLOURS = (
    "the patches of an image share its colours, by which they can be told from those of other images: the loss falls, "
    "and little is learned; change the colours of each patch by itself, by color_jitter or grayscale"
)
"""Warning for a grid of patches without a step that changes the colours of each patch."""


class Pieces(Protocol):
    """A transform from one image to ``count`` images of one size."""

    count: int

    def __call__(self, image: Image.Image) -> list[Image.Image]: ...


class Jigsaw:
    """Cut a random resized crop into grid x grid cells; return a window of each, in random order.

    Args:
        side: of the crop, in pixels, a multiple of ``grid``.
        window: side of the windows, in pixels, at most ``side / grid``. Each lies at a random place in its cell.
        grid: cells per side.
        scale: smallest and largest share of the image's area that the crop takes; None takes the central ``side``
            pixels without resizing, of an image that has been cropped already.
        interpolation: of the crop.
        permute: whether the order is random; otherwise it is row by row.

    Raises:
        ValueError: an argument is out of range, or the crop cannot be cut in this way.

    Reference:
        arXiv:1912.01991, section 3.3 and the appendix. VISSL's offsets never reach the last pixel of a cell; these do.

    >>> [patch.size for patch in Jigsaw(20, 8, 2)(Image.new("RGB", (32, 32)))]
    [(8, 8), (8, 8), (8, 8), (8, 8)]
    """

    def __init__(
        self,
        side: int = 255,
        window: int = 64,
        grid: int = 3,
        *,
        scale: Sequence[float] | None = (0.6, 1.0),
        interpolation: T.InterpolationMode = T.InterpolationMode.BILINEAR,
        permute: bool = True,
    ) -> None:
        for name, value in {"side": side, "window": window, "grid": grid}.items():
            check_whole(name, value, low=1)
        if side % grid:
            raise ValueError(f"side must be a multiple of grid = {grid}, got {side}; {side // grid * grid} is one")
        self.cell = side // grid
        if window > self.cell:
            raise ValueError(f"window must be at most side / grid = {self.cell} pixels, got {window}")
        self.crop: Any = T.CenterCrop(side)
        if scale is not None:
            self.crop = T.RandomResizedCrop(side, scale=_scale(scale), interpolation=interpolation)
        self.window, self.grid, self.permute = window, grid, permute
        self.count = grid**2

    def __call__(self, image: Image.Image) -> list[Image.Image]:
        """Return the patches."""
        crop = self.crop(image)
        offsets = torch.randint(self.cell - self.window + 1, (self.count, 2)).tolist()
        order = torch.randperm(self.count).tolist() if self.permute else range(self.count)
        patches = []
        for place in order:
            row, column = divmod(place, self.grid)
            left, top = column * self.cell + offsets[place][0], row * self.cell + offsets[place][1]
            patches.append(crop.crop((left, top, left + self.window, top + self.window)))
        return patches

    def __repr__(self) -> str:
        return f"Jigsaw({self.crop}, window={self.window}, grid={self.grid}, permute={self.permute})"


class Rotation:
    """Turn a random resized crop by 0, 90, 180 or 270 degrees: a stack of one image.

    Args:
        side: of the crop, in pixels.
        scale: smallest and largest share of the image's area that the crop takes.
        interpolation: of the crop.

    Reference:
        arXiv:1912.01991, section 4.4.

    >>> [view.size for view in Rotation(16)(Image.new("RGB", (32, 32)))]
    [(16, 16)]
    """

    count = 1

    def __init__(
        self,
        side: int = 224,
        *,
        scale: Sequence[float] = (0.08, 1.0),
        interpolation: T.InterpolationMode = T.InterpolationMode.BILINEAR,
    ) -> None:
        check_whole("side", side, low=1)
        self.crop = T.RandomResizedCrop(side, scale=_scale(scale), interpolation=interpolation)

    def __call__(self, image: Image.Image) -> list[Image.Image]:
        """Return the turned view in a list."""
        turn = int(torch.randint(4, ()))
        crop = self.crop(image)
        # a multiple of 90 degrees moves pixels and interpolates nothing
        return [crop.transpose(_TURNS[turn - 1]) if turn else crop]

    def __repr__(self) -> str:
        return f"Rotation({self.crop})"


_TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


class Grid:
    """Cut a random crop into a grid of patches that may overlap, row by row.

    Patch (i, j) has its corner at (i · stride, j · stride). The grid has ((side − patch) / stride + 1)² patches.

    Args:
        side: of the crop, in pixels.
        patch: side of a patch, in pixels.
        stride: distance of neighbouring patches, in pixels; below ``patch`` they overlap.
        window: side of a random window in each patch, in pixels; the other pixels of the patch are black. None keeps
            the whole patch.
        scale: smallest and largest share of the image's area that the crop takes, before it is resized; None takes
            ``side`` pixels without resizing.
        padding: black pixels at each border of the image before the crop.
        flip: probability that the crop is mirrored, for all patches together.
        interpolation: of the crop.

    Raises:
        ValueError: an argument is out of range, or the patches do not end at the border of the crop.

    Reference:
        arXiv:1807.03748, section 3.2: side 256, patch 64, stride 32, window 60; a grid of 7 × 7.

    >>> Grid(16, 8, 4).count
    9
    """

    def __init__(
        self,
        side: int = 256,
        patch: int = 64,
        stride: int = 32,
        *,
        window: int | None = None,
        scale: Sequence[float] | None = (0.6, 1.0),
        padding: int = 0,
        flip: float = 0.0,
        interpolation: T.InterpolationMode = T.InterpolationMode.BILINEAR,
    ) -> None:
        self.grid = grid_side(side, patch, stride)
        check_whole("padding", padding, low=0)
        if window is not None and not (type(window) is int and 1 <= window <= patch):
            raise ValueError(f"window must be an integer from 1 to patch = {patch}, or None, got {window!r}")
        check_range("flip", flip, low=0.0, high=1.0)
        crop: Any = T.RandomCrop(side)
        if scale is not None:
            crop = T.RandomResizedCrop(side, scale=_scale(scale), interpolation=interpolation)
        self.crop = T.Compose([*([T.Pad(padding)] if padding else []), crop, T.RandomHorizontalFlip(flip)])
        self.patch, self.stride, self.window = patch, stride, window
        self.count = self.grid**2

    def __call__(self, image: Image.Image) -> list[Image.Image]:
        """Return the patches."""
        crop, found = self.crop(image), []
        for place in range(self.count):
            row, column = divmod(place, self.grid)
            left, top = column * self.stride, row * self.stride
            patch = crop.crop((left, top, left + self.patch, top + self.patch))
            found.append(patch if self.window is None else self._windowed(patch, self.window))
        return found

    def _windowed(self, patch: Image.Image, window: int) -> Image.Image:
        left, top = torch.randint(self.patch - window + 1, (2,)).tolist()
        box = (left, top, left + window, top + window)
        kept = Image.new(patch.mode, patch.size)
        kept.paste(patch.crop(box), box)
        return kept

    def __repr__(self) -> str:
        return f"Grid({self.crop}, patch={self.patch}, stride={self.stride}, window={self.window})"


class Stack:
    """Apply a transform to each piece of an image by itself, and stack the results: ``[P, 3, h, w]``.

    Args:
        pieces: :class:`Jigsaw`, :class:`Rotation` or :class:`Grid`.
        each: transform from a PIL image to a tensor ``[3, h, w]``; it draws anew for each piece.

    >>> Stack(Jigsaw(20, 8, 2), T.ToTensor())(Image.new("RGB", (32, 32))).shape
    torch.Size([4, 3, 8, 8])
    """

    def __init__(self, pieces: Pieces, each: Callable[[Image.Image], Tensor]) -> None:
        self.pieces, self.each = pieces, each

    @property
    def count(self) -> int:
        """Number P of pieces."""
        return self.pieces.count

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the stack."""
        return torch.stack([self.each(piece) for piece in self.pieces(image)])

    def __repr__(self) -> str:
        return f"Stack({self.pieces}, {self.each})"


class Photometric:
    """Posterise, sharpen or soften, solarise and stretch the contrast of an image, with some probability.

    It keeps 4 to 8 bits, multiplies the sharpness by 0.1 to 1.9, inverts values above 0 to 256, and applies
    autocontrast, in this order.

    Args:
        p: probability that the image is changed; otherwise it is returned as it is.

    Reference:
        VISSL's ``ImgPilRandomPhotometric``, in its files of PIRL.

    >>> Photometric(0.0)(Image.new("RGB", (2, 2), (1, 2, 3))).getpixel((0, 0))
    (1, 2, 3)
    """

    def __init__(self, p: float = 0.66) -> None:
        check_range("p", p, low=0.0, high=1.0)
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the changed image."""
        happens, sharpness = torch.rand(2).tolist()
        bits, threshold = int(torch.randint(4, 9, ())), int(torch.randint(257, ()))
        if happens >= self.p:
            return image
        image = ImageEnhance.Sharpness(ImageOps.posterize(image, bits)).enhance(0.1 + 1.8 * sharpness)
        return ImageOps.autocontrast(ImageOps.solarize(image, threshold))

    def __repr__(self) -> str:
        return f"Photometric({self.p})"


def _scale(scale: Sequence[float]) -> Scale:
    low, high = scale
    for name, value in {"scale[0]": low, "scale[1]": high}.items():
        check_range(name, value, low=1e-6, high=1.0)
    if low > high:
        raise ValueError(f"scale must be (smallest, largest), got {tuple(scale)}")
    return float(low), float(high)
