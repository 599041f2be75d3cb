"""Collective operations of the losses, and their gradients.

The rule: **every process computes the same loss, from joined quantities only.** Then

* every process returns the loss of the joined batch, and
* the mean over processes of the parameter gradients, which is what DistributedDataParallel takes, equals the gradient
  of a single process on the joined batch.

To make the second sentence true without any communication in backward, the backward of ``sum`` and ``gather_rows``
multiplies the local gradient by the number of processes W: process r holds W J_r^T dL/dS, and the mean over processes
of it is sum_r J_r^T dL/dS, the gradient of the joined batch. Numbers of rows may differ between processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Collective:
    """The processes that share one batch.

    ``LOCAL`` is this process alone, ``WORLD`` all of the default process group (this process alone while none is
    initialised, so that a script runs unchanged with and without ``torchrun``).

    Args:
        group: a ``torch.distributed`` process group; None is the default group.
        enabled: False creates a Collective of this process alone.
    """

    def __init__(self, group: Any = None, *, enabled: bool = True) -> None:
        self.group = group
        self.enabled = enabled

    @property
    def size(self) -> int:
        """Number of processes that share the batch. Queried at each access: a process group can start later."""
        if not self.enabled or not dist.is_available() or not dist.is_initialized():
            return 1
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Rank of this process in the group, from 0."""
        return 0 if self.size == 1 else dist.get_rank(self.group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes; it has the same shape on each. Differentiable, see the module's rule."""
        return tensor if self.size == 1 else _Sum.apply(tensor, self)

    def gather_rows(self, tensor: Tensor, *, counts: list[int] | None = None) -> Tensor:
        """Concatenate the rows of all processes in rank order, ``[B_r, ...] → [sum_r B_r, ...]``. Differentiable.

        The numbers of rows may differ. ``counts`` is the result of ``row_counts``; if it is None, it is computed here.
        """
        return tensor if self.size == 1 else _GatherRows.apply(tensor, self, counts)

    def row_counts(self, rows: int, device: torch.device | None = None) -> list[int]:
        """Return the number of rows on each process, in rank order."""
        if self.size == 1:
            return [rows]
        counts = torch.zeros(self.size, dtype=torch.int64, device=device)
        counts[self.rank] = rows
        dist.all_reduce(counts, group=self.group)
        return counts.tolist()

    def __repr__(self) -> str:
        return f"Collective(size={self.size})"


LOCAL = Collective(enabled=False)
WORLD = Collective()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, comm: Collective) -> Tensor:
        ctx.size = comm.size
        total = tensor.detach().clone(memory_format=torch.contiguous_format)  # NCCL supports no other layout
        dist.all_reduce(total, group=comm.group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.size, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, comm: Collective, counts: list[int] | None) -> Tensor:
        if counts is None:
            counts = comm.row_counts(tensor.shape[0], tensor.device)
        ctx.size = comm.size
        ctx.start = sum(counts[: comm.rank])
        ctx.rows = tensor.shape[0]
        # gloo gathers equal shapes only: pad to the largest number of rows, and remove the padding afterwards
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: ctx.rows] = tensor.detach()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=comm.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0][ctx.start : ctx.start + ctx.rows] * ctx.size, None, None
