"""METHODS, in a module of its own, since it imports lightly and Lightning, which the command line does not need."""

from typing import Any

from lightly_ext import lightning, transforms
from lightly_ext.names import CLASS_NAMES

METHODS: dict[str, dict[str, Any]] = {
    spec.name: {"model": lightning.__getattr__(name), "transform": vars(transforms)[f"{name}Transform"]()}
    for name, spec in CLASS_NAMES.items()
}
