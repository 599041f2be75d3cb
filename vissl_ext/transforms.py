"""Patch masking, stacks of patches, a flip of all views, and transforms whose probability increases.

The task sets the epoch before it starts the workers of the data loader, which get a copy of the transforms.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from classy_vision.dataset.transforms import TRANSFORM_REGISTRY, register_transform
from classy_vision.dataset.transforms.classy_transform import ClassyTransform
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from vissl.data.ssl_transforms import ssl_transforms_wrapper
from vissl.data.ssl_transforms.img_pil_multicrop_random_apply import ImgPilMultiCropRandomApply

from plugins.tools.geometry import SharedFlip, Translate
from plugins.tools.stacks import Grid, Jigsaw, Rotation


def add_alpha(image: Tensor) -> Tensor:
    """Append a channel of ones: ``[C, H, W] → [C + 1, H, W]``."""
    return torch.cat([image, torch.ones_like(image[:1])])


class WarmupMixin:
    """Probabilities that increase linearly from 0 in epoch 0 to their values in epoch ``warmup_epochs``.

    If ``warmup_epochs`` is None or 0, they have their values from the start.
    """

    warmup_epochs: int | None = None
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch that begins, from 0."""
        self.epoch = epoch

    @property
    def warmup_factor(self) -> float:
        """The factor of the probabilities, in [0, 1]."""
        return min(1.0, self.epoch / self.warmup_epochs) if self.warmup_epochs else 1.0


