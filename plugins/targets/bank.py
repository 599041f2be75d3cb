"""A memory bank: one unit row for each image of the training set, updated from the embeddings of each batch.

Wu, Xiong, Yu & Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (CVPR 2018,
arXiv:1805.01978), with the update of Misra & van der Maaten, "Self-Supervised Learning of Pretext-Invariant
Representations" (CVPR 2020, arXiv:1912.01991), section 3.2.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from plugins.checks import check_range, check_rows, check_whole
from plugins.distributed import LOCAL, Collective
from plugins.linalg import unit_rows
from plugins.targets.memory import ImageMemory

FEW = 32
"""Below one index for so many rows of the bank, single dot products are cheaper than cosines with the whole bank."""
ENTRIES = 2**24
"""Number of cosines with the whole bank that are in memory at the same time."""


class IndexedBank(ImageMemory):
    """Rows of unit length, indexed by image: ``b_i ← l2(m b_i + (1 − m) l2(z_i))``.

    The bank is in the state dict. With ``size=None`` it is empty until :meth:`allocate` is called or a checkpoint is
    loaded, because a framework may restore a model before it knows the number of training images.

    Each process holds the whole bank, and the banks are identical: the first rows depend on ``seed`` only, and
    :meth:`write` writes the rows of all processes on each.

    Args:
        size: number n of images; None until it is known.
        dim: width D of the rows.
        momentum: m in [0, 1]. 1 never changes a row, 0 replaces it.
        seed: of the first rows, which are uniform in a cube and then normalised.

    Buffers:
        rows: ``[n, D]``, float32; ``[0, D]`` before the allocation.

    Raises:
        ValueError: an argument is out of range.

    Reference:
        PIRL, arXiv:1912.01991, section 3.2. Memory: 4 n D bytes, 656 MB for ImageNet at D = 128.

    >>> bank = IndexedBank(3, 2, momentum=0.0)
    >>> bank.write(torch.tensor([1]), torch.tensor([[0.0, 5.0]]))
    >>> bank.read(torch.tensor([1]))
    tensor([[0., 1.]])
    """

    HOLDS = "the memory bank holds {size} images"

    def __init__(self, size: int | None, dim: int, *, momentum: float = 0.5, seed: int = 0) -> None:
        check_whole("dim", dim, low=1)
        check_range("momentum", momentum, low=0.0, high=1.0)
        super().__init__(torch.zeros(0, dim))
        self.dim, self.momentum, self.seed = dim, momentum, seed
        if size is not None:
            self.allocate(size)

    def first_rows(self, size: int) -> Tensor:
        """Return random unit rows."""
        generator = torch.Generator().manual_seed(self.seed)
        bound = math.sqrt(3 / self.dim)
        drawn = torch.rand(size, self.dim, generator=generator).mul_(2 * bound).sub_(bound)
        return F.normalize(drawn, dim=1)

    def read(self, index: Int64[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """Return the rows of some images, without gradient.

        Args:
            index: of images, each in [0, n).
        """
        self._check(index)
        return self.rows[index]

    def logits(self, u: Float[Tensor, "B D"], index: Int64[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """Compute ``u_i · b_(index_ik)``, differentiable by u. No tensor of B K D numbers is made.

        Args:
            u: unit rows, one for each row of ``index``.
            index: of images, each in [0, n). An index may repeat.

        Returns:
            Cosines, float32 (float64 for float64 input).

        Raises:
            ValueError: the bank is empty, or a shape or dtype is wrong.
        """
        self._check_rows(index, "[B, K]", u=u)
        with torch.autocast(u.device.type, enabled=False):
            rows = self.rows.double() if u.dtype == torch.float64 else self.rows
            return _Logits.apply(u.to(rows.dtype), rows, index)

    @torch.no_grad()
    def write(self, index: Int64[Tensor, " B"], z: Float[Tensor, "B D"], comm: Collective = LOCAL) -> None:
        """Move the rows of a batch towards its embeddings.

        If the joined batch holds an image more than once, its last row in the order of the ranks is used. Samplers
        repeat images to give each process the same number of them.

        Args:
            index: of this process's images, each in [0, n).
            z: their embeddings, of any length; not differentiated. A row that is zero, or holds NaN or inf, changes
                nothing.
            comm: the processes that share the batch. Their indexes and embeddings are gathered.

        Raises:
            ValueError: the bank is empty, or a shape or dtype is wrong.
        """
        self._check_rows(index, "[B]", z=z)
        if self.momentum == 1:
            return
        with torch.autocast(z.device.type, enabled=False):
            counts = comm.row_counts(len(z), z.device)
            index = comm.gather_rows(index, counts=counts)
            unit = comm.gather_rows(unit_rows(z.to(self.rows.dtype))[0], counts=counts)
            places = torch.arange(len(index), device=index.device)
            last = places.new_zeros(self.size).scatter_reduce_(0, index, places, "amax", include_self=False)[index]
            old = self.rows[index]
            mixed = old.lerp(unit[last], 1 - self.momentum)
            length = torch.linalg.vector_norm(mixed, dim=1, keepdim=True)
            usable = (length > 1e-6) & length.isfinite() & (unit[last] != 0).any(1, keepdim=True)
            # rows of the same image are equal, so that it does not matter which one is written last
            self.rows.index_copy_(0, index, torch.where(usable, mixed / length, old))

    def extra_repr(self) -> str:
        return f"{self.size or None}, {self.dim}, momentum={self.momentum}, seed={self.seed}"

    def _check(self, index: Tensor) -> None:
        if index.dtype != torch.int64:
            raise ValueError(f"index must be of dtype int64, got {index.dtype}")
        if not self.size:
            raise ValueError("the memory bank is empty: call allocate with the number of training images first")

    def _check_rows(self, index: Tensor, shape: str, **matrix: Tensor) -> None:
        """Check an index of a given shape, and the named matrix with one row for each of its rows."""
        check_rows(**matrix)
        self._check(index)
        ((name, rows),) = matrix.items()
        if index.ndim != shape.count(",") + 1 or len(index) != len(rows) or rows.shape[1] != self.dim:
            raise ValueError(
                f"index must be {shape} and {name} [B, {self.dim}] with the same B, "
                f"got shapes {tuple(index.shape)} and {tuple(rows.shape)}"
            )


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(rows, index)
        if index.shape[1] * FEW < rows.shape[0]:
            return _few(u, rows, index)
        block = max(ENTRIES // rows.shape[0], 1)
        parts = zip(u.split(block), index.split(block), strict=True)
        return torch.cat([(part @ rows.T).gather(1, columns) for part, columns in parts])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, index = ctx.saved_tensors
        (gradient,) = gradients
        return F.embedding_bag(index, rows, per_sample_weights=gradient.contiguous(), mode="sum"), None, None


def _few(u: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Compute the cosines as the gradient of ``u_i · sum_k w_ik b_(index_ik)`` by the weights w."""
    with torch.enable_grad():
        weights = u.new_zeros(index.shape, requires_grad=True)
        bags = F.embedding_bag(index, rows, per_sample_weights=weights, mode="sum")
        return torch.autograd.grad(bags, weights, u)[0]
