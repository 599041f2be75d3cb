"""The augmentations of SSL-EY."""

from typing import Any

from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.transforms.vicreg_transform import VICRegTransform, VICRegViewTransform
from torchvision.transforms import InterpolationMode

from lightly_ext.transforms.two_view_transform import pair
from plugins.checks import check_choice


class SSLEYTransform(VICRegTransform):
    """Implements the transformations for SSL-EY.

    Those of lightly's VICReg, with the same arguments: random resized crop, horizontal flip, colour jitter, grey scale,
    solarization, blur and normalization. By default they are alike for both views. VICReg's and SSL-EY's own scripts
    have `gaussian_blur=(1.0, 0.1)`, `solarize_prob=(0.0, 0.2)` and `interpolation="bicubic"`; there, blur comes before
    solarization.

    Input to this transform:
        PIL Image or Tensor.

    Output of this transform:
        List of Tensor of length 2.

    Attributes:
        solarize_prob:
            Probability of solarization. A pair has one value per view.
        gaussian_blur:
            Probability of Gaussian blur. A pair has one value per view.
        interpolation:
            Filter of the resized crop, "bilinear" or "bicubic".

    Examples:
        >>> from PIL import Image
        >>> from lightly_ext.transforms import SSLEYTransform
        >>> transform = SSLEYTransform(input_size=32, gaussian_blur=(1.0, 0.1), interpolation="bicubic")
        >>> [view.shape for view in transform(Image.new("RGB", (40, 40)))]
        [torch.Size([3, 32, 32]), torch.Size([3, 32, 32])]
    """

    def __init__(
        self,
        input_size: int = 224,
        cj_prob: float = 0.8,
        cj_strength: float = 0.5,
        cj_bright: float = 0.8,
        cj_contrast: float = 0.8,
        cj_sat: float = 0.4,
        cj_hue: float = 0.2,
        min_scale: float = 0.08,
        random_gray_scale: float = 0.2,
        solarize_prob: float | tuple[float, float] = 0.1,
        gaussian_blur: float | tuple[float, float] = 0.5,
        sigmas: tuple[float, float] = (0.1, 2),
        vf_prob: float = 0.0,
        hf_prob: float = 0.5,
        rr_prob: float = 0.0,
        rr_degrees: float | tuple[float, float] | None = None,
        normalize: dict[str, list[float]] | None = IMAGENET_NORMALIZE,
        interpolation: str = "bilinear",
    ) -> None:
        """Initializes the transform with the specified parameters."""
        check_choice("interpolation", interpolation, ("bilinear", "bicubic"))
        both = {
            "input_size": input_size,
            "cj_prob": cj_prob,
            "cj_strength": cj_strength,
            "cj_bright": cj_bright,
            "cj_contrast": cj_contrast,
            "cj_sat": cj_sat,
            "cj_hue": cj_hue,
            "min_scale": min_scale,
            "random_gray_scale": random_gray_scale,
            "sigmas": sigmas,
            "vf_prob": vf_prob,
            "hf_prob": hf_prob,
            "rr_prob": rr_prob,
            "rr_degrees": rr_degrees,
            "normalize": normalize,
        }
        views = [
            VICRegViewTransform(**both, solarize_prob=solarize, gaussian_blur=blur)
            for solarize, blur in zip(pair(solarize_prob), pair(gaussian_blur), strict=True)
        ]
        for view in views:
            crop: Any = view.transform.transforms[0]
            crop.interpolation = InterpolationMode(interpolation)
        MultiViewTransform.__init__(self, views)
