"""A queue of the latest rows: the keys of MoCo (He et al. 2020, arXiv:1911.05722), the embeddings of SwAV."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_rows, check_whole
from plugins.distributed import LOCAL, Collective


class RingQueue(nn.Module):
    """The latest K rows of all processes, in a ring: a new row replaces the oldest one.

    The rows of a batch are written in the order of the ranks, and may wrap around the end of the ring. K need not be a
    multiple of the batch. If a batch has more than K rows, its last K are kept. The queue is in the state dict, and
    identical on all processes.

    Args:
        size: K ≥ 1, number of rows.
        dim: width D of the rows.
        seed: of the first rows, which are random unit rows; None starts with zeros.

    Buffers:
        rows: ``[K, D]``, float32.
        written: int64, ``[]``, number of rows written so far; the next one goes to its value modulo K.

    Raises:
        ValueError: a size is below 1.

    >>> queue = RingQueue(3, 1, seed=None)
    >>> queue.write(torch.tensor([[1.0], [2.0]]))
    >>> queue.write(torch.tensor([[3.0], [4.0]]))
    >>> queue.rows.flatten().tolist(), queue.full
    ([4.0, 2.0, 3.0], True)
    """

    rows: Tensor
    written: Tensor

    def __init__(self, size: int, dim: int, *, seed: int | None = 0) -> None:
        super().__init__()
        check_whole("size", size, low=1)
        check_whole("dim", dim, low=1)
        self.seed = seed
        rows = torch.zeros(size, dim)
        if seed is not None:
            rows = F.normalize(torch.randn(size, dim, generator=torch.Generator().manual_seed(seed)), dim=1)
        self.register_buffer("rows", rows)
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))
        self._count = 0  # as written, up to K: known without waiting for the device

    @property
    def full(self) -> bool:
        """Whether every row has been written."""
        return self._count == self.rows.shape[0]

    @torch.no_grad()
    def write(self, rows: Float[Tensor, "B D"], comm: Collective = LOCAL) -> None:
        """Replace the oldest rows by those of a batch.

        Args:
            rows: of this process; not differentiated. Instead of a row with NaN or inf, the old one is kept.
            comm: the processes that share the batch. Their rows are gathered.

        Raises:
            ValueError: the rows are not a floating-point matrix with D columns.
        """
        check_rows(rows=rows)
        size, dim = self.rows.shape
        if rows.shape[1] != dim:
            raise ValueError(f"the rows of a queue of width {dim} must have shape [B, {dim}], got {tuple(rows.shape)}")
        rows = comm.gather_rows(rows.detach().to(self.rows.dtype))
        count = len(rows)
        places = torch.arange(count, device=rows.device) + self.written
        # of more than K rows, the last K: an index must not repeat
        rows, places = rows[-size:], places[-size:] % size
        usable = rows.isfinite().all(1, keepdim=True)
        self.rows.index_copy_(0, places, torch.where(usable, rows, self.rows[places]))
        self.written += count
        self._count = min(self._count + count, size)

    def extra_repr(self) -> str:
        return f"{self.rows.shape[0]}, {self.rows.shape[1]}, seed={self.seed}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._count = min(int(self.written), self.rows.shape[0])
