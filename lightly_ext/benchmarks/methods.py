"""METHODS, which needs lightly and Lightning; the schema of the command line does not."""

from typing import Any

from lightly_ext import lightning, transforms
from lightly_ext.names import CLASS_NAMES

METHODS: dict[str, dict[str, Any]] = {
    spec.name: {"model": lightning.__getattr__(name), "transform": vars(transforms)[f"{name}Transform"]()}
    for name, spec in CLASS_NAMES.items()
}
