"""Labels of equal class sizes for a whole training set: optimal transport with an entropy term, by Sinkhorn and Knopp.

Asano, Rupprecht & Vedaldi, "Self-labelling via simultaneous clustering and representation learning" (ICLR 2020,
arXiv:1911.05371), eqs. 5-8. The published code iterates on ``P^λ``, which underflows. This one iterates on a matrix
that is rescaled whenever a class moves far, with the same labels after the same number of iterations. On the CPU the
entries that cannot count are left out, as in Schmitzer, "Stabilized sparse scaling algorithms for entropy regularized
transport problems" (SISC 2019, arXiv:1610.06519).
"""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from plugins.checks import NotFiniteError, check_count, check_range, check_whole, compute_dtype
from plugins.distributed import LOCAL, Collective

EVERY = 10
"""The error is measured in iterations 1, 11, 21, ..., as in the published code."""
ENTRIES = 2**17
"""Numbers in a block of rows on the CPU, which stays in the cache between two products; on a GPU 2^24."""
FAR, NEAR = 40.0, 4.0
"""The largest and the least limit of the change of f relative to another class, beyond which E is computed again."""
DENSITY = 0.25
"""The largest share of entries with which E is stored as two sparse matrices: with it they are as large as E."""


class BalancedLabels(NamedTuple):
    """The result of :func:`assign_balanced`."""

    labels: Int64[Tensor, " N"]
    """Class of each row of this process, in [0, K)."""
    iterations: int
    """Number of iterations."""
    error: float
    """Mean relative change of the rows' factors in the last iteration that was measured."""
    potentials: Float[Tensor, " K"]
    """f, float64: the label is the argmax of λ log p + f."""


def balanced_labels(
    log_probabilities: Float[Tensor, "N K"],
    *,
    lamb: float = 25.0,
    tol: float = 1e-5,
    max_iter: int = 1000,
    comm: Collective = LOCAL,
) -> Int64[Tensor, " N"]:
    """Assign n rows to K classes of about n / K rows each, so that the sum of their log-probabilities is large.

    The assignment is ``argmax_k Q_ik`` of the matrix ``Q = diag(c) P^λ diag(r)`` whose rows sum to 1 / n and columns to
    1 / K. With x = λ log P it is computed by, from ``g_i = -log n``::

        f_k ← -log K - log Σ_i exp(x_ik + g_i)        g_i ← -log n - log Σ_k exp(x_ik + f_k)

    until the mean of ``|exp(g_old - g) - 1|``, measured in every tenth iteration, is at most ``tol``.

    Args:
        log_probabilities: logarithms of the class probabilities of this process's rows. float64 iterates in float64,
            other dtypes in float32. A process may have no row.
        lamb: λ > 0. The assignment becomes the exact optimum of equal class sizes as λ grows.
        tol: of the error, ≥ 0. The published scripts stop at 0.1 / n or 0.01 / n.
        max_iter: largest number of iterations, ≥ 1.
        comm: the processes that share the rows. They exchange K numbers per iteration.

    Returns:
        The class of each row of this process. The labels do not depend on how the rows are shared.

    Raises:
        ValueError: not a matrix of floating-point numbers with a column, a number out of range, or no row anywhere.
        NotFiniteError: a number is NaN or inf, on any process.

    Reference:
        arXiv:1911.05371, eqs. 5-8. Memory: the matrix once more, in its dtype, or the entries that count if they are
        at most a quarter.

    >>> balanced_labels(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]).log())
    tensor([0, 0, 1, 1])
    """
    return assign_balanced(log_probabilities, lamb=lamb, tol=tol, max_iter=max_iter, comm=comm).labels


@torch.no_grad()
def assign_balanced(
    log_probabilities: Float[Tensor, "N K"],
    *,
    lamb: float = 25.0,
    tol: float = 1e-5,
    max_iter: int = 1000,
    comm: Collective = LOCAL,
    report: Callable[[int, float], None] | None = None,
) -> BalancedLabels:
    """Return :func:`balanced_labels` with the number of iterations, the error and the classes' potentials.

    Args:
        log_probabilities, lamb, tol, max_iter, comm: as in :func:`balanced_labels`.
        report: called with the number of iterations and the error whenever the error is measured.
    """
    check_range("lamb", lamb, low=1e-6)
    check_range("tol", tol, low=0.0)
    check_whole("max_iter", max_iter, low=1)
    n = _check(log_probabilities, comm)
    with torch.autocast(log_probabilities.device.type, enabled=False):
        matrix = _Scaled(log_probabilities, lamb, n, comm)
        iteration, error = 0, math.inf
        while True:
            measured = iteration % EVERY == 0
            change = matrix.iterate(measured)
            iteration += 1
            if measured:
                error = float(comm.sum(change)) / n
                if report is not None:
                    report(iteration, error)
            if error <= tol or iteration >= max_iter:
                return BalancedLabels(matrix.labels(), iteration, error, matrix.potentials())


