"""Messages with the command that installs a missing package. All such commands are defined here.

This module imports only the standard library, because the packages ``*_ext`` use it before any other import.
"""

import sys
from importlib.util import find_spec

_COMMANDS = {
    "solo": ("solo-learn", 'pip install "ssl-plugins[solo]", then: pip install --no-deps solo-learn==1.0.2'),
    "vissl": ("VISSL", 'pip install "ssl-plugins[vissl]", then: pip install --no-deps vissl==0.1.6'),
    "lightly": ("lightly", 'pip install "ssl-plugins[lightly]"'),
    "submitit": ("submitit", 'pip install "ssl-plugins[cluster]"'),
    "nvidia.dali": ("NVIDIA DALI", 'pip install "ssl-plugins[dali]"'),
}
_DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "umap": "umap-learn",
    "hydra": "hydra-core",
}

REQUIRED = {
    "solo_ext": (
        *("filelock", "hydra", "lightning", "numpy", "omegaconf", "PIL", "pydantic", "pytorch_lightning"),
        *("timm", "torchvision", "tqdm", "yaml"),
    ),
    "lightly_ext": ("PIL", "lightly", "pydantic", "pytorch_lightning", "torchvision"),
    "vissl_ext": (
        *("PIL", "fvcore", "hydra", "iopath", "numpy", "omegaconf"),
        *("timm", "torchvision", "tqdm", "vissl", "yaml"),
    ),
}
"""Modules that each adapter imports at module level and that its extra installs.

``solo`` is not listed, because it may be in the checkout that SOLO_LEARN_CHECKOUT names.
"""


def not_installed(module: str) -> str:
    """Return the message for a missing package, with the command that installs it.

    Args:
        module: import name of the package, such as ``solo``, ``nvidia.dali`` or ``sklearn``.

    Returns:
        One sentence.

    Example:
        >>> not_installed("lightly.loss")
        'lightly is not installed; install it with: pip install "ssl-plugins[lightly]"'
        >>> not_installed("sklearn")
        'scikit-learn is not installed; install it with: pip install scikit-learn'
    """
    top = module.partition(".")[0]
    distribution = _DISTRIBUTIONS.get(top, top)
    name, command = _COMMANDS.get(
        "nvidia.dali" if top == "nvidia" else top, (distribution, f"pip install {distribution}")
    )
    return f"{name} is not installed; install it with: {command}"


def missing(package: str) -> str | None:
    """Check that the requirements of an adapter are installed, without importing them.

    Args:
        package: ``solo_ext``, ``lightly_ext`` or ``vissl_ext``.

    Returns:
        One sentence with the first missing package and the commands that install it, or None if all are installed.
    """
    framework = package.removesuffix("_ext")
    absent = next((name for name in REQUIRED[package] if name not in sys.modules and find_spec(name) is None), None)
    if absent is None:
        return None
    if absent == framework:
        return not_installed(framework)
    distribution = _DISTRIBUTIONS.get(absent, absent)
    return f"{package} needs {distribution}, which is not installed; install it with: {_COMMANDS[framework][1]}"
