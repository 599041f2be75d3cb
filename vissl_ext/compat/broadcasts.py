"""Checkpoints and initial states on their way to the other processes.

classy_vision/generic/distributed_util.py:266 makes a tensor of a checkpoint's bytes one Python number at a time, also
where there is no other process: 15 seconds of a core for 180 MB.
"""

import io
import tempfile
from typing import Any

import torch
from torch import nn


def broadcast_object(obj: Any, src: int = 0, use_disk: bool = True) -> Any:
    """An object of one process, in all.

    Args:
        obj: what ``torch.save`` can write; read in the process ``src`` alone.
        src: its rank.
        use_disk: the others keep its bytes in a temporary file.
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


def as_in_the_first(module: nn.Module) -> None:
    """Give a module, in every process, the parameters and buffers that it has in the first one.

    VISSL seeds each process differently (vissl/utils/misc.py:171), and DistributedDataParallel evens out the model
    alone, later: a copy made of it before then, and random buffers of a loss, would differ for the whole training.
    A module that FSDP has cut into shards stays as it is.

    Args:
        module: built by all processes alike.
    """
    from classy_vision.generic.distributed_util import get_world_size
    from fairscale.nn import FullyShardedDataParallel

    if get_world_size() == 1 or any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        return
    ours = [*module.parameters(), *module.buffers()]
    with torch.no_grad():
        theirs = broadcast_object([tensor.detach().cpu() for tensor in ours], use_disk=False)
        for tensor, first in zip(ours, theirs, strict=True):
            tensor.copy_(first)


def activate() -> None:
    """Let Classy Vision's reader of checkpoints use this."""
    from classy_vision.generic import util

    util.broadcast_object = broadcast_object