def _check(log_probabilities: Tensor, comm: Collective) -> int:
    """Check the matrix on all processes together; return the number of rows of all."""
    x = log_probabilities
    usable = isinstance(x, Tensor) and x.ndim == 2 and x.is_floating_point() and x.shape[1] > 0
    if not usable:
        given = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"log_probabilities must be a matrix [N, K] of floating-point numbers, got {given}")
    # the sum of finite numbers can overflow, the largest and the least cannot
    broken = x.numel() > 0 and not all(bool(end.isfinite()) for end in x.aminmax())
    rows, faults = comm.sum(torch.tensor([len(x), int(broken)], device=x.device)).tolist()
    check_count(rows, least=1, what="a balanced assignment")
    if faults:
        raise NotFiniteError("a balanced assignment needs finite log-probabilities, got NaN or inf")
    return rows


class _Scaled:
    """``E = n exp(x + f0 + g0)`` with the factors u = exp(f - f0) and v = exp(g - g0). The rows of E sum to 1.

    Entries below ``θ = ε exp(-limit) / K``, times the sum of their row, are left out; ε is the precision of the dtype.

    * While the changes f - f0 of any two classes differ by at most the limit, such an entry is at most ε / K of the sum
      of its row, and all of them at most ε.
    * A column whose next step multiplies it by exp(s) has the sum n / K exp(-s). What it lacks is at most ε of it while
      the difference and s together are at most the limit.
    * The steps do not grow from one iteration to the next, so the last step bounds the next one.
    * After the differences have become at most m, the entries left out are at most ``ε exp(m - limit) / K``. A new
      limit of at most limit - m needs none of them, and is applied to the stored entries alone.
    """

    def __init__(self, log_probabilities: Tensor, lamb: float, n: int, comm: Collective) -> None:
        self.x, self.lamb, self.n, self.comm = log_probabilities, lamb, n, comm
        self.dtype, self.classes = compute_dtype(log_probabilities.dtype), log_probabilities.shape[1]
        self.f = log_probabilities.new_zeros(self.classes, dtype=torch.float64)
        self.g = log_probabilities.new_full(log_probabilities.shape[:1], -math.log(n), dtype=torch.float64)
        self.u: Tensor | None = None  # None: f has not been computed
        self.sums = self.seen = self.f
        self.limit, self.slow = FAR, True
        self.stored: _Dense | _Sparse | None = None
        capacity = ENTRIES if log_probabilities.device.type == "cpu" else 2**24
        size = max(capacity // self.classes, 1)
        self.blocks = [slice(start, start + size) for start in range(0, len(log_probabilities), size)]

    def iterate(self, measured: bool) -> Tensor:
        """Make one iteration; return the sum of |exp(g_old - g) - 1| of this process's rows if it is measured."""
        if self.u is None or self.stored is None:
            self.f = self._balanced()
            return self._rescale(measured)
        u = 1 / (self.classes * self.sums)
        step, span = (u / self.u).max().log().item(), (u.max() / u.min()).log().item()
        if step + span <= self.limit:
            self.u = u
            change = self.stored.iterate(u.to(self.dtype), measured)
            self.sums = self.comm.sum(self.stored.sums) / self.n
            if measured:
                self._tighten()
            return change
        self.slow = self.limit == FAR
        self.g += self.stored.log_factors()
        if step <= self.limit:  # the sums are exact enough
            self.f, self.limit = self.f + u.log(), min(2 * self.limit, FAR)
        else:
            self.f, self.limit = self._balanced(), FAR
        return self._rescale(measured)

    def _tighten(self) -> None:
        """Leave out more entries when the potentials have become slow, unless they then left such a limit."""
        f = self.potentials()
        low, high = (f - self.seen).aminmax()
        change, self.seen = (high - low).item(), f
        if self.stored is None or self.u is None or not self.slow or max(2 * change, NEAR) > self.limit / 2:
            return
        room, limit = self.limit - (self.u.max() / self.u.min()).log().item(), max(2 * change, NEAR)
        stored = max(1.5 * change, NEAR) <= room  # a somewhat narrower limit saves a search of the whole matrix
        u, self.g = self.u.to(self.dtype), self.g + self.stored.log_factors()
        self.f, self.limit = f, min(limit, room) if stored else limit
        if isinstance(self.stored, _Sparse) and stored:
            names, rows, columns = self.stored.above(u, math.exp(-self._depth()))
            self._store(self._sparse(names, rows, columns, self.g + math.log(self.n)))
        else:
            self._rescale(False)

    def _balanced(self) -> Tensor:
        """Compute f from g."""
        columns = [torch.logsumexp(x + self.g[block, None], 0) for block, x in self._scores()]
        empty = self.f.new_full((self.classes,), -math.inf)
        own = torch.stack([empty, *columns]).logsumexp(0)
        return -math.log(self.classes) - self.comm.gather_rows(own[None]).logsumexp(0)

    def _rescale(self, measured: bool) -> Tensor:
        """Compute g and E from f; return the change of g if it is measured."""
        old = self.g.clone() if measured else self.g
        self._store(self._selected() or self._dense())
        return (old - self.g).expm1().abs().sum() if measured else self.f[0]

    def _store(self, stored: "_Dense | _Sparse") -> None:
        self.u, self.stored = torch.ones_like(self.f), stored
        self.sums = self.comm.sum(stored.sums) / self.n

    def _depth(self) -> float:
        """Return -log θ."""
        return self.limit + math.log(self.classes / torch.finfo(self.dtype).eps)

    def _dense(self) -> "_Dense":
        entries, depth = torch.empty(self.x.shape, dtype=self.dtype, device=self.x.device), self._depth()
        for block, x in self._scores():
            x += self.f
            scale = x.logsumexp(1)
            self.g[block] = -math.log(self.n) - scale
            part = x.sub_(scale[:, None])
            entries[block] = part.exp().masked_fill_(part < -depth, 0)
        return _Dense(entries, self.blocks)

    def _selected(self) -> "_Sparse | None":
        """Return None if the matrix is not on the CPU, or too many entries remain."""
        if self.x.device.type != "cpu" or not torch.backends.mkl.is_available() or not len(self.x):
            return None
        x, f = self.x.to(self.dtype), self.f.to(self.dtype)
        size = max(float(self.f.abs().max()), self.lamb * float(torch.stack(x.aminmax()).abs().max()))
        depth = self._depth() + 8 * torch.finfo(self.dtype).eps * size  # rounding errors of the comparison
        found, tops, left = [], [], min(DENSITY * x.numel(), 2**31 - 1)
        for block in self.blocks:
            scores = torch.add(f, x[block], alpha=self.lamb)
            top = scores.amax(1, keepdim=True)  # at most the logarithm of the sum of the row
            found.append((scores > top - depth).flatten().nonzero().flatten().add_(block.start * self.classes))
            tops.append(top)
            left -= len(found[-1])
            if left < 0:
                return None
        place = torch.cat(found)
        rows = place.div(self.classes, rounding_mode="floor")
        names = torch.arange(len(x))
        return self._sparse(names, rows, place - rows * self.classes, -torch.cat(tops).flatten().double())

    def _sparse(self, names: Tensor, rows: Tensor, columns: Tensor, scale: Tensor) -> "_Sparse":
        """Compute entries of the rows ``names[rows]``, and g. ``exp(x + f + scale)`` must not over- or underflow."""
        # index_select is five times faster than an index in brackets
        own = names.index_select(0, rows)
        values = self.x.flatten().index_select(0, own * self.classes + columns).double().mul_(self.lamb)
        values += self.f.index_select(0, columns)
        values += scale.index_select(0, own)
        values = values.to(self.dtype).exp_()
        totals = torch.bincount(own, values.double(), len(self.x))
        self.g = scale - math.log(self.n) - totals.log()
        values /= totals.to(self.dtype).index_select(0, own)
        return _Sparse(names, rows, columns, values, self.classes)

    def _scores(self) -> Iterator[tuple[slice, Tensor]]:
        for block in self.blocks:
            yield block, self.x[block].double() * self.lamb

    def potentials(self) -> Tensor:
        """Return f."""
        return self.f if self.u is None else self.f + self.u.log()

    def labels(self) -> Tensor:
        """Return the argmax of x + f in each row, the first one of equal numbers."""
        f = self.potentials()
        if isinstance(self.stored, _Sparse):
            rows, columns = self.stored.positions()
            scores = self.x.flatten().index_select(0, rows * self.classes + columns).double().mul_(self.lamb)
            scores += f.index_select(0, columns)
            best = scores.new_full((len(self.x),), -math.inf).scatter_reduce_(0, rows, scores, "amax")
            columns.masked_fill_(scores < best.index_select(0, rows), self.classes)
            return columns.new_full((len(self.x),), self.classes).scatter_reduce_(0, rows, columns, "amin")
        found = [(x + f).argmax(1) for _, x in self._scores()]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=self.x.device)


