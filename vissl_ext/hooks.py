"""Hooks that our methods add to VISSL's own."""

from typing import Any


def extra_hooks(cfg: Any) -> list[Any]:
    """The hooks that the configuration's loss needs beside VISSL's default ones.

    Args:
        cfg: VISSL's configuration, below ``config``.
    """
    return []
