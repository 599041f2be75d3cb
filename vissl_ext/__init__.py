"""The methods of ``plugins`` in VISSL 0.1.6, which is patched to run with current package versions.

Importing this package applies the patches without which VISSL cannot be imported, also in spawned processes that
unpickle a function of this package.
"""

import runpy
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vissl_ext.loading import Trunk

runpy.run_path(str(Path(__file__).parents[1] / "plugins" / "shadow.py"))["check"](__name__)

from vissl_ext.compat import activate  # noqa: E402

activate()


def load_model(source: str | Path, config: str | Path | None = None) -> "Trunk":
    """Load the trained trunk of a run, with a loss of this package or of VISSL.

    Args:
        source: the folder of a run, whose newest checkpoint is loaded, or a checkpoint of it.
        config: ``train_config.yaml`` of the run; None takes it from the folder of the checkpoint.

    Returns:
        A module in evaluation mode, on the CPU: images ``[B, 3, H, W]`` → features ``[B, F]``;
        ``model(images, ["res4", "res5"])`` gives the features of layers. ``model.trunk`` is VISSL's trunk, and
        ``model.config`` the configuration.

    Raises:
        UserError: a file is missing or invalid, the trunk is not registered, or a tensor is missing, unexpected or of
            another shape. No code in the files is executed.
    """
    from vissl_ext.loading import load

    return load(source, config)
