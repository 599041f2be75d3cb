"""The augmentations of SSL-EY."""

from lightly.transforms.vicreg_transform import VICRegTransform


class SSLEYTransform(VICRegTransform):
    """Implements the transformations for SSL-EY.

    Those of VICReg, with the same arguments: random resized crop, horizontal flip, colour jitter, grey scale,
    solarization, blur and normalization, alike for both views.

    Input to this transform:
        PIL Image or Tensor.

    Output of this transform:
        List of Tensor of length 2.

    Examples:
        >>> from PIL import Image
        >>> from lightly_ext.transforms import SSLEYTransform
        >>> transform = SSLEYTransform(input_size=32, gaussian_blur=0.0)
        >>> [view.shape for view in transform(Image.new("RGB", (40, 40)))]
        [torch.Size([3, 32, 32]), torch.Size([3, 32, 32])]
    """
