"""State of the loss of each process in VISSL's checkpoints.

vissl/hooks/log_hooks.py:450 saves only the loss of rank 0, and vissl/trainer/train_task.py:758 loads it in every
process. The queues of SwAV and the memory banks of DeepCluster v2 differ between processes, so a resumed run would
continue with copies of those of rank 0.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from classy_vision.generic.distributed_util import get_rank, get_world_size, is_primary
from fairscale.nn import FullyShardedDataParallel
from vissl.utils.checkpoint import is_checkpoint_phase

from plugins.tools.command import UserError
from vissl_ext.silent_hook import SilentHook

KEY = "loss_of_ranks"
"""Entry of the checkpoint: for each process, the tensors of its loss that are not the same in all processes."""


class RankStates(SilentHook):
    """Collect, before a checkpoint is written, the tensors of the loss that differ between processes.

    The task writes ``task.loss_of_ranks`` into the checkpoint. The hook must precede VISSL's checkpoint hook. FSDP
    writes a checkpoint for each process anyway, so nothing is collected there.
    """

    def on_step(self, task: Any) -> None:
        """Collect if VISSL writes a checkpoint after this iteration."""
        every = task.config["CHECKPOINT"]["CHECKPOINT_ITER_FREQUENCY"]
        if every > 0:
            self._collect(task, task.iteration, every, "iteration")

    def on_phase_end(self, task: Any) -> None:
        """Collect if VISSL writes a checkpoint after this epoch."""
        self._collect(task, task.train_phase_idx, task.config["CHECKPOINT"]["CHECKPOINT_FREQUENCY"], "phase")

    @staticmethod
    def _collect(task: Any, number: int, every: int, mode: str) -> None:
        if get_world_size() == 1 or not task.train or isinstance(task.base_model, FullyShardedDataParallel):
            return
        if is_checkpoint_phase(number, every, task.train_phase_idx, task.num_train_phases, mode):
            task.loss_of_ranks = differing_tensors(task.base_loss.state_dict())


def differing_tensors(state: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]] | None:
    """Gather the tensors that differ between the processes on rank 0. All processes must call the function.

    Args:
        state: state dict of this process. The names are the same in all processes.

    Returns:
        On rank 0 one dictionary per process, on the CPU. None on the other ranks, or if all tensors are the same.
    """
    digests: list[Any] = [None] * get_world_size()
    torch.distributed.all_gather_object(digests, {name: _digest(value) for name, value in state.items()})
    differ = [name for name in state if any(digest[name] != digests[0][name] for digest in digests)]
    if not differ:
        return None
    gathered: list[Any] | None = [None] * get_world_size() if is_primary() else None
    torch.distributed.gather_object({name: state[name].cpu() for name in differ}, gathered)
    return gathered


def _digest(tensor: torch.Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=16).digest()


def restore_rank_state(checkpoint: Mapping[str, Any], loss: torch.nn.Module) -> None:
    """Insert the tensors of this process into a checkpoint that is about to be loaded.

    Args:
        checkpoint: VISSL's checkpoint; the states of the loss are changed in place.
        loss: the loss that will load it.

    Raises:
        UserError: the checkpoint was written by another number of processes, and the shapes differ.
    """
    content = checkpoint.get("classy_state_dict") or {}
    states = content.get(KEY)
    if states is not None and len(states) == get_world_size():
        for state in (checkpoint["loss"], content["loss"]):  # VISSL loads the first, then Classy Vision the second
            state.update(states[get_rank()])
    for name, ours in loss.state_dict().items():
        saved = checkpoint.get("loss", {}).get(name, ours)
        if saved.shape != ours.shape and ours.numel():  # an empty one takes the size of the saved one
            raise UserError(
                f"the loss has {name} of shape {tuple(saved.shape)} in the checkpoint and {tuple(ours.shape)} in this "
                "run; resume with the same config.DISTRIBUTED.NUM_NODES and NUM_PROC_PER_NODE, because each process "
                "stores a part of the images"
            )
