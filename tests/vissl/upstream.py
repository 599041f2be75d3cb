"""A pytest plugin for VISSL's own tests: ``-p upstream``.

It repairs what prevents their import, and with VISSL_EXT_ACTIVE in the environment activates and registers all
that we have.
"""

import importlib
import importlib.util
import os
import sys
from importlib.resources import files
from pathlib import Path

COMPAT = Path(__file__).parents[2] / "vissl_ext" / "compat"


def activate_alone(name: str) -> None:
    """One shim, without the package around it, which would activate all."""
    spec = importlib.util.spec_from_file_location(f"alone_{name}", COMPAT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.activate()


if os.environ.get("VISSL_EXT_ACTIVE"):
    sys.path.insert(0, str(COMPAT.parents[1]))
    import vissl_ext.ranks  # noqa: F401 - registers everything
else:
    for shim in ("pkg_resources", "kinetics400"):
        activate_alone(shim)

# these two the tests call, and nothing of VISSL's wheel
pkg_resources = importlib.import_module("pkg_resources")
pkg_resources.resource_isdir = lambda package, name: files(package).joinpath(name).is_dir()
pkg_resources.resource_listdir = lambda package, name: sorted(
    path.name for path in files(package).joinpath(name).iterdir()
)
