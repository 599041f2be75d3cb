"""Find the YAML files that come with this package."""

from pathlib import Path

_SITE = Path(__file__).parents[2]
_INSTALLED = {
    "probes": "plugins/configs/probes",
    "solo": "solo_ext/configs",
    "ssv": "solo_ext/ssv/configs",
    "vissl": "vissl_ext/configs",
}
"""Folder in configs → its place in an installed copy, as in pyproject.toml."""


def shipped_configs(name: str) -> Path:
    """Return the folder ``configs/<name>``.

    It is inside a package in an installed copy, and beside the packages in a checkout. No package is imported.

    Args:
        name: "probes", "solo", "ssv" or "vissl".

    >>> shipped_configs("solo").is_dir()
    True
    """
    installed = _SITE / _INSTALLED[name]
    return installed if installed.is_dir() else _SITE / "configs" / name
