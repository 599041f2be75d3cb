"""Backbones for ``torch.hub.load(REPOSITORY, NAME)``.

``<method>_<arch>``, such as ``ssl_ey_resnet50``, takes ``weights=FILE``, a checkpoint or an export of yours.
``dissl_resnet50_...`` are the published DISSL weights (arXiv:2209.06235) in torchvision's ResNet-50.
"""

from collections.abc import Callable
from typing import Any

dependencies = ["torch", "torchvision", "jaxtyping"]


def preprocessor() -> Any:
    """What an image goes through before any of these models: 256, the central 224, ImageNet's mean and deviation."""
    from plugins.tools import weights

    return weights.preprocessor()


def _constructor(width: int, epochs: int, crops: int) -> Callable[..., Any]:
    name = f"dissl_resnet50_d{None if width == 2048 else width}_e{epochs}_m{crops}"

    def make(pretrained: bool = True, **options: Any) -> Any:
        from plugins.tools.weights import dissl_resnet50

        return dissl_resnet50(name, pretrained=pretrained, **options)

    make.__name__ = name
    make.__doc__ = f"ResNet-50 that returns {width} dimensions, trained by DISSL for {epochs} epochs of {crops} crops."
    return make


dissl_resnet50_dNone_e100_m2 = _constructor(2048, 100, 2)
dissl_resnet50_d8192_e100_m2 = _constructor(8192, 100, 2)
dissl_resnet50_d8192_e100_m6 = _constructor(8192, 100, 6)
dissl_resnet50_dNone_e400_m2 = _constructor(2048, 400, 2)
dissl_resnet50_dNone_e400_m6 = _constructor(2048, 400, 6)
dissl_resnet50_d8192_e400_m6 = _constructor(8192, 400, 6)
dissl_resnet50_d8192_e800_m8 = _constructor(8192, 800, 8)


def _of_files() -> dict[str, Callable[..., Any]]:
    from plugins.tools.hub import constructors

    return constructors()


globals().update(_of_files())
