"""Error for a model whose output is inf or NaN.

vissl/hooks/state_update_hooks.py:153 calls a method that its class does not have. The hook before it has already saved
the model and its input.
"""

from typing import Any


def activate() -> None:
    """Add the missing method, which raises a FloatingPointError."""
    from vissl.hooks.state_update_hooks import CheckNanModelOutputHook

    if not hasattr(CheckNanModelOutputHook, "_checkpoint_model"):
        CheckNanModelOutputHook._checkpoint_model = _stop


def _stop(self: Any, task: Any, **kwargs: Any) -> None:
    raise FloatingPointError(
        f"the output of the model is inf or NaN in iteration {task.iteration + 1}; "
        "lower the learning rate, or add a warm-up"
    )
