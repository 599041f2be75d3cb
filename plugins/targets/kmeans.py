"""k-means, Euclidean and spherical, and PCA whitening, of rows that several processes share.

The clustering of DeepCluster (Caron, Bojanowski, Joulin & Douze, ECCV 2018, arXiv:1807.05520), with an empty cluster
that takes a part of another one, as in faiss, and the spherical one of DeepCluster v2 (Caron et al. 2020,
arXiv:2006.09882, appendix), whose empty clusters keep their centroid.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from plugins.checks import NotFiniteError, check_range, check_whole, compute_dtype
from plugins.distributed import LOCAL, Collective
from plugins.linalg import eigh, score_blocks

SPLIT = 1 / 1024
"""Relative distance of the two halves of a cluster, in alternating directions of its coordinates."""
LEAST_VARIANCE = 1e-6
"""Directions with a smaller variance, over the largest one, are rounding errors, which whitening would magnify."""
BOUNDED = 2048
"""Least K (D + 1) with which bounds are used. Below it the search of all rows costs less."""
SETTLED = 1 / 32
"""Bounds are used from the iteration after one in which a smaller share of the rows has changed its cluster."""
MOST = 3 / 4
"""Bounds that leave a larger share of the rows open are given up."""


class Clusters(NamedTuple):
    """The result of :func:`kmeans`."""

    centroids: Float[Tensor, "K D"]
    """The same on all processes; float32 (float64 for float64 rows)."""
    labels: Int64[Tensor, " N"]
    """Nearest centroid of each row of this process."""


@torch.no_grad()
def kmeans(
    x: Float[Tensor, "N D"],
    k: int,
    *,
    iterations: int = 20,
    spherical: bool = False,
    init: Float[Tensor, "K D"] | None = None,
    index: Int64[Tensor, " N"] | None = None,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
    comm: Collective = LOCAL,
) -> Clusters:
    """Cluster rows: repeat "assign each row to the nearest centroid, move each centroid to the mean of its rows".

    The nearest centroid has the least ``‖x - c‖²``, or, spherical, the largest ``x · c``; spherical centroids are
    normalised. After the last iteration the rows are assigned once more.

    A Euclidean cluster without rows becomes one half of another cluster, drawn with a probability proportional to its
    size less one. A spherical one keeps its centroid.

    Args:
        x: rows of this process, of any floating dtype; spherical: of unit length. A process may have no row.
        k: number K of clusters, from 1 to the number of rows on all processes.
        iterations: ≥ 0.
        spherical: whether to compare directions.
        init: the first centroids; None draws distinct rows.
        index: position of each row, so that rows of all processes have 0 … n - 1; None is the order of the processes.
            With it the first centroids do not depend on how the rows are shared.
        seed: of the draws, which are the same on all processes, ≥ 0.
        report: called after each assignment with the number of iterations so far and the mean score: the squared
            distance, or the cosine.
        comm: the processes that share the rows. They exchange K (D + 1) numbers per iteration.

    Returns:
        The centroids and the label of each row of this process.

    Raises:
        ValueError: not a matrix of floating-point numbers, ``init`` or ``index`` does not fit, a number out of range.
        NotFiniteError: a number is NaN or inf, on any process.

    Reference:
        arXiv:1807.05520, eq. 2. Cost: at most 2 n K D operations per iteration; rows that stay in their cluster by the
        bounds of Hamerly (SDM 2010) are not compared with the centroids again.

    >>> kmeans(torch.tensor([[0.0], [0.1], [5.0], [5.2]]), 2, seed=1).centroids.sort(0)[0]
    tensor([[0.0500],
            [5.1000]])
    """
    counts = _check(x, comm)
    n = sum(counts)
    check_whole("k", k, low=1)
    check_range("k", k, low=1, high=n)
    check_whole("iterations", iterations, low=0)
    check_whole("seed", seed, low=0)
    if index is not None and (index.dtype != torch.int64 or index.shape != x.shape[:1]):
        raise ValueError(f"index must be int64 [N] with N = {len(x)} rows, got {index.dtype} of {tuple(index.shape)}")
    dtype = compute_dtype(x.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.autocast(x.device.type, enabled=False):
        if init is None:
            centroids = _drawn(x, k, index, counts, generator, comm)
        elif init.shape == (k, x.shape[1]):
            centroids = init.to(x.device, dtype, copy=True)
        else:
            raise ValueError(f"init must have shape ({k}, {x.shape[1]}), got {tuple(init.shape)}")
        if spherical:
            centroids = F.normalize(centroids, dim=1)
        rows = _Rows(x, k, spherical)
        squares = comm.sum(rows.norms.double().square().sum())
        for iteration in range(iterations + 1):
            rows.assign(centroids)
            totals = comm.sum(rows.totals)
            if report is not None:
                report(iteration, _score(centroids, totals, squares, spherical) / n)
            if iteration < iterations:
                centroids = _moved(centroids, totals, spherical, generator)
    return Clusters(centroids, rows.labels)


def _check(x: Tensor, comm: Collective) -> list[int]:
    """Check the rows on all processes together; return the numbers of rows."""
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point() or not x.shape[1]:
        given = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"x must be a matrix [N, D] of floating-point numbers, got {given}")
    broken = x.numel() > 0 and not all(bool(end.isfinite()) for end in x.aminmax())
    if int(comm.sum(torch.tensor(int(broken), device=x.device))):
        raise NotFiniteError("the clustering needs finite rows, got NaN or inf")
    return comm.row_counts(len(x), x.device)


def _drawn(
    x: Tensor, k: int, index: Tensor | None, counts: list[int], generator: torch.Generator, comm: Collective
) -> Tensor:
    """Draw k distinct rows of all processes."""
    chosen = torch.randperm(sum(counts), generator=generator)[:k].to(x.device)
    if index is None:
        index = torch.arange(len(x), device=x.device) + sum(counts[: comm.rank])
    place = torch.full((sum(counts),), -1, device=x.device)
    place[index] = torch.arange(len(x), device=x.device)
    rows = place[chosen]
    found = x.new_zeros(k, x.shape[1], dtype=compute_dtype(x.dtype))
    found[rows >= 0] = x[rows[rows >= 0]].to(found.dtype)
    return comm.sum(found)


def blocks(x: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows in the dtype of the computation, so that a block with ``width`` columns stays small."""
    for rows in score_blocks(len(x), width, x.device, least=256):
        yield rows, x[rows].to(compute_dtype(x.dtype))


