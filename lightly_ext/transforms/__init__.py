"""Transforms in lightly's manner: ``from lightly_ext.transforms import SSLEYTransform``.

Each method has ``<Name>Transform`` with flat keyword arguments. BYOLTransform and SimSiamTransform are lightly's own,
SSLEYTransform and VICRegTransform are lightly's VICRegTransform with further arguments, PIRLTransform makes a view and
a stack of patches, CPCTransform one stack, AMDIMTransform flips both views or none. The others make two views as BYOL,
or the first of them for a method of one view. For CISSL, DISSL, LeJEPA, Matrix-SSL, MEC and Rectified LpJEPA
they have the values that were published on ImageNet. The DINOTransform of lightly itself makes eight views.
"""

import lightly.transforms as _lightly

from lightly_ext.names import CLASS_NAMES
from lightly_ext.transforms.amdim_transform import AMDIMTransform
from lightly_ext.transforms.cpc_transform import CPCTransform
from lightly_ext.transforms.pirl_transform import PIRLTransform
from lightly_ext.transforms.ssley_transform import SSLEYTransform
from lightly_ext.transforms.two_view_transform import TwoViewTransform

__all__ = ["AMDIMTransform", "CPCTransform", "PIRLTransform", "SSLEYTransform", "TwoViewTransform", "VICRegTransform"]


class VICRegTransform(SSLEYTransform):
    """The transformations of VICReg, which are those of SSLEYTransform.

    lightly's class of this name has no `interpolation`, and one probability of blur and solarization for both views.
    """


_DISSL = {
    **{"cj_bright": 0.8, "cj_contrast": 0.8, "cj_sat": 0.8, "cj_hue": 0.2},
    **{"gaussian_blur": 0.5, "solarization_prob": 0.0},
}
_PUBLISHED = {
    **{"CISSL": _DISSL, "DISSL": _DISSL, "MatrixSSL": {"min_scale": 0.2}, "MEC": {"min_scale": 0.2}},
    "LeJEPA": {"min_scale": 0.3, "gaussian_blur": 0.5, "solarization_prob": 0.2},
    "RectifiedLpJEPA": {"min_scale": 0.2, "gaussian_blur": 0.5, "solarization_prob": 0.1},
}

for _name, _spec in CLASS_NAMES.items():
    _transform = f"{_name}Transform"
    if _transform in globals():
        continue  # ours, also where lightly has one of the name
    if _transform in vars(_lightly) and _name != "DINO":
        globals()[_transform] = vars(_lightly)[_transform]
    else:
        _count = _spec.views or 2
        _views = "one view" if _count == 1 else "two views"
        _doc = f"Transforms an image into {_views} for {_spec.title}; the arguments are those of TwoViewTransform."
        _own = {"published": {**TwoViewTransform.published, **_PUBLISHED.get(_name, {})}, "count": _count}
        globals()[_transform] = type(_transform, (TwoViewTransform,), {"__doc__": _doc, "__module__": __name__, **_own})
    __all__.append(_transform)
__all__.sort()
