"""``import lightly_ext.auto`` puts our names into lightly's modules, and does nothing else."""

from lightly_ext.registry import register

register()
