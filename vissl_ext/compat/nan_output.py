"""The end of a training whose network gives inf or NaN.

vissl/hooks/state_update_hooks.py:153 calls a method that its class does not have. The hook before it has saved the
model and its input by then.
"""

from typing import Any


def activate() -> None:
    """Say what is wrong instead."""
    from vissl.hooks.state_update_hooks import CheckNanModelOutputHook

    if not hasattr(CheckNanModelOutputHook, "_checkpoint_model"):
        CheckNanModelOutputHook._checkpoint_model = _stop


def _stop(self: Any, task: Any, **kwargs: Any) -> None:
    raise FloatingPointError(f"the network's output is inf or NaN in iteration {task.iteration + 1}")
