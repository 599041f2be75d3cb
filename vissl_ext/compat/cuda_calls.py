"""Calls of ``.cuda()`` in a run on the CPU.

vissl/losses/nce_loss.py:446, vissl/losses/deepclusterv2_loss.py:118 and vissl/models/trunks/convit.py:289 move tensors
to the GPU independent of MACHINE.DEVICE; vissl/models/trunks/xcit.py:70 uses SyncBatchNorm, which needs a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def stay_on_cpu() -> Iterator[None]:
    """Make ``cuda()`` and ``to("cuda")`` without effect and SyncBatchNorm local, during the ``with`` block."""
    cuda, to, sync = torch.Tensor.cuda, torch.Tensor.to, torch.nn.SyncBatchNorm.forward

    def unchanged(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    def to_other_devices(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if args == ("cuda",) and not kwargs else to(self, *args, **kwargs)

    torch.Tensor.cuda, torch.Tensor.to = unchanged, to_other_devices
    torch.nn.SyncBatchNorm.forward = torch.nn.BatchNorm2d.forward
    try:
        yield
    finally:
        torch.Tensor.cuda, torch.Tensor.to, torch.nn.SyncBatchNorm.forward = cuda, to, sync