class _Rows:
    """Rows of this process with their labels, and the sums and sizes of the clusters.

    The score of row x for centroid c is ``x · c - ‖c‖² / 2``, or, spherical, ``x · c``. It is computed for the rows
    whose cluster may change. For the others it need not be: if each centroid moves by at most δ, and ``‖c‖² / 2`` by at
    most γ, a score changes by at most ``‖x‖ δ + γ``, so the best one stays the best while it leads by more than what
    has been lost (the bounds of Hamerly, "Making k-means even faster", SDM 2010, on scores in place of distances).
    While many rows change their cluster the centroids move too far for these bounds. Then the leads are not computed.

    Args:
        x: the rows.
        k: number K of clusters.
        spherical: whether to compare directions.
    """

    def __init__(self, x: Tensor, k: int, spherical: bool) -> None:
        self.x, self.spherical = x, spherical
        self.labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.totals = torch.zeros(k, x.shape[1] + 1, dtype=torch.float64, device=x.device)  # the last column: sizes
        self.norms = torch.empty(len(x), dtype=compute_dtype(x.dtype), device=x.device)
        for rows, block in blocks(x, x.shape[1]):
            self.norms[rows] = torch.linalg.vector_norm(block, dim=1)
        self.lead: Tensor | None = None  # of the best score before the second; at least
        self.changes = len(x)
        self.limit = SETTLED * len(x) if self.totals.numel() >= BOUNDED else 0
        self.centroids: Tensor | None = None

    def assign(self, centroids: Tensor) -> None:
        """Assign the rows to centroids."""
        before, heights = self.centroids, _heights(centroids, self.spherical)
        if before is None:
            self.centroids, self.heights = centroids, heights
            self.labels = self._search(None)
            self._add(None, self.labels, None)
            return
        if torch.equal(centroids, before):
            return
        rows = None if self.lead is None else self._open(centroids - before, centroids, heights)
        self.centroids, self.heights = centroids, heights
        found = self._search(rows)
        old = self.labels if rows is None else self.labels.index_select(0, rows)
        changed = (found != old).nonzero().flatten()
        new, old = found.index_select(0, changed), old.index_select(0, changed)
        if rows is None:
            self.labels = found
        else:
            changed = rows.index_select(0, changed)
            self.labels.index_copy_(0, changed, new)
        self._add(changed, new, old)
        self.changes = len(changed)

    def _open(self, steps: Tensor, centroids: Tensor, heights: Tensor) -> Tensor | None:
        """Return the rows whose cluster may change; None and no leads if they are most rows.

        The leads decrease by what the new centroids can take, and by the rounding errors of two scores.
        """
        assert self.lead is not None
        moved = torch.linalg.vector_norm(steps, dim=1)
        lifted = (heights - self.heights).abs().flatten()
        error = 64 * torch.finfo(moved.dtype).eps
        moved += moved.max() + error * torch.linalg.vector_norm(centroids, dim=1).max()
        lifted += lifted.max() - error * heights.min()
        self.lead -= torch.addcmul(lifted[self.labels], self.norms, moved[self.labels])
        rows = (self.lead <= 0).nonzero().flatten()
        if len(rows) < MOST * len(self.x):
            return rows
        self.lead, self.limit = None, self.changes / 2
        return None

    def _search(self, rows: Tensor | None) -> Tensor:
        """Return the best centroid of some rows, None of all rows, and store its lead if bounds are in use."""
        assert self.centroids is not None
        count = len(self.x) if rows is None else len(rows)
        found, lead = self.labels.new_empty(count), None
        if rows is not None or self.changes < self.limit:
            lead = self.norms.new_empty(count)
        # a quarter of the usual blocks, because the scores are read up to three times, in lines of the cache
        width = 4 * max(self.centroids.shape)
        for part in score_blocks(count, width, self.x.device, least=256, multiple=16):
            block = (self.x[part] if rows is None else self.x.index_select(0, rows[part])).to(self.norms.dtype)
            columns = block.T
            scores = self.centroids @ columns if self.spherical else self.heights.addmm(self.centroids, columns)
            best, chosen = largest(scores)
            found[part] = chosen
            if lead is not None:
                lead[part] = best - scores.scatter_(0, chosen[None], -torch.inf).amax(0)
        if rows is not None and self.lead is not None and lead is not None:
            self.lead.index_copy_(0, rows, lead)
        else:
            self.lead = lead
        return found

    def _add(self, rows: Tensor | None, labels: Tensor, old: Tensor | None) -> None:
        """Add some rows, None for all, to the sums of their clusters, and subtract them from their old clusters.

        float32 sums of rows far from the origin would move the centroids, by an error that depends on the blocks and on
        how processes share the rows, and that stays in a cluster which loses its rows.
        """
        for part in score_blocks(len(labels), 16 * self.totals.shape[1], self.x.device, least=256):
            chosen = self.x[part] if rows is None else self.x.index_select(0, rows[part])
            block = self.totals.new_ones(len(chosen), self.totals.shape[1])
            block[:, :-1] = chosen
            add_rows(self.totals, labels[part], block)
            if old is not None:
                add_rows(self.totals, old[part], block, sign=-1)


