"""What runs in each process of a training: our registrations, hooks, console.

Functions of the launcher itself could not be found by a spawned process, for which ``__main__`` is another module.
"""

from typing import Any

from vissl_ext.registry import register

register()


def hooks(cfg: Any) -> list[Any]:
    """VISSL's default hooks for a configuration and ours.

    Args:
        cfg: VISSL's configuration, below ``config``.
    """
    from vissl.hooks import default_hook_generator

    from vissl_ext.hooks import extra_hooks

    return [*default_hook_generator(cfg), *extra_hooks(cfg)]
