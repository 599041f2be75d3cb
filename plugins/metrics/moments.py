"""Mean and scatter matrices of a stream of rows, exact over processes."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from plugins.checks import check_rows
from plugins.distributed import LOCAL, Collective
from plugins.linalg import joined_sums


class Moments:
    """Mean, and scatters between and within images, of V views of each image, in float64 and O(D²) memory.

    With the view means m_i = Σ_v z_iv / V of n images and their mean m::

        between = Σ_i (m_i − m) (m_i − m)ᵀ        within = Σ_i Σ_v (z_iv − m_i) (z_iv − m_i)ᵀ

    Both are sums of centred products (the update of Chan, Golub & LeVeque 1983), so that they keep their digits if the
    mean is much larger than the deviations. An update does not synchronise with the device.

    Attributes:
        count: n, number of images.
        views: V, the same in all updates; 0 before the first one.
        mean: m, ``[D]``.
        between: ``[D, D]``.
        within: ``[D, D]``; 0 if V = 1.

    Example:
        >>> moments = Moments()
        >>> moments.update([torch.tensor([[1.0, 0.0], [3.0, 0.0]])])
        >>> moments.update([torch.tensor([[5.0, 3.0]])])
        >>> moments.mean, moments.covariance()[0, 0].item()
        (tensor([3., 1.], dtype=torch.float64), 2.6666666666666665)
    """

    def __init__(self) -> None:
        self.count = self.views = 0
        self.mean = self.between = self.within = torch.zeros(0, dtype=torch.float64)

    @torch.no_grad()
    def update(self, views: Sequence[Float[Tensor, "N D"]]) -> None:
        """Add a batch.

        Args:
            views: the rows of each view, of any floating dtype; row i of all views belongs to the same image.

        Raises:
            ValueError: the views are no matrices of one shape, or number or width of the views has changed.
        """
        check_rows(**{f"view{number}": view for number, view in enumerate(views)})
        count, width = views[0].shape
        if self.views == 0:
            self.views = len(views)
            self.mean = torch.zeros(width, dtype=torch.float64, device=views[0].device)
            self.between, self.within = (torch.zeros_like(self.mean).repeat(width, 1) for _ in range(2))
        if (len(views), width) != (self.views, len(self.mean)):
            raise ValueError(
                f"all batches must have {self.views} views of width {len(self.mean)}, got {len(views)} of width {width}"
            )
        if count == 0:
            return
        with torch.autocast(views[0].device.type, enabled=False):
            rows = torch.stack([view.detach().to(self.mean) for view in views])
            means = rows.mean(0)
            if self.views > 1:
                deviations = (rows - means).flatten(0, 1)
                self.within.addmm_(deviations.T, deviations)
            mean = means.mean(0)
            means = means - mean
            self.between.addmm_(means.T, means)
            shift = mean - self.mean
            self.between.addr_(shift, shift, alpha=self.count * count / (self.count + count))
            self.mean.add_(shift, alpha=count / (self.count + count))
        self.count += count

    @torch.no_grad()
    def joined(self, comm: Collective = LOCAL) -> "Moments":
        """Return the moments of the rows of all processes, with one all-reduce of ``2 D² + W (D + 1)`` numbers.

        Args:
            comm: the W processes. Each must have had at least one update.
        """
        if comm.size == 1:
            return self
        width = len(self.mean)
        # the mean of each process in a place of its own: sums of squares about a common origin would lose digits
        places = self.mean.new_zeros(comm.size, width + 1)
        places[comm.rank, 0], places[comm.rank, 1:] = self.count, self.mean
        places, between, within = joined_sums([places, self.between, self.within], comm)
        counts, means = places.tensor_split([1], dim=1)
        found = Moments()
        found.views, found.count = self.views, int(counts.sum())
        found.mean = (counts * means).sum(0) / max(found.count, 1)
        shifts = means - found.mean
        found.between = between + (counts * shifts).T @ shifts
        found.within = within
        return found

    @property
    def rows(self) -> int:
        """Number of rows, n V."""
        return self.count * self.views

    def covariance(self) -> Float[Tensor, "D D"]:
        """Return the covariance of all rows, divided by their number."""
        return (self.between * self.views + self.within) / self.rows

    def second_moment(self) -> Float[Tensor, "D D"]:
        """Return ``Zᵀ Z / N`` of all N rows, without centring."""
        return self.covariance() + torch.outer(self.mean, self.mean)