def _score(centroids: Tensor, totals: Tensor, squares: Tensor, spherical: bool) -> float:
    """Return the sum of the squared distances of all rows, or of their cosines."""
    along = (totals[:, :-1] * centroids).sum()
    if spherical:
        return float(along)
    return float(squares - 2 * (along + (totals[:, -1:] * _heights(centroids, spherical)).sum()))


def _heights(centroids: Tensor, spherical: bool) -> Float[Tensor, "K 1"]:
    """Return ``-‖c‖² / 2``, or, spherical, 0."""
    if spherical:
        return centroids.new_zeros(len(centroids), 1)
    return centroids.square().sum(1, keepdim=True).mul_(-0.5)


def largest(scores: Float[Tensor, "K B"]) -> tuple[Tensor, Tensor]:
    """Return the largest score of each column, and the first row that has it.

    On the CPU max pooling is 7 to 20 times as fast as Tensor.max, because it is vectorised over the columns, which are
    its channels. Every second thread pools some of the rows.
    """
    if scores.device.type != "cpu":
        return scores.max(0)
    count, columns = scores.shape
    parts = max(min(torch.get_num_threads() // 2, count // 64), 1)
    image = scores.as_strided((1, columns, count, 1), (scores.numel(), 1, columns, columns))
    values, places = F.max_pool2d(image, (-(-count // parts), 1), ceil_mode=True, return_indices=True)
    if parts == 1:
        return values.view(-1), places.view(-1)
    best, part = largest(values[0, :, :, 0].T)
    return best, places[0, :, :, 0].gather(1, part[:, None])[:, 0]


def add_rows(totals: Float[Tensor, "K D"], labels: Tensor, block: Float[Tensor, "B D"], *, sign: int = 1) -> None:
    """Add rows to the totals of their labels, or subtract them, in an order that is always the same."""
    if block.device.type == "cpu":
        totals.index_add_(0, labels, block, alpha=sign)
        return
    totals += sign * grouped_sums(len(totals), labels, block)


def grouped_sums(count: int, labels: Tensor, block: Float[Tensor, "B D"]) -> Float[Tensor, "K D"]:
    """Sum the rows of each label in the order of the rows, without atomic additions."""
    bounds = torch.bincount(labels, minlength=count).cumsum(0)
    return F.embedding_bag(labels.argsort(stable=True), block, F.pad(bounds[:-1], (1, 0)), mode="sum")


def _moved(centroids: Tensor, totals: Tensor, spherical: bool, generator: torch.Generator) -> Float[Tensor, "K D"]:
    """Return the centroids of the next iteration."""
    sums, sizes = totals[:, :-1], totals[:, -1:]
    means = (sums / sizes).to(centroids.dtype)  # NaN for clusters without rows
    if spherical:
        lengths = torch.linalg.vector_norm(means, dim=1, keepdim=True)
        return torch.where((sizes > 0) & (lengths > 1e-12), means / lengths.clamp(min=1e-12), centroids)
    if sizes.all():
        return means
    means = torch.where(sizes > 0, means, centroids)
    sizes = sizes[:, 0].to("cpu", copy=True)
    signs = 1 - 2 * (torch.arange(means.shape[1], device=means.device) % 2)
    for empty in (sizes == 0).nonzero().flatten().tolist():
        weights = (sizes - 1).clamp(min=0)
        if not bool(weights.any()):  # there are as many rows as clusters
            break
        other = int(torch.multinomial(weights, 1, generator=generator))
        means[empty] = means[other] * (1 + SPLIT * signs)
        means[other] *= 1 - SPLIT * signs
        sizes[empty] = sizes[other] // 2
        sizes[other] -= sizes[empty]
    return means


@torch.no_grad()
def whitened(x: Float[Tensor, "N D"], dim: int, *, comm: Collective = LOCAL) -> Float[Tensor, "N d"]:
    """Reduce rows to their first principal components, scale these to variance 1, and normalise the rows.

    ``u (x - mean) / √variance`` for the d directions u of the largest variances, d ≤ ``dim``. Directions whose variance
    is at most 1e-6 of the largest one are left out.

    Args:
        x: rows of this process, of any floating dtype.
        dim: largest number d of components, ≥ 1.
        comm: the processes that share the rows. They exchange D (D + 1) numbers.

    Returns:
        Rows of length 1, float32 (float64 for float64 rows); ``[N, 1]`` of zeros if all rows are equal.

    Raises:
        ValueError: not a matrix of floating-point numbers, or ``dim`` is below 1.
        NotFiniteError: a number is NaN or inf, on any process.

    Reference:
        arXiv:1807.05520, section 4.1: "PCA-reduced to 256 dimensions, whitened and l2-normalized".

    >>> whitened(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 0.1], [0.0, -0.1]]), 2).abs()
    tensor([[0., 1.],
            [0., 1.],
            [1., 0.],
            [1., 0.]])
    """
    counts = _check(x, comm)
    check_whole("dim", dim, low=1)
    n, width = sum(counts), x.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        total = x.new_zeros(width, dtype=torch.float64)
        for _, block in blocks(x, width):
            total += block.sum(0, dtype=torch.float64)
        mean = (comm.sum(total) / n).to(compute_dtype(x.dtype))
        square = x.new_zeros(width, width, dtype=torch.float64)
        for _, block in blocks(x, width):
            centred = block - mean
            square += centred.T @ centred
        values, vectors = eigh(comm.sum(square) / n)
        kept = values > LEAST_VARIANCE * values[-1]
        kept[: max(width - dim, 0)] = False
        # of the first process: solvers of different machines may choose other signs
        scaled = vectors * values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt() * kept
        projection = comm.sum(scaled if comm.rank == 0 else torch.zeros_like(scaled)).to(mean.dtype)
        projection = projection[:, projection.any(0)]
        result = x.new_zeros(len(x), max(projection.shape[1], 1), dtype=mean.dtype)
        if projection.shape[1]:
            for rows, block in blocks(x, width):
                result[rows] = F.normalize((block - mean) @ projection, dim=1)
    return result
