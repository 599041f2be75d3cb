"""``.cuda()`` in code that runs on the CPU too.

vissl/losses/nce_loss.py:446, vissl/losses/deepclusterv2_loss.py:118 and vissl/models/trunks/convit.py:289 move tensors
to the GPU whatever MACHINE.DEVICE says.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def stay_on_cpu() -> Iterator[None]:
    """Let ``tensor.cuda()`` and ``tensor.to("cuda")`` give the tensor itself, for a training on the CPU."""
    cuda, to = torch.Tensor.cuda, torch.Tensor.to

    def same(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    def stay(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if args == ("cuda",) and not kwargs else to(self, *args, **kwargs)

    torch.Tensor.cuda, torch.Tensor.to = same, stay  # pyright: ignore
    try:
        yield
    finally:
        torch.Tensor.cuda, torch.Tensor.to = cuda, to
