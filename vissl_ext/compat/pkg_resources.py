"""``pkg_resources``, which setuptools has dropped.

Imported by vissl/utils/misc.py:16 and vissl/utils/collect_env.py:12.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from importlib.util import find_spec
from types import ModuleType


def activate() -> None:
    """Put a stand-in with the two functions that VISSL calls where there is no ``pkg_resources``."""
    if "pkg_resources" in sys.modules or find_spec("pkg_resources") is not None:
        return
    stand_in = ModuleType("pkg_resources", "Stands in for setuptools' pkg_resources, for VISSL.")
    stand_in.get_distribution = distribution
    stand_in.DistributionNotFound = PackageNotFoundError
    stand_in.resource_filename = _resource_filename
    sys.modules["pkg_resources"] = stand_in


def _resource_filename(package: str, name: str) -> str:
    """The path of a file that a package carries, whether or not it is there."""
    return str(files(package).joinpath(name))
