"""Patches with which VISSL 0.1.6 runs with current package versions, one module per problem.

The docstring of each module names the file and line that needs the patch, and a test fails when the patch is no longer
needed. Most modules have ``activate()``, whose repeated calls have no effect. The launcher and the task use
``console``, ``cuda_calls``, ``rank_states`` and ``restored_losses`` in each run.
"""

from importlib.util import find_spec

from vissl_ext.compat import (
    broadcasts,
    checkpoints,
    folder_images,
    import_warnings,
    kinetics400,
    linear_warmup,
    loader_workers,
    local_copies,
    missing_weights,
    nan_output,
    numpy_names,
    pkg_resources,
    safe_files,
    saved_types,
    tensorboard_values,
)


def activate() -> None:
    """Apply all patches, if VISSL is installed."""
    if find_spec("vissl") is None:
        return
    patches = (
        *(import_warnings, pkg_resources, numpy_names, kinetics400, broadcasts, checkpoints, folder_images),
        *(linear_warmup, loader_workers, local_copies, missing_weights, nan_output, safe_files, saved_types),
        tensorboard_values,
    )
    for patch in patches:
        patch.activate()
