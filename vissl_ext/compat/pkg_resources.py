"""``pkg_resources``, which setuptools has removed.

Imported by vissl/utils/misc.py:16 and vissl/utils/collect_env.py:12.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from importlib.util import find_spec
from types import ModuleType


def activate() -> None:
    """Add a module with the two functions that VISSL calls, if ``pkg_resources`` is not installed."""
    if "pkg_resources" in sys.modules or find_spec("pkg_resources") is not None:
        return
    stand_in = ModuleType("pkg_resources", "Replacement of setuptools' pkg_resources for VISSL.")
    stand_in.get_distribution = distribution
    stand_in.DistributionNotFound = PackageNotFoundError
    stand_in.resource_filename = _resource_filename
    sys.modules["pkg_resources"] = stand_in


def _resource_filename(package: str, name: str) -> str:
    """Return the path of a file in a package, whether or not it exists."""
    return str(files(package).joinpath(name))