class _Dense:
    """All entries. Each block of rows is read once per iteration: it gives v, and its share of the column sums."""

    def __init__(self, entries: Tensor, blocks: list[slice]) -> None:
        self.v = entries.new_ones(len(entries))
        partial = entries.new_empty(len(blocks), entries.shape[1])
        # entries, their transpose, v and column sums of each block: making these views took a sixth of an iteration
        self.views = [
            (entries[block], entries[block].T, self.v[block], each) for block, each in zip(blocks, partial, strict=True)
        ]
        for own, _, _, each in self.views:
            torch.sum(own, 0, out=each)
        self.partial, self.sums = partial, partial.sum(0, dtype=torch.float64)

    def iterate(self, u: Tensor, measured: bool) -> Tensor:
        """Compute v and the column sums; return the sum of the relative changes of v if it is measured."""
        old = self.v.clone() if measured else self.v
        for entries, columns, v, partial in self.views:
            torch.mv(entries, u, out=v).reciprocal_()
            torch.mv(columns, v, out=partial)
        self.sums = self.partial.sum(0, dtype=torch.float64)
        return (old.double() / self.v - 1).abs().sum() if measured else self.sums[0]

    def log_factors(self) -> Tensor:
        """Return log v."""
        return self.v.double().log()


class _Sparse:
    """Some entries, by rows and by columns.

    Rows with equally many entries follow each other. In another order the branches of the product are not predicted,
    which made it four times slower.
    """

    def __init__(self, names: Tensor, rows: Tensor, columns: Tensor, values: Tensor, classes: int) -> None:
        counts = torch.bincount(rows, minlength=len(names))
        # integers of few bits are sorted faster
        small = torch.uint8 if classes < 256 else torch.int32
        counts = counts.to(small)
        order = counts.argsort(stable=True)
        by_row = counts.index_select(0, rows).argsort(stable=True)
        rank = torch.empty_like(order, dtype=torch.int32)
        rank[order] = torch.arange(len(names), dtype=torch.int32)
        rows = rank.index_select(0, rows.index_select(0, by_row))
        columns, values = columns.index_select(0, by_row).int(), values.index_select(0, by_row)
        by_column = columns.to(small).argsort(stable=True)
        self.names, self.rows, self.columns = names[order], rows, columns
        self.by_rows = _compressed(counts[order].long(), columns, values, (len(names), classes))
        across = rows.index_select(0, by_column), values.index_select(0, by_column)
        self.by_columns = _compressed(torch.bincount(columns, minlength=classes), *across, (classes, len(names)))
        self.v = values.new_ones(len(names))
        self.sums = torch.mv(self.by_columns, self.v).double()

    def iterate(self, u: Tensor, measured: bool) -> Tensor:
        """Compute v and the column sums; return the sum of the relative changes of v if it is measured."""
        old, self.v = self.v, torch.mv(self.by_rows, u).reciprocal_()
        self.sums = torch.mv(self.by_columns, self.v).double()
        return (old.double() / self.v - 1).abs().sum() if measured else self.sums[0]

    def log_factors(self) -> Tensor:
        """Return log v, in the order of the rows of the matrix."""
        result = self.v.new_empty(len(self.v), dtype=torch.float64)
        result[self.names] = self.v.double().log()
        return result

    def above(self, u: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the names of the rows, and row and column of each entry above a number, times the factors."""
        shares = self.by_rows.values() * u.index_select(0, self.columns)
        kept = (shares.mul_(self.v.index_select(0, self.rows)) > least).nonzero().flatten()
        return self.names, self.rows.index_select(0, kept).long(), self.columns.index_select(0, kept).long()

    def positions(self) -> tuple[Tensor, Tensor]:
        """Return the row and the column of each entry."""
        return self.names.index_select(0, self.rows), self.columns.long()


def _compressed(counts: Tensor, indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Build a matrix from the numbers of entries of its rows, and the columns and values of the entries."""
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")  # that the format is new
        return torch.sparse_csr_tensor(starts, indices, values, shape, check_invariants=False)
