"""The augmentations of PIRL."""

from lightly.transforms import GaussianBlur, RandomSolarization
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from torchvision import transforms as T

from plugins.tools.stacks import Jigsaw, Photometric, Rotation, Stack


class PIRLTransform(MultiViewTransform):
    """Implements the transformations for PIRL [0, 1].

    A random resized crop, and a stack of the shuffled patches of another crop. Colour jitter, the photometric steps of
    the published code, grey scale, flip and normalization apply to the crop and to each patch by itself.
    `lightly.transforms.PIRLTransform` joins the patches to one image instead, which `lightly_ext.models.PIRL` does not
    take.

    Input to this transform:
        PIL Image.

    Output of this transform:
        List of Tensor of length 2 (a view [3, H, W], and a stack of patches [P, 3, h, w]).

    - [0]: Self-Supervised Learning of Pretext-Invariant Representations, 2020, https://arxiv.org/abs/1912.01991
    - [1]: VISSL, `configs/config/pretrain/pirl`

    Attributes:
        input_size:
            Size of the view in pixels.
        jigsaw_size:
            Size of the crop that is cut into patches, in pixels, a multiple of grid. None is 255/224 of input_size.
        patch_size:
            Size of a patch in pixels. None is 64/85 of a cell of the grid.
        grid:
            Patches per side: a stack has grid² patches, as many as the option `patches` of the model.
        jigsaw_min_scale:
            Minimum size of the crop that is cut, relative to the image.
        rotation:
            Whether the stack is a single view, turned by 0, 90, 180 or 270 degrees; `patches` of the model is 1.
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
            Probability that horizontal flip is applied.
        normalize:
            Dictionary with 'mean' and 'std' for torchvision.transforms.Normalize; None leaves that step out.

    Examples:
        >>> from PIL import Image
        >>> from lightly_ext.transforms import PIRLTransform
        >>> [view.shape for view in PIRLTransform()(Image.new("RGB", (300, 300)))]
        [torch.Size([3, 224, 224]), torch.Size([9, 3, 64, 64])]
    """

    def __init__(
        self,
        input_size: int = 224,
        jigsaw_size: int | None = None,
        patch_size: int | None = None,
        grid: int = 3,
        jigsaw_min_scale: float = 0.6,
        rotation: bool = False,
        cj_prob: float = 1.0,
        cj_strength: float = 1.0,
        cj_bright: float = 0.4,
        cj_contrast: float = 0.4,
        cj_sat: float = 0.4,
        cj_hue: float = 0.2,
        min_scale: float = 0.08,
        photometric_prob: float = 0.66,
        random_gray_scale: float = 0.2,
        gaussian_blur: float = 0.0,
        solarization_prob: float = 0.0,
        sigmas: tuple[float, float] = (0.1, 2),
        hf_prob: float = 0.5,
        normalize: dict[str, list[float]] | None = IMAGENET_NORMALIZE,
    ) -> None:
        """Initializes the transform with the specified parameters."""
        strengths = [cj_strength * strength for strength in (cj_bright, cj_contrast, cj_sat, cj_hue)]
        each = T.Compose(
            [
                T.RandomApply([T.ColorJitter(*strengths)], p=cj_prob),
                Photometric(photometric_prob),
                T.RandomGrayscale(p=random_gray_scale),
                GaussianBlur(prob=gaussian_blur, sigmas=sigmas),
                RandomSolarization(prob=solarization_prob),
                T.RandomHorizontalFlip(p=hf_prob),
                T.ToTensor(),
                *([T.Normalize(**normalize)] if normalize else []),
            ]
        )
        if rotation:
            pieces = Rotation(input_size, scale=(min_scale, 1.0))
        else:
            side = round(input_size * 255 / 224 / grid) * grid if jigsaw_size is None else jigsaw_size
            window = round(side / grid * 64 / 85) if patch_size is None else patch_size
            pieces = Jigsaw(side, window, grid, scale=(jigsaw_min_scale, 1.0))
        view = T.Compose([T.RandomResizedCrop(input_size, scale=(min_scale, 1.0)), each])
        super().__init__([view, Stack(pieces, each)])
