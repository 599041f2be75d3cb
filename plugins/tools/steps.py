"""Transforms of an image as an ordered list of steps by name, as the YAML files of Self-Supervised-Vision have them.

``- color_jitter: {brightness: 0.4, apply_prob: 0.8}`` is torchvision's ``RandomApply([ColorJitter(brightness=0.4)],
p=0.8)``; ``- random_flip`` is a step with its defaults. The order is that of the list.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms as T

from plugins.checks import check_range, check_whole
from plugins.spelling import did_you_mean
from plugins.tools.geometry import Translate


class GaussianBlur:
    """Blur a PIL image; the width is uniform in ``sigma``, in pixels."""

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0)) -> None:
        low, high = sigma
        check_range("sigma[0]", low, low=0.0)
        check_range("sigma[1]", high, low=low)
        self.sigma = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the blurred image."""
        low, high = self.sigma
        return image.filter(ImageFilter.GaussianBlur(low + (high - low) * torch.rand(()).item()))

    def __repr__(self) -> str:
        return f"GaussianBlur({self.sigma})"


class Cutout:
    """Set squares of an image ``[C, H, W]`` to 0. All squares of an image have one side, an even number.

    The side is twice the half, rounded down, of a uniform number from 1 to ``max_len``, so that it may be 0.

    Args:
        n_cuts: number of squares; their centres are uniform in the image.
        max_len: largest side plus one if it is odd, in pixels.

    >>> Cutout(1, 1)(torch.ones(1, 4, 4)).shape
    torch.Size([1, 4, 4])
    """

    def __init__(self, n_cuts: int = 0, max_len: int = 1) -> None:
        check_whole("n_cuts", n_cuts, low=0)
        check_whole("max_len", max_len, low=1)
        self.n_cuts, self.max_len = n_cuts, max_len

    def __call__(self, image: Tensor) -> Tensor:
        """Return a copy with the squares."""
        image, (height, width) = image.clone(), image.shape[-2:]
        half = int(torch.randint(1, self.max_len + 1, ())) // 2
        for _ in range(self.n_cuts):
            row, column = int(torch.randint(height + 1, ())), int(torch.randint(width + 1, ()))
            image[..., max(row - half, 0) : row + half, max(column - half, 0) : column + half] = 0
        return image

    def __repr__(self) -> str:
        return f"Cutout({self.n_cuts}, {self.max_len})"