@register_transform("ImgTensorMask")
class ImgTensorMask(WarmupMixin, ClassyTransform):
    """Append an alpha channel of ones to each view, then set randomly selected patches to 0 in all channels.

    Args:
        prob_mask: for each view the probability that a patch is masked, in [0, 1].
        patch_size: height and width of a patch in pixels; divides height and width of the masked views.
        warmup_epochs: see ``WarmupMixin``.
    """

    def __init__(self, prob_mask: list[float], patch_size: int = 16, warmup_epochs: int | None = None) -> None:
        self.prob_mask, self.patch_size, self.warmup_epochs = list(prob_mask), patch_size, warmup_epochs

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ImgTensorMask":
        """Create the transform from an entry of TRANSFORMS."""
        return cls(config["prob_mask"], config.get("patch_size", 16), config.get("warmup_epochs"))

    def __call__(self, images: list[Tensor]) -> list[Tensor]:
        """Mask the views: ``[3, H, W] → [4, H, W]``.

        Raises:
            ValueError: the number of views differs from that of the probabilities, or the patch size does not divide
                the height and width of a masked view.
        """
        if len(images) != len(self.prob_mask):
            raise ValueError(
                f"ImgTensorMask needs one probability in prob_mask per view, got {len(self.prob_mask)} for "
                f"{len(images)} views"
            )
        return [
            self._masked(add_alpha(image), probability * self.warmup_factor)
            for image, probability in zip(images, self.prob_mask, strict=True)
        ]

    def _masked(self, image: Tensor, probability: float) -> Tensor:
        if probability <= 0:
            return image
        size = self.patch_size
        if image.shape[1] % size or image.shape[2] % size:
            raise ValueError(
                f"ImgTensorMask: patch_size={size} does not divide the height and width of an image of "
                f"{image.shape[1]} x {image.shape[2]} pixels"
            )
        keep = torch.rand(image.shape[1] // size, image.shape[2] // size) > probability
        return image * keep.repeat_interleave(size, 0).repeat_interleave(size, 1)


@register_transform("ImgTensor2RGBA")
class ImgTensor2RGBA(ClassyTransform):
    """Append an alpha channel of ones to an image, as ``ImgTensorMask`` does to an image without masked patches."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ImgTensor2RGBA":
        """Create the transform from an entry of TRANSFORMS."""
        return cls()

    def __call__(self, image: Tensor) -> Tensor:
        """Append the channel: ``[3, H, W] → [4, H, W]``."""
        return add_alpha(image)


class WarmupRandomApply(WarmupMixin, ImgPilMultiCropRandomApply):
    """VISSL's ImgPilMultiCropRandomApply with ``warmup_epochs``.

    Args:
        transforms: the transforms, all of which or none of which are applied to a view.
        prob: for each view the probability that they are applied, in [0, 1].
        warmup_epochs: see ``WarmupMixin``.
    """

    def __init__(self, transforms: list[Any], prob: list[float], warmup_epochs: int | None = None) -> None:
        super().__init__(transforms, prob)
        self.warmup_epochs = warmup_epochs
        self.set_epoch(0)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WarmupRandomApply":
        """Create the transform from an entry of TRANSFORMS."""
        return cls(config.get("transforms", []), config.get("prob", []), config.get("warmup_epochs"))

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch that begins, from 0."""
        super().set_epoch(epoch)
        for transform, probability in zip(self.transforms, self.prob, strict=True):
            transform.p = probability * self.warmup_factor


@register_transform("ImgPilToImageAndPatches")
class ImgPilToImageAndPatches(ClassyTransform):
    """Make a view and its patches of an image: PIL image → ``[image, patch, ...]``, PIL images.

    The following transforms of the list are applied to the view and to each patch independently. The last transform of
    the list is :class:`StackPatches`. The patches are those of a separate random resized crop.

    Args:
        image_size: side of the view in pixels.
        image_scale: smallest and largest share of the image's area that the view takes.
        jigsaw: arguments of :class:`plugins.tools.stacks.Jigsaw`.
        rotation: arguments of :class:`plugins.tools.stacks.Rotation`, in place of ``jigsaw``.
        interpolation: of both crops, PIL's number; 2 is bilinear, 3 bicubic.

    Raises:
        ValueError: neither or both of ``jigsaw`` and ``rotation`` are given, or an argument is out of range.
    """

    def __init__(
        self,
        image_size: int = 224,
        image_scale: Sequence[float] = (0.08, 1.0),
        jigsaw: Mapping[str, Any] | None = None,
        rotation: Mapping[str, Any] | None = None,
        interpolation: int = 2,
    ) -> None:
        if (jigsaw is None) == (rotation is None):
            raise ValueError(f"give one of jigsaw and rotation, got jigsaw={jigsaw}, rotation={rotation}")
        mode: Any = interpolation  # torchvision takes the number
        self.crop = RandomResizedCrop(image_size, scale=tuple(image_scale), interpolation=mode)
        pieces = Rotation if jigsaw is None else Jigsaw
        self.pieces = pieces(**{**(rotation or jigsaw or {}), "interpolation": mode})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ImgPilToImageAndPatches":
        """Create the transform from an entry of TRANSFORMS."""
        return cls(**{key: config[key] for key in inspect.signature(cls).parameters if key in config})

    def __call__(self, image: Any) -> list[Any]:
        """Return the view and the patches."""
        return [self.crop(image), *self.pieces(image)]


@register_transform("ImgPilToPatches")
class ImgPilToPatches(Grid, ClassyTransform):
    """Cut a random crop of an image into a grid of patches: PIL image → ``[patch, ...]``, PIL images, row by row.

    The options are the arguments of :class:`plugins.tools.stacks.Grid`; ``interpolation`` is PIL's number: 2 is
    bilinear, 3 bicubic. The following transforms of the list are applied to each patch by itself. ``StackPatches`` with
    ``views: 0`` ends the list.
    """

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ImgPilToPatches":
        """Create the transform from an entry of TRANSFORMS."""
        return cls(**{key: config[key] for key in inspect.signature(cls).parameters if key in config})


@register_transform("StackPatches")
class StackPatches(ClassyTransform):
    """Stack the patches of an image: tensors ``[image, patch, ...] → [image, stack]``.

    Args:
        views: number of images that precede the patches; 0 after ``ImgPilToPatches``.
    """

    def __init__(self, views: int = 1) -> None:
        self.views = views

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "StackPatches":
        """Create the transform from an entry of TRANSFORMS."""
        return cls(config.get("views", 1))

    def __call__(self, images: list[Tensor]) -> list[Tensor]:
        """Stack: ``V`` images and P patches ``[3, h, w]`` → ``V`` images and ``[P, 3, h, w]``."""
        return [*images[: self.views], torch.stack(images[self.views :])]


@register_transform("ImgSharedFlip")
class ImgSharedFlip(SharedFlip, ClassyTransform):
    """Flip all views of an image or none, see :class:`plugins.tools.geometry.SharedFlip`. It takes all views at once.

    Args:
        p: probability of the flip.
    """

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ImgSharedFlip":
        """Create the transform from an entry of TRANSFORMS."""
        return cls(config.get("p", 0.5))


@register_transform("ImgPilTranslate")
class ImgPilTranslate(Translate, ClassyTransform):
    """Translate each view by itself, see :class:`plugins.tools.geometry.Translate`.

    Args:
        pixels: largest translation in pixels.
        p: probability of the translation.
    """

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ImgPilTranslate":
        """Create the transform from an entry of TRANSFORMS."""
        return cls(config.get("pixels", 4), config.get("p", 0.8))


def set_epoch(transform: Any, epoch: int) -> None:
    """Set the epoch in each transform of a composition that has a warm-up.

    Args:
        transform: VISSL's composition of transforms, or None.
        epoch: number of the training epoch, from 0.
    """
    for part in getattr(transform, "transforms", ()):
        inner = getattr(part, "transform", part)
        if isinstance(inner, WarmupMixin):
            inner.set_epoch(epoch)


def replace_transforms() -> None:
    """Register WarmupRandomApply in place of VISSL's transform, and list the transforms that make or take all views."""
    TRANSFORM_REGISTRY["ImgPilMultiCropRandomApply"] = WarmupRandomApply
    kinds = {"TRANSFORMS_WITH_GROUPING": ("ImgTensorMask", "StackPatches", "ImgSharedFlip")}
    kinds["TRANSFORMS_WITH_COPIES"] = ("ImgPilToImageAndPatches", "ImgPilToPatches")
    for kind, names in kinds.items():
        known = ssl_transforms_wrapper.DEFAULT_TRANSFORM_TYPES[kind]
        known += [name for name in names if name not in known]
