"""Momentum encoders of VISSL's own losses, resumed as they were.

vissl/hooks/moco_hooks.py:152, vissl/hooks/dino_hooks.py:128 and vissl/hooks/swav_momentum_hooks.py:127 build the
encoder in the first forward pass of a process. In a resumed run that pass then skips the encoder's momentum step, and
the random numbers spent on the building are missing from the augmentations.
"""

from typing import Any

from classy_vision.generic.distributed_util import is_distributed_training_run

from vissl_ext.silent_hook import SilentHook

_BUILDERS = {
    "moco_encoder": "_build_moco_encoder",
    "momentum_teacher": "_build_momentum_network",
    "momentum_encoder": "_build_momentum_network",
}
"""The attribute of a loss that holds its encoder, and the method of a hook that makes it."""


class RestoreTeacher(SilentHook):
    """Builds the encoder of a resumed run before its first step.

    Args:
        hooks: VISSL's default ones.
    """

    def __init__(self, hooks: list[Any]) -> None:
        super().__init__()
        self.hooks = hooks

    def on_start(self, task: Any) -> None:
        """Build it, if the loss keeps a checkpoint for it."""
        loss = task.loss
        for attribute, builder in _BUILDERS.items():
            if getattr(loss, attribute, ...) is None and getattr(loss, "checkpoint", None) is not None:
                hook = next(hook for hook in self.hooks if hasattr(hook, builder))
                getattr(hook, builder)(task)
                hook.is_distributed = is_distributed_training_run()  # set in the first forward pass otherwise
