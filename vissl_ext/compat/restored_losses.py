"""Restore the state of VISSL's losses that is not in their state dict when a run is resumed.

vissl/hooks/moco_hooks.py:152, vissl/hooks/dino_hooks.py:128 and vissl/hooks/swav_momentum_hooks.py:127 build the
momentum encoder in the first forward pass of a process. In a resumed run that pass then skips the encoder's momentum
step, and the random numbers that building the encoder takes are missing from the augmentations.

vissl/losses/swav_loss.py:98 sets ``use_queue`` in the forward pass, after the hook that reads it
(vissl/hooks/swav_hooks.py:36): the first step of a resumed run would use outdated scores of the queue.
vissl/losses/nce_loss.py:173 averages the memory bank over the processes once per process's life, which rounds the
restored bank if there are more than two processes.
"""

from typing import Any

from classy_vision.generic.distributed_util import is_distributed_training_run

from vissl_ext.silent_hook import SilentHook

_BUILDERS = {
    "moco_encoder": "_build_moco_encoder",
    "momentum_teacher": "_build_momentum_network",
    "momentum_encoder": "_build_momentum_network",
}
"""Attribute of a loss that contains the momentum encoder → method of a hook that builds it."""


class RestoreLoss(SilentHook):
    """Build the momentum encoder of a resumed run, and set the flags of its loss, before the first step.

    Args:
        hooks: VISSL's default hooks.
    """

    def __init__(self, hooks: list[Any]) -> None:
        super().__init__()
        self.hooks = hooks

    def on_start(self, task: Any) -> None:
        """Restore the encoder and the flags if the run is resumed."""
        loss = task.loss
        if task.checkpoint:
            criterion = getattr(loss, "swav_criterion", None)
            if criterion is not None and criterion.local_queue_length > 0:
                criterion.use_queue = int(criterion.num_iteration) > loss.queue_start_iter
            if hasattr(loss, "init_sync_memory"):
                loss.init_sync_memory = True
        for attribute, builder in _BUILDERS.items():
            if getattr(loss, attribute, ...) is None and getattr(loss, "checkpoint", None) is not None:
                hook = next(hook for hook in self.hooks if hasattr(hook, builder))
                getattr(hook, builder)(task)
                hook.is_distributed = is_distributed_training_run()  # set in the first forward pass otherwise
