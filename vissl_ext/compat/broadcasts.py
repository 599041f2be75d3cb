"""Faster broadcast of checkpoints, and broadcast of initial states.

classy_vision/generic/distributed_util.py:266 converts the bytes of a checkpoint to a tensor one Python integer at a
time, even in a run with one process: 15 seconds of a core for 180 MB.
"""

import io
import tempfile
from typing import Any

import torch
from torch import nn


def broadcast_object(obj: Any, src: int = 0, use_disk: bool = True) -> Any:
    """Broadcast an object from one process to all.

    Args:
        obj: an object that ``torch.save`` can write; only used in the process ``src``.
        src: rank of the sender.
        use_disk: whether the receivers buffer the bytes in a temporary file instead of in memory.

    Returns:
        The object of the process ``src``.
    """
    from classy_vision.generic.distributed_util import broadcast, get_rank, get_world_size

    if get_world_size() == 1:
        return obj
    if get_rank() == src:
        written = io.BytesIO()
        torch.save(obj, written)
        data = torch.frombuffer(written.getbuffer(), dtype=torch.uint8)
        broadcast(torch.tensor([len(data)]), src=src)
        broadcast(data, src=src)
        return obj
    data = torch.empty(int(broadcast(torch.tensor([0]), src=src)), dtype=torch.uint8)
    data = broadcast(data, src=src)
    with tempfile.TemporaryFile() if use_disk else io.BytesIO() as file:
        file.write(data.cpu().numpy())
        del data
        file.seek(0)
        return torch.load(file)


def broadcast_from_rank_zero(module: nn.Module) -> None:
    """Broadcast the parameters and buffers of a module from the process of rank 0.

    VISSL seeds each process differently (vissl/utils/misc.py:171), and DistributedDataParallel broadcasts only the
    model, later. Without this broadcast, a copy of the model that is made before, and random buffers of a loss, would
    differ between processes for the whole training. A module with FullyShardedDataParallel parts is left unchanged.

    Args:
        module: a module that all processes have built with the same structure. Changed in place.
    """
    from classy_vision.generic.distributed_util import get_world_size
    from fairscale.nn import FullyShardedDataParallel

    if get_world_size() == 1 or any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        return
    ours = [*module.parameters(), *module.buffers()]
    with torch.no_grad():
        rank_zero = broadcast_object([tensor.detach().cpu() for tensor in ours], use_disk=False)
        for tensor, first in zip(ours, rank_zero, strict=True):
            tensor.copy_(first)


def activate() -> None:
    """Replace ``broadcast_object`` in the module with which Classy Vision reads checkpoints."""
    from classy_vision.generic import util

    util.broadcast_object = broadcast_object
