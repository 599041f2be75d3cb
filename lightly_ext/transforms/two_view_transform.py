"""The augmentations of BYOL with flat arguments."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from torchvision.transforms import Compose

from plugins.tools.masks import DEFAULT_PROB, RemoveBackground


def pair(value: float | tuple[float, float]) -> tuple[float, float]:
    """Return the values of both views; a number is that of both."""
    return value if isinstance(value, tuple) else (value, value)


class TwoViewTransform(MultiViewTransform):
    """Transforms an image into two views, as BYOL [0]. DirectPred, DirectCopy and IsoLoss use the same views.

    An argument that is a pair has one value per view; a single value applies to both views. None selects the value in
    `published`: BYOL's in this class, and the method's published ImageNet settings in a method's own transform.

    Input to this transform:
        PIL Image or Tensor.

    Output of this transform:
        List of Tensor of length 2.

    - [0]: Bootstrap Your Own Latent, 2020, https://arxiv.org/abs/2006.07733

    Attributes:
        input_size:
            Size of the input image in pixels.
        cj_prob:
            Probability that color jitter is applied.
        cj_strength:
            Strength of the color jitter. `cj_bright`, `cj_contrast`, `cj_sat`, and `cj_hue` are multiplied by it.
        cj_bright:
            How much to jitter brightness.
        cj_contrast:
            How much to jitter contrast.
        cj_sat:
            How much to jitter saturation.
        cj_hue:
            How much to jitter hue.
        min_scale:
            Minimum size of the randomized crop relative to the input_size.
        random_gray_scale:
            Probability of conversion to grayscale.
        gaussian_blur:
            Probability of Gaussian blur.
        solarization_prob:
            Probability of solarization.
        sigmas:
            Min and max of the standard deviation of the Gaussian blur.
        vf_prob:
            Probability that vertical flip is applied.
        hf_prob:
            Probability that horizontal flip is applied.
        rr_prob:
            Probability that random rotation is applied.
        rr_degrees:
            Range of degrees of the random rotation; None rotates by 90 degrees.
        normalize:
            Dictionary with 'mean' and 'std' for torchvision.transforms.Normalize; None leaves that step out.
        masks:
            Folder of masks, as ReLICv2 uses; None leaves that step out. Each image in `images` needs a mask with the
            same relative path, in which the background is black. The data set must read PIL images with
            `plugins.tools.images.open_image`, or store the path with `plugins.tools.images.with_path(image, path)`.
        images:
            Folder of the images; required with masks.
        mask_prob:
            Probability that the background is replaced by one grey level, for each view.
        mask_fill:
            The grey level: "random", "gray" or "black".

    Examples:
        >>> from PIL import Image
        >>> from lightly_ext.transforms import IsoLossTransform
        >>> transform = IsoLossTransform(input_size=32, gaussian_blur=0.0, solarization_prob=(0.0, 0.2))
        >>> [view.shape for view in transform(Image.new("RGB", (40, 40)))]
        [torch.Size([3, 32, 32]), torch.Size([3, 32, 32])]
    """

    published: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "cj_bright": 0.4,
            "cj_contrast": 0.4,
            "cj_sat": 0.2,
            "cj_hue": 0.1,
            "min_scale": 0.08,
            "gaussian_blur": (1.0, 0.1),
            "solarization_prob": (0.0, 0.2),
        }
    )

    count: ClassVar[int] = 2
    """Number of views; a method of one view has the first."""

    def __init__(
        self,
        input_size: int = 224,
        cj_prob: float = 0.8,
        cj_strength: float = 1.0,
        cj_bright: float | None = None,
        cj_contrast: float | None = None,
        cj_sat: float | None = None,
        cj_hue: float | None = None,
        min_scale: float | None = None,
        random_gray_scale: float = 0.2,
        gaussian_blur: float | tuple[float, float] | None = None,
        solarization_prob: float | tuple[float, float] | None = None,
        sigmas: tuple[float, float] = (0.1, 2),
        vf_prob: float = 0.0,
        hf_prob: float = 0.5,
        rr_prob: float = 0.0,
        rr_degrees: float | tuple[float, float] | None = None,
        normalize: dict[str, list[float]] | None = IMAGENET_NORMALIZE,
        masks: str | Path | None = None,
        images: str | Path | None = None,
        mask_prob: float = DEFAULT_PROB,
        mask_fill: str = "random",
    ) -> None:
        """Initializes the transform with the specified parameters."""
        given = {
            "cj_bright": cj_bright,
            "cj_contrast": cj_contrast,
            "cj_sat": cj_sat,
            "cj_hue": cj_hue,
            "min_scale": min_scale,
            "gaussian_blur": gaussian_blur,
            "solarization_prob": solarization_prob,
        }
        both = {name: self.published[name] if value is None else value for name, value in given.items()}
        blurs, solarizations = (pair(both.pop(name)) for name in ("gaussian_blur", "solarization_prob"))
        both |= {
            "input_size": input_size,
            "cj_prob": cj_prob,
            "cj_strength": cj_strength,
            "random_gray_scale": random_gray_scale,
            "sigmas": sigmas,
            "vf_prob": vf_prob,
            "hf_prob": hf_prob,
            "rr_prob": rr_prob,
            "rr_degrees": rr_degrees,
            "normalize": normalize,
        }
        views = [
            view(gaussian_blur=blur, solarization_prob=solarization, **both)
            for view, blur, solarization in zip(
                (BYOLView1Transform, BYOLView2Transform), blurs, solarizations, strict=True
            )
        ]
        if masks is not None:
            if images is None:
                raise ValueError("masks needs images, the folder of the images that have these masks, got None")
            remove = RemoveBackground(masks, images, prob=mask_prob, fill=mask_fill)
            remove.check()
            views = [Compose([remove, view]) for view in views]
        super().__init__(views[: self.count])
