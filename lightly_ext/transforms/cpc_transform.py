"""The augmentations of CPC."""

import warnings
from collections.abc import Sequence

from lightly.transforms import GaussianBlur, RandomSolarization
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from torchvision import transforms as T

from plugins.tools.stacks import SHARED_COLOURS, Grid, Photometric, Stack


class CPCTransform(MultiViewTransform):
    """Implements the transformations for CPC [0, 1].

    A random crop is cut into a grid of overlapping patches, row by row. Colour jitter, the photometric steps of PIRL,
    grey scale and normalization apply to each patch by itself: patches that share the colours of their image can be
    told from others by them. There is no view beside the stack.

    Input to this transform:
        PIL Image.

    Output of this transform:
        List of Tensor of length 1 (a stack of patches [P, 3, patch_size, patch_size]).

    - [0]: Representation Learning with Contrastive Predictive Coding, 2018, https://arxiv.org/abs/1807.03748
    - [1]: Data-Efficient Image Recognition with Contrastive Predictive Coding, 2019, https://arxiv.org/abs/1905.09272

    Attributes:
        input_size:
            Size of the images of the evaluation in pixels.
        grid_size:
            Size of the crop that is cut into patches, in pixels. None is input_size.
        patch_size:
            Size of a patch in pixels, the option `patch` of the model.
        patch_stride:
            Distance of neighbouring patches in pixels, the option `stride` of the model.
        window_size:
            Size of a random window in each patch, outside of which it is black. None keeps the patch.
        padding:
            Black pixels at each border of the image before the crop.
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
            Minimum size of the crop relative to the image, before it is resized. None takes grid_size pixels instead.
        photometric_prob:
            Probability of posterization, sharpness, solarization and autocontrast together.
        random_gray_scale:
            Probability of conversion to grayscale.
        gaussian_blur:
            Probability of Gaussian blur.
        solarization_prob:
            Probability of solarization.
        sigmas:
            Min and max of the standard deviation of the Gaussian blur.
        hf_prob:
            Probability that the crop is flipped horizontally, before it is cut.
        normalize:
            Dictionary with 'mean' and 'std' for torchvision.transforms.Normalize; None leaves that step out.

    Examples:
        >>> from PIL import Image
        >>> from lightly_ext.transforms import CPCTransform
        >>> [view.shape for view in CPCTransform()(Image.new("RGB", (300, 300)))]
        [torch.Size([49, 3, 64, 64])]
    """

    def __init__(
        self,
        input_size: int = 256,
        grid_size: int | None = None,
        patch_size: int = 64,
        patch_stride: int = 32,
        window_size: int | None = None,
        padding: int = 0,
        cj_prob: float = 0.8,
        cj_strength: float = 1.0,
        cj_bright: float = 0.4,
        cj_contrast: float = 0.4,
        cj_sat: float = 0.4,
        cj_hue: float = 0.2,
        min_scale: float | None = 0.3,
        photometric_prob: float = 0.0,
        random_gray_scale: float = 0.25,
        gaussian_blur: float = 0.0,
        solarization_prob: float = 0.0,
        sigmas: Sequence[float] = (0.1, 2),
        hf_prob: float = 0.5,
        normalize: dict[str, list[float]] | None = IMAGENET_NORMALIZE,
    ) -> None:
        """Initializes the transform with the specified parameters."""
        strengths = [cj_strength * strength for strength in (cj_bright, cj_contrast, cj_sat, cj_hue)]
        jitters = cj_prob and any(strengths)
        if not any((jitters, photometric_prob, random_gray_scale, solarization_prob)):
            warnings.warn(
                SHARED_COLOURS.replace("color_jitter or grayscale", "cj_prob or random_gray_scale"), stacklevel=2
            )
        each = T.Compose(
            [
                T.RandomApply([T.ColorJitter(*strengths)], p=cj_prob),
                Photometric(photometric_prob),
                T.RandomGrayscale(p=random_gray_scale),
                GaussianBlur(prob=gaussian_blur, sigmas=sigmas),
                RandomSolarization(prob=solarization_prob),
                T.ToTensor(),
                *([T.Normalize(**normalize)] if normalize else []),
            ]
        )
        grid = Grid(
            input_size if grid_size is None else grid_size,
            patch_size,
            patch_stride,
            window=window_size,
            scale=None if min_scale is None else (min_scale, 1.0),
            padding=padding,
            flip=hf_prob,
        )
        super().__init__([Stack(grid, each)])
