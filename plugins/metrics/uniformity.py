"""Alignment of the views of an image, and uniformity of the images on the sphere (Wang & Isola, arXiv:2005.10242)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from plugins.checks import check_rows, check_whole
from plugins.distributed import LOCAL, Collective

SAMPLE = 1024
"""Number of images whose pairs give the uniformity."""


def alignment(views: Sequence[Float[Tensor, "N D"]]) -> Float[Tensor, " N"]:
    """Compute for each image the mean squared distance of two of its views, as unit rows: 0 (equal) to 4 (opposite).

    ``2 / (V (V − 1)) Σ_(a < b) ‖u_a − u_b‖² = 2 / (V − 1) Σ_a ‖u_a − ū‖²``; its mean over images is the alignment with
    exponent 2.

    Args:
        views: the rows of V ≥ 2 views.

    Raises:
        ValueError: there are fewer than two views, or they are no matrices of one shape.

    >>> alignment([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])])
    tensor([2.])
    """
    check_rows(**{f"view{number}": view for number, view in enumerate(views)})
    if len(views) < 2:
        raise ValueError(f"alignment compares at least two views, got {len(views)}")
    units = F.normalize(torch.stack([*views]), dim=-1)
    return (units - units.mean(0)).square().sum((0, 2)) * (2 / (len(views) - 1))


def uniformity(rows: Float[Tensor, "N D"], *, t: float = 2.0) -> Float[Tensor, ""]:
    """Compute ``log mean_(i < j) exp(−t ‖u_i − u_j‖²)`` of unit rows, in O(N²): −4 t (opposite) to 0 (all rows equal).

    Args:
        rows: one row for each image, of any scale.
        t: width of the kernel, > 0.

    Returns:
        A scalar; NaN for fewer than two rows.

    >>> round(uniformity(torch.eye(3)).item(), 4)
    -4.0
    """
    check_rows(rows=rows)
    units = F.normalize(rows, dim=1)
    squares = units.square().sum(1)
    distances = (squares[:, None] + squares - 2 * units @ units.T).clamp_min(0)
    above = torch.ones_like(distances, dtype=torch.bool).triu(1)
    return distances[above].mul(-t).exp().mean().log()


class RowSample:
    """A sample of the rows of a stream, which does not depend on their order, on batches or on processes.

    It consists of the rows with the smallest hashes. The hash is that of the row's bits in float32, so all processes
    select the sample of the joined stream.

    Args:
        size: largest number of rows, ≥ 2.

    Example:
        >>> sample = RowSample(2)
        >>> for rows in torch.arange(10.0).view(5, 2, 1):
        ...     sample.update(rows)
        >>> len(sample.rows)
        2
    """

    def __init__(self, size: int = SAMPLE) -> None:
        check_whole("size", size, low=2)
        self.size = size
        self.rows: Tensor | None = None
        self._keys = torch.zeros(0, dtype=torch.int64)

    @torch.no_grad()
    def update(self, rows: Float[Tensor, "N D"]) -> None:
        """Add rows."""
        rows = rows.detach().float()
        keys = _hashes(rows)
        if self.rows is not None:
            rows, keys = torch.cat([self.rows, rows]), torch.cat([self._keys, keys])
        self.rows, self._keys = self._smallest(rows, keys)

    @torch.no_grad()
    def joined(self, comm: Collective = LOCAL) -> Float[Tensor, "M D"]:
        """Return the sample of the rows of all processes. Each must have had at least one update."""
        assert self.rows is not None, "update comes first"
        counts = comm.row_counts(len(self.rows), self.rows.device)
        every = (comm.gather_rows(part, counts=counts) for part in (self.rows, self._keys))
        return self._smallest(*every)[0]

    def _smallest(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        keys, order = keys.sort()
        return rows[order[: self.size]], keys[: self.size]


def _hashes(rows: Float[Tensor, "N D"]) -> Int[Tensor, " N"]:
    """Return a 64-bit hash of the bits of each row: a sum with odd weights, then the mixing steps of MurmurHash3.

    Integers wrap around, so the sum is exact in any order.
    """
    bits = rows.contiguous().view(torch.int32).to(torch.int64)
    weights = (2 * torch.arange(rows.shape[1], device=rows.device) + 1) * -7046029254386353131
    key = (bits * weights).sum(1)
    for factor in (-49064778989728563, -4265267296055464877):
        key = (key ^ (key >> 33)) * factor
    return key ^ (key >> 33)
