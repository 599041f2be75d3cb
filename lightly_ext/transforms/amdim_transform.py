"""The augmentations of AMDIM."""

from typing import Any

from lightly.transforms import GaussianBlur, RandomSolarization
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from plugins.tools.geometry import SharedFlip, Translate


class AMDIMTransform(MultiViewTransform):
    """Implements the transformations for AMDIM [0].

    Two views with random resized crops, colour jitter and grey scale of their own, and one flip of both. For images of
    32 pixels the published settings are no crop, `min_scale=None`, and `translate=4`.

    Input to this transform:
        PIL Image.

    Output of this transform:
        List of Tensor of length 2.

    - [0]: Learning Representations by Maximizing Mutual Information Across Views, 2019,
        https://arxiv.org/abs/1906.00910

    Attributes:
        input_size:
            Size of the views in pixels.
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
            How much to jitter hue; 0.2 in the published settings for images of 32 and 64 pixels.
        min_scale:
            Minimum size of the randomized crop relative to the image; None resizes the image, without a random crop.
        translate:
            Largest translation after the crop, in pixels; 0 leaves that step out.
        translate_prob:
            Probability of the translation.
        random_gray_scale:
            Probability of conversion to grayscale.
        gaussian_blur:
            Probability of Gaussian blur.
        solarization_prob:
            Probability of solarization.
        sigmas:
            Min and max of the standard deviation of the Gaussian blur.
        hf_prob:
            Probability that both views are flipped horizontally: both of them, or none.
        normalize:
            Dictionary with 'mean' and 'std' for torchvision.transforms.Normalize; None leaves that step out.

    Examples:
        >>> from lightly_ext.transforms import AMDIMTransform
        >>> transform = AMDIMTransform(input_size=32, min_scale=None, translate=4, cj_hue=0.2)
        >>> [view.shape for view in transform(Image.new("RGB", (40, 40)))]
        [torch.Size([3, 32, 32]), torch.Size([3, 32, 32])]
    """

    def __init__(
        self,
        input_size: int = 128,
        cj_prob: float = 0.8,
        cj_strength: float = 1.0,
        cj_bright: float = 0.4,
        cj_contrast: float = 0.4,
        cj_sat: float = 0.4,
        cj_hue: float = 0.1,
        min_scale: float | None = 0.3,
        translate: int = 0,
        translate_prob: float = 0.8,
        random_gray_scale: float = 0.25,
        gaussian_blur: float = 0.0,
        solarization_prob: float = 0.0,
        sigmas: tuple[float, float] = (0.1, 2),
        hf_prob: float = 0.5,
        normalize: dict[str, list[float]] | None = IMAGENET_NORMALIZE,
    ) -> None:
        """Initializes the transform with the specified parameters."""
        bicubic = T.InterpolationMode.BICUBIC
        strengths = [cj_strength * strength for strength in (cj_bright, cj_contrast, cj_sat, cj_hue)]
        crop: list[Any]
        if min_scale is None:
            crop = [T.Resize(input_size, interpolation=bicubic), T.CenterCrop(input_size)]
        else:
            shape = {"scale": (min_scale, 1.0), "ratio": (0.7, 1.4)}
            crop = [T.RandomResizedCrop(input_size, **shape, interpolation=bicubic)]
        steps = [
            *crop,
            *([Translate(translate, translate_prob)] if translate else []),
            T.RandomApply([T.ColorJitter(*strengths)], p=cj_prob),
            T.RandomGrayscale(p=random_gray_scale),
            GaussianBlur(prob=gaussian_blur, sigmas=sigmas),
            RandomSolarization(prob=solarization_prob),
            T.ToTensor(),
            *([T.Normalize(**normalize)] if normalize else []),
        ]
        super().__init__([T.Compose(steps)] * 2)
        self.shared_flip = SharedFlip(hf_prob)

    def __call__(self, image: Tensor | Image.Image) -> list[Any]:
        """Return the two views."""
        return self.shared_flip(super().__call__(image))
