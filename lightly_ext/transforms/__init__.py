"""Transforms in lightly's manner: ``from lightly_ext.transforms import SSLEYTransform``.

For each method ``<Name>Transform`` with flat keyword arguments. Those that lightly has itself (BYOL's, SimSiam's) are
lightly's; a method without published augmentations of its own has BYOL's. Those of MEC and Matrix-SSL are BYOL's too,
but for the smallest crop.
"""

import lightly.transforms as _lightly

from lightly_ext.names import CLASS_NAMES
from lightly_ext.transforms.ssley_transform import SSLEYTransform
from lightly_ext.transforms.two_view_transform import TwoViewTransform

__all__ = ["SSLEYTransform", "TwoViewTransform"]

_MIN_SCALES = {"MatrixSSL": 0.2, "MEC": 0.2}

for _name, _spec in CLASS_NAMES.items():
    _transform = f"{_name}Transform"
    if _transform in vars(_lightly):
        globals()[_transform] = vars(_lightly)[_transform]
    elif _transform not in globals():
        _doc = f"Transforms an image into two views for {_spec.title}; the arguments are those of TwoViewTransform."
        _own = {"published_min_scale": _MIN_SCALES[_name]} if _name in _MIN_SCALES else {}
        globals()[_transform] = type(_transform, (TwoViewTransform,), {"__doc__": _doc, "__module__": __name__, **_own})
    if _transform not in __all__:
        __all__.append(_transform)
__all__.sort()
