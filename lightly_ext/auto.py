"""``import lightly_ext.auto`` puts our names into lightly's modules, and does nothing else.

lightly's own names stay, without a warning: ``BarlowTwinsLoss``, ``DINOLoss``, ``LeJEPALoss`` and ``VICRegLoss`` of
``lightly.loss``, ``DINOTransform``, ``PIRLTransform`` and ``VICRegTransform`` of ``lightly.transforms``, and in lightly
1.5 the classes of ``lightly.models``, such as ``BYOL``. Import ours from ``lightly_ext``.
"""

from lightly_ext.registry import register

register()
