"""What VISSL 0.1.6 needs to run on today's stack, one small module each, named after what it mends.

The docstring of each module names the file and line that needs it; the tests show that it still does. Most modules have
``activate()``, which may be called again without harm; ``cuda_calls``, ``rank_states`` and ``restored_losses`` are used
in each training.
"""

from importlib.util import find_spec

from vissl_ext.compat import (
    broadcasts,
    checkpoints,
    folder_images,
    import_warnings,
    kinetics400,
    linear_warmup,
    local_copies,
    missing_weights,
    nan_output,
    numpy_names,
    pkg_resources,
    safe_files,
    saved_types,
)


def activate() -> None:
    """Mend everything; does nothing where VISSL is not installed."""
    if find_spec("vissl") is None:
        return
    mends = (
        *(import_warnings, pkg_resources, numpy_names, kinetics400, broadcasts, checkpoints, folder_images),
        *(linear_warmup, local_copies, missing_weights, nan_output, safe_files, saved_types),
    )
    for mend in mends:
        mend.activate()
