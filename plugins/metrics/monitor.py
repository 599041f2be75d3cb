"""The quality of features and projections during a training: the option ``log_quality`` of every method."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from plugins.checks import check_finite
from plugins.clock import Feed, Stepped
from plugins.distributed import LOCAL, Collective
from plugins.linalg import eigvalsh, participation_ratio
from plugins.metrics.lidar import lidar
from plugins.metrics.moments import Moments
from plugins.metrics.spectrum import alpha_req, nesum, rankme, stable_rank
from plugins.metrics.uniformity import RowSample, alignment, uniformity

KINDS = ("features", "projections")
MAX_WIDTH = 8192
"""Largest width D. The two scatter matrices have 16 D² bytes: 1 GiB at this width."""


class QualityValues(NamedTuple):
    """The metrics of one stream of rows: scalars in float64; NaN if they are undefined."""

    rankme: Tensor
    """See :func:`plugins.metrics.rankme`."""
    alpha_req: Tensor
    """See :func:`plugins.metrics.alpha_req`."""
    stable_rank: Tensor
    """See :func:`plugins.metrics.stable_rank`."""
    participation_ratio: Tensor
    """See :func:`plugins.linalg.participation_ratio`; of the covariance."""
    nesum: Tensor
    """See :func:`plugins.metrics.nesum`."""
    lidar: Tensor
    """See :func:`plugins.metrics.lidar`; NaN for one view."""
    alignment: Tensor
    """Mean of :func:`plugins.metrics.alignment`; NaN for one view."""
    uniformity: Tensor
    """See :func:`plugins.metrics.uniformity`; of the first view of 1024 images."""


class Quality:
    """Accumulate rows and compute the metrics of all of them, exactly over processes.

    Memory is O(D²), independent of the number of rows. :meth:`values` makes three decompositions of D x D matrices.

    Args:
        comm: the processes. Each must have rows.

    Example:
        >>> quality = Quality()
        >>> quality.update([torch.eye(4), torch.eye(4)])
        >>> {name: round(value.item(), 2) for name, value in quality.values()._asdict().items()}["rankme"]
        4.0
    """

    def __init__(self, comm: Collective = LOCAL) -> None:
        self.comm = comm
        self.moments, self.sample = Moments(), RowSample()
        self._alignment: Tensor | None = None

    @torch.no_grad()
    def update(self, views: Sequence[Tensor]) -> None:
        """Add a batch. It does not synchronise with the device.

        Args:
            views: ``[N, D]`` of each view; row i of all views belongs to the same image.

        Raises:
            ValueError: the views are no matrices of one shape, their number has changed, or D exceeds MAX_WIDTH.
        """
        check_width(views[0].shape[-1], "rows")
        self.moments.update(views)
        self.sample.update(views[0])
        if len(views) > 1:
            rows = alignment([view.double() for view in views]).sum()
            self._alignment = rows if self._alignment is None else self._alignment + rows

    @torch.no_grad()
    def values(self) -> QualityValues:
        """Compute the metrics of all rows. Call it on all processes.

        Raises:
            ValueError: there are no rows.
            NotFiniteError: a row holds NaN or inf.
        """
        if self.moments.count == 0:
            raise ValueError("the quality of a representation needs at least one row, got none")
        moments = self.moments.joined(self.comm)
        check_finite("the quality of a representation", rows=moments.covariance())
        second, covariance = (eigvalsh(matrix) for matrix in (moments.second_moment(), moments.covariance()))
        unknown = second.new_full((), torch.nan)
        several = self._alignment is not None
        return QualityValues(
            rankme(second, rows=moments.rows),
            alpha_req(covariance),
            stable_rank(second),
            participation_ratio(covariance),
            nesum(covariance),
            lidar(moments.between / moments.count, moments.within / moments.rows) if several else unknown,
            self.comm.sum(self._alignment) / moments.count if self._alignment is not None else unknown,
            uniformity(self.sample.joined(self.comm).double()),
        )


class QualityMonitor(Stepped):
    """Accumulate the features and the projections of an epoch.

    Args:
        where: the option ``log_quality``: True, "features" or "projections".
        comm: the processes that share the batch.
    """

    def __init__(self, where: bool | str, comm: Collective = LOCAL) -> None:
        self.kinds = KINDS if where is True else (str(where),)
        self.comm = comm
        self._parts: dict[str, Quality] = {}

    def update(self, **views: Sequence[Tensor]) -> None:
        """Add a batch: the views of ``features`` and of ``projections``. Other kinds than the chosen ones are ignored.

        Raises:
            ValueError: as for :meth:`Quality.update`; the message names the kind.
        """
        for kind in self.kinds:
            if views.get(kind):
                check_width(views[kind][0].shape[-1], kind)
                self._parts.setdefault(kind, Quality(self.comm)).update(views[kind])

    def values(self) -> dict[str, Tensor]:
        """Return the metrics since the last call, as ``quality/features/rankme``; {} without rows.

        Metrics that need two views are left out for one view. If a row holds NaN or inf, all are NaN. Call it on all
        processes.
        """
        parts, self._parts = self._parts, {}
        found = {}
        for kind, part in parts.items():
            try:
                values = part.values()._asdict()
            except FloatingPointError:
                unknown = part.moments.mean.new_full((), torch.nan)
                values = dict.fromkeys(QualityValues._fields, unknown)
            if part.moments.views == 1:
                values = {name: value for name, value in values.items() if name not in ("lidar", "alignment")}
            found.update({f"quality/{kind}/{name}": value for name, value in values.items()})
        return found

    def start_epoch(self, epoch: int, feed: Feed | None) -> Iterable[nn.Parameter]:
        """Forget all rows, which an interrupted epoch may have left."""
        self._parts = {}
        return ()


def check_width(width: int, kind: str) -> None:
    """Check the width of the rows.

    Args:
        width: D.
        kind: name of the rows, for the message.

    Raises:
        ValueError: D exceeds MAX_WIDTH.
    """
    if width > MAX_WIDTH:
        other = next((name for name in KINDS if name != kind), "")
        advice = f"; set log_quality={other} or log_quality=false" if kind in KINDS else ""
        raise ValueError(f"log_quality accepts at most {MAX_WIDTH} columns, got {kind} with {width}{advice}")