class RandAug:
    """Change a PIL image by ``n_aug`` operations, drawn with replacement and of fixed strength.

    Of 14 operations, nine change the image: autocontrast, equalize, a rotation by up to 30 degrees, an inversion of all
    values above 0, shears of up to 0.1 and translations of up to a tenth of the side in both directions, and one bit
    per channel. The other five have the strength 1 in Self-Supervised-Vision, which is none.
    """

    def __init__(self, n_aug: int = 4) -> None:
        check_whole("n_aug", n_aug, low=0)
        self.n_aug = n_aug

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the changed image."""
        for operation in torch.randint(14, (self.n_aug,)).tolist():
            signed = 2 * torch.rand(()).item() - 1
            image = self._changed(image, operation, signed)
        return image

    def _changed(self, image: Image.Image, operation: int, signed: float) -> Image.Image:
        plain: dict[int, Callable[[Image.Image], Image.Image]] = {
            0: ImageOps.autocontrast,
            1: ImageOps.equalize,
            2: lambda one: ImageOps.solarize(one, 1),
            3: lambda one: ImageOps.posterize(one, 1),
            4: lambda one: one.rotate(30 * signed),
        }
        if operation in plain:
            return plain[operation](image)
        tenth, (width, height) = signed / 10, image.size
        affine = {
            5: (1, tenth, 0, 0, 1, 0),
            6: (1, 0, 0, tenth, 1, 0),
            7: (1, 0, tenth * width, 0, 1, 0),
            8: (1, 0, 0, 0, 1, tenth * height),
        }
        if operation not in affine:
            return image
        return image.transform(image.size, Image.Transform.AFFINE, affine[operation])

    def __repr__(self) -> str:
        return f"RandAug({self.n_aug})"


def _translate(pixels: int = 4) -> Translate:
    return Translate(pixels, 1.0)


STEPS: Mapping[str, Callable[..., Any]] = {
    "color_jitter": T.ColorJitter,
    "random_gray": T.RandomGrayscale,
    "random_resized_crop": T.RandomResizedCrop,
    "random_flip": T.RandomHorizontalFlip,
    "random_crop": T.RandomCrop,
    "random_translate": _translate,
    "center_crop": T.CenterCrop,
    "resize": T.Resize,
    "gaussian_blur": GaussianBlur,
    "rand_aug": RandAug,
    "cutout": Cutout,
    "to_tensor": T.ToTensor,
    "normalize": T.Normalize,
}
"""The steps by name; the options of a step are the arguments of its class, and ``apply_prob``, its probability."""
GEOMETRIC = frozenset(
    {
        "random_resized_crop",
        "random_crop",
        "random_flip",
        "random_translate",
        "center_crop",
        "resize",
    }
)
"""Steps that move the content of an image."""
COLOURS = frozenset({"color_jitter", "random_gray", "rand_aug"})
"""Steps that change the colours of an image at random."""
_OF_TENSORS = frozenset({"normalize", "cutout"})


def build_step(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Build one step.

    Args:
        name: a key of STEPS.
        options: of the step; None means its defaults. ``interpolation`` is a name, such as "bicubic".

    Raises:
        ValueError: the step or an option is unknown, or a value is out of range.

    >>> build_step("color_jitter", {"hue": 0.1, "apply_prob": 0.8}).p
    0.8
    """
    if name not in STEPS:
        raise ValueError(f"there is no transform {name!r}; choose from {', '.join(STEPS)}{did_you_mean(name, STEPS)}")
    if not isinstance(options, Mapping | None):
        raise ValueError(f"{name} must be a mapping of its options, or empty, got {options!r}")
    given = dict(options or {})
    probability = given.pop("apply_prob", None)
    known = [*inspect.signature(STEPS[name]).parameters]
    for key in given:
        if key not in known:
            known = [*known, "apply_prob"]
            raise ValueError(
                f"{name} has no option {key!r}; known options: {', '.join(known)}{did_you_mean(key, known)}"
            )
    if "interpolation" in given:
        given["interpolation"] = T.InterpolationMode(given["interpolation"])
    try:
        step = STEPS[name](**given)
        if name == "normalize":
            _check_statistics(step)
        if probability is not None:
            check_range("apply_prob", probability, low=0.0, high=1.0)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} does not accept {dict(options or {})}: {error}") from None
    return step if probability is None else T.RandomApply([step], p=probability)


def _check_statistics(step: T.Normalize) -> None:
    for key, low in {"mean": 0.0, "std": 1e-6}.items():
        values = getattr(step, key)
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise ValueError(f"{key} must be three numbers, got {values!r}")
        for value in values:
            check_range(key, value, low=low)


def named_steps(steps: Iterable[Any]) -> list[tuple[str, Mapping[str, Any] | None]]:
    """Return names and options of a list of steps, each ``name`` or ``{name: options}``.

    Raises:
        ValueError: an entry is neither.

    >>> named_steps(["to_tensor", {"random_gray": {"p": 0.2}}])
    [('to_tensor', None), ('random_gray', {'p': 0.2})]
    """
    found: list[tuple[str, Mapping[str, Any] | None]] = []
    for step in steps:
        if isinstance(step, str):
            found.append((step, None))
        elif isinstance(step, Mapping) and len(step) == 1:
            found.append(next(iter(step.items())))
        else:
            raise ValueError(f"a step must be a name, or a mapping of one name to its options, got {step!r}")
    return found


def build_steps(steps: Iterable[Any]) -> T.Compose:
    """Build the transform of a list of steps, in its order.

    Args:
        steps: each ``name`` or ``{name: options}``.

    Returns:
        The transform of a PIL image.

    Raises:
        ValueError: a step is wrong, or a step of tensors comes before ``to_tensor``.

    >>> [type(step).__name__ for step in build_steps(["random_flip", "to_tensor"]).transforms]
    ['RandomHorizontalFlip', 'ToTensor']
    """
    named = named_steps(steps)
    names = [name for name, _ in named]
    tensors = names.index("to_tensor") if "to_tensor" in names else len(names)
    for name in names[:tensors]:
        if name in _OF_TENSORS:
            raise ValueError(f"{name} needs a tensor: put to_tensor before it")
    for name in names[tensors + 1 :]:
        if name in ("to_tensor", "gaussian_blur", "rand_aug", "random_translate"):
            raise ValueError(f"{name} needs an image: put it before to_tensor")
    return T.Compose([build_step(name, options) for name, options in named])
