"""Masks of patches, and transforms whose probability grows over the first epochs.

The task tells them each epoch before it starts the processes that load the data; after that they would not hear of it.
"""

from typing import Any

import torch
from classy_vision.dataset.transforms import TRANSFORM_REGISTRY, register_transform
from classy_vision.dataset.transforms.classy_transform import ClassyTransform
from torch import Tensor
from vissl.data.ssl_transforms import ssl_transforms_wrapper
from vissl.data.ssl_transforms.img_pil_multicrop_random_apply import ImgPilMultiCropRandomApply


def opaque(image: Tensor) -> Tensor:
    """``[C, H, W] → [C + 1, H, W]``, with a last channel of ones."""
    return torch.cat([image, torch.ones_like(image[:1])])


class Warming:
    """Probabilities that reach their values linearly, from 0 in epoch 0, over ``warmup_epochs`` (None: at once)."""

    warmup_epochs: int | None = None
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch, from 0, is about to begin."""
        self.epoch = epoch

    @property
    def share(self) -> float:
        """What the probabilities are multiplied by."""
        return min(1.0, self.epoch / self.warmup_epochs) if self.warmup_epochs else 1.0


@register_transform("ImgTensorMask")
class ImgTensorMask(Warming, ClassyTransform):
    """Makes each view's image opaque, then all its channels 0 in patches that are drawn.

    Args:
        prob_mask: for each view the probability of a patch.
        patch_size: its height and width; divides those of the views that are masked.
        warmup_epochs: see ``Warming``.
    """

    def __init__(self, prob_mask: list[float], patch_size: int = 16, warmup_epochs: int | None = None) -> None:
        self.prob_mask, self.patch_size, self.warmup_epochs = list(prob_mask), patch_size, warmup_epochs

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ImgTensorMask":
        """The transform that an entry of TRANSFORMS describes."""
        return cls(config["prob_mask"], config.get("patch_size", 16), config.get("warmup_epochs"))

    def __call__(self, images: list[Tensor]) -> list[Tensor]:
        """Views ``[3, H, W]`` → ``[4, H, W]``.

        Raises:
            ValueError: there are not as many views as probabilities, or the patches do not fill one that is masked.
        """
        if len(images) != len(self.prob_mask):
            raise ValueError(f"ImgTensorMask has {len(self.prob_mask)} probabilities for {len(images)} views")
        return [
            self._masked(opaque(image), probability * self.share)
            for image, probability in zip(images, self.prob_mask, strict=True)
        ]

    def _masked(self, image: Tensor, probability: float) -> Tensor:
        if probability <= 0:
            return image
        size = self.patch_size
        if image.shape[1] % size or image.shape[2] % size:
            raise ValueError(f"patches of {size} pixels do not fill an image of {tuple(image.shape[1:])}")
        keep = torch.rand(image.shape[1] // size, image.shape[2] // size) > probability
        return image * keep.repeat_interleave(size, 0).repeat_interleave(size, 1)


@register_transform("ImgTensor2RGBA")
class ImgTensor2RGBA(ClassyTransform):
    """Gives an image the channel of ones that ``ImgTensorMask`` gives those without masked patches."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ImgTensor2RGBA":
        """The transform that an entry of TRANSFORMS describes."""
        return cls()

    def __call__(self, image: Tensor) -> Tensor:
        """``[3, H, W] → [4, H, W]``."""
        return opaque(image)


class WarmingRandomApply(Warming, ImgPilMultiCropRandomApply):
    """VISSL's ImgPilMultiCropRandomApply with ``warmup_epochs``.

    Args:
        transforms: applied to a view together.
        prob: for each view the probability of that.
        warmup_epochs: see ``Warming``.
    """

    def __init__(self, transforms: list[Any], prob: list[float], warmup_epochs: int | None = None) -> None:
        super().__init__(transforms, prob)
        self.warmup_epochs = warmup_epochs
        self.set_epoch(0)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WarmingRandomApply":
        """The transform that an entry of TRANSFORMS describes."""
        return cls(config.get("transforms", []), config.get("prob", []), config.get("warmup_epochs"))

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch, from 0, is about to begin."""
        super().set_epoch(epoch)
        for transform, probability in zip(self.transforms, self.prob, strict=True):
            transform.p = probability * self.share


def tell_epoch(transform: Any, epoch: int) -> None:
    """Tell each transform of a composition that asks for it which epoch begins.

    Args:
        transform: VISSL's composition, or None.
        epoch: of training, from 0.
    """
    for part in getattr(transform, "transforms", ()):
        inner = getattr(part, "transform", part)
        if isinstance(inner, Warming):
            inner.set_epoch(epoch)


def replace_transforms() -> None:
    """Let VISSL build these, and hand ImgTensorMask all views together."""
    TRANSFORM_REGISTRY["ImgPilMultiCropRandomApply"] = WarmingRandomApply
    together = ssl_transforms_wrapper.DEFAULT_TRANSFORM_TYPES["TRANSFORMS_WITH_GROUPING"]
    if "ImgTensorMask" not in together:
        together.append("ImgTensorMask")
