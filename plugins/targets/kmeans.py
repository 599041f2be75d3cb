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
        for iteration in range(iterations + 1):
            own = rows.assign(centroids)
            total = comm.sum(torch.cat([rows.sums.flatten(), rows.sizes, own[None]]))
            if report is not None:
                report(iteration, float(total[-1]) / n)
            if iteration < iterations:
                sums, sizes = total[: rows.sums.numel()].view_as(rows.sums), total[rows.sums.numel() : -1]
                centroids = _moved(centroids, sums, sizes, spherical, generator)
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

    Args:
        x: the rows.
        k: number K of clusters.
        spherical: whether to compare directions.
    """

    def __init__(self, x: Tensor, k: int, spherical: bool) -> None:
        self.x, self.spherical = x, spherical
        dtype = compute_dtype(x.dtype)
        self.labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.sums = torch.zeros(k, x.shape[1], dtype=torch.float64, device=x.device)
        self.sizes = self.sums.new_zeros(k)
        self.norms = torch.empty(len(x), dtype=dtype, device=x.device)
        for rows, block in blocks(x, x.shape[1]):
            self.norms[rows] = torch.linalg.vector_norm(block, dim=1)
        self.squares = self.norms.double().square().sum()
        self.lead = torch.full_like(self.norms, -torch.inf)  # of the best score before the second; at least
        self.centroids: Tensor | None = None

    def assign(self, centroids: Tensor) -> Tensor:
        """Assign the rows to centroids; return the sum of their squared distances, or of their cosines, in float64."""
        heights = torch.zeros_like(centroids[:, 0]) if self.spherical else centroids.square().sum(1) / 2
        first = self.centroids is None
        if self.centroids is not None:
            before, level = self.centroids, self.heights
            moved = torch.linalg.vector_norm(centroids - before, dim=1)
            lifted = (heights - level).abs()
            self.lead -= self.norms * (moved[self.labels] + moved.max()) + lifted[self.labels] + lifted.max()
        self.centroids, self.heights = centroids, heights
        # rounding errors of two scores
        doubt = 64 * torch.finfo(self.norms.dtype).eps * (self.norms * centroids.norm(dim=1).max() + heights.max())
        open_rows = (self.lead <= doubt).nonzero().flatten()
        old = self.labels.clone()
        self._search(open_rows)
        changed = open_rows if first else open_rows[self.labels[open_rows] != old[open_rows]]
        if first or 2 * len(changed) > len(self.x):
            self.sums, self.sizes = self._gathered(self.labels)
        else:
            for labels, sign in ((self.labels, 1), (old, -1)):
                sums, sizes = self._gathered(labels[changed], changed)
                self.sums += sign * sums
                self.sizes += sign * sizes
        along = (self.sums * centroids).sum()
        return along if self.spherical else self.squares - 2 * (along - (self.sizes * heights).sum())

    def _search(self, rows: Tensor) -> None:
        """Find the best centroid of some rows, and its lead."""
        assert self.centroids is not None
        columns, every = self.centroids.T.contiguous(), len(rows) == len(self.x)
        for part in score_blocks(len(rows), max(self.centroids.shape), self.x.device, least=256):
            chosen = part if every else rows[part]
            block = self.x[chosen].to(self.norms.dtype)
            scores = block @ columns if self.spherical else torch.addmm(-self.heights, block, columns)
            best, labels = scores.max(1)
            second = scores.scatter_(1, labels[:, None], -torch.inf).amax(1)
            self.labels[chosen], self.lead[chosen] = labels, best - second

    def _gathered(self, labels: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the sums and numbers of some rows of each cluster, None of all rows, in float64.

        float32 sums of rows far from the origin would move the centroids, by an error that depends on the blocks and on
        how processes share the rows, and that stays in a cluster which loses its rows.
        """
        sums = torch.zeros_like(self.sums)
        for part in score_blocks(len(labels), max(sums.shape), self.x.device, least=256):
            block = self.x[part if rows is None else rows[part]].double()
            # in the order of the labels, which needs no atomic additions
            order = labels[part].argsort(stable=True)
            bounds = torch.bincount(labels[part], minlength=len(sums)).cumsum(0)
            sums += F.embedding_bag(order, block, F.pad(bounds[:-1], (1, 0)), mode="sum")
        return sums, torch.bincount(labels, minlength=len(sums)).to(torch.float64)


def _moved(
    centroids: Tensor, sums: Tensor, sizes: Tensor, spherical: bool, generator: torch.Generator
) -> Float[Tensor, "K D"]:
    """Return the centroids of the next iteration."""
    filled = sizes[:, None] > 0
    means = (sums / sizes.clamp(min=1)[:, None]).to(centroids.dtype)
    if spherical:
        lengths = torch.linalg.vector_norm(means, dim=1, keepdim=True)
        return torch.where(filled & (lengths > 1e-12), means / lengths.clamp(min=1e-12), centroids)
    means = torch.where(filled, means, centroids)
    sizes = sizes.cpu()
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
