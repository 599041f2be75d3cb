"""Model classes of all methods: ``from lightly_ext.models import IsoLoss``, ``model = IsoLoss(backbone)``."""

from lightly_ext.models import method
from lightly_ext.models.method import MethodModel
from lightly_ext.names import CLASS_NAMES

__all__ = ["MethodModel", *sorted(CLASS_NAMES)]

for _name, _spec in CLASS_NAMES.items():
    globals()[_name] = method.model_class(_name, _spec, __name__)
