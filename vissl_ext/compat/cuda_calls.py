"""``.cuda()`` in code that runs on the CPU too.

vissl/losses/nce_loss.py:446, vissl/losses/deepclusterv2_loss.py:118 and vissl/models/trunks/convit.py:289 move tensors
to the GPU whatever MACHINE.DEVICE says; vissl/models/trunks/xcit.py:70 has a SyncBatchNorm, which needs a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def stay_on_cpu() -> Iterator[None]:
    """For a training on the CPU: ``cuda()`` and ``to("cuda")`` do nothing, SyncBatchNorm takes its own rows."""
    cuda, to, sync = torch.Tensor.cuda, torch.Tensor.to, torch.nn.SyncBatchNorm.forward

    def same(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    def stay(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if args == ("cuda",) and not kwargs else to(self, *args, **kwargs)

    torch.Tensor.cuda, torch.Tensor.to = same, stay
    torch.nn.SyncBatchNorm.forward = torch.nn.BatchNorm2d.forward
    try:
        yield
    finally:
        torch.Tensor.cuda, torch.Tensor.to, torch.nn.SyncBatchNorm.forward = cuda, to, sync
