"""Labels of equal class sizes for a whole training set: optimal transport with an entropy term, by Sinkhorn and Knopp.

Asano, Rupprecht & Vedaldi, "Self-labelling via simultaneous clustering and representation learning" (ICLR 2020,
arXiv:1911.05371), eqs. 5-8. The published code iterates on ``P^λ``, which underflows. This one iterates on a matrix
that is rescaled whenever a class moves far, with the same labels after the same number of iterations.
"""

import math
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
DRIFT = {torch.float32: 20.0, torch.float64: 200.0}
"""The largest logarithm of a factor; beyond it the matrix is rescaled. Products of two factors do not overflow."""
LEAST = {torch.float32: 1e-28, torch.float64: 1e-200}
"""Entries of the matrix below it are 0. They do not count beside the factors, and subnormal products are slow."""


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
        arXiv:1911.05371, eqs. 5-8. Memory: the matrix once more, in its dtype.

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
    """``E = n exp(x + f0 + g0)`` with the factors u = exp(f - f0) and v = exp(g - g0).

    The rows of E sum to 1, so that ``v_i = 1 / (E_i u)`` is between the extremes of 1 / u. Each block of rows is read
    once per iteration: it gives v, and its share of the next column sums Σ_i E_ik v_i.
    """

    def __init__(self, log_probabilities: Tensor, lamb: float, n: int, comm: Collective) -> None:
        self.x, self.lamb, self.n, self.comm = log_probabilities, lamb, n, comm
        self.dtype, self.classes = compute_dtype(log_probabilities.dtype), log_probabilities.shape[1]
        self.entries = torch.empty(log_probabilities.shape, dtype=self.dtype, device=log_probabilities.device)
        self.f = log_probabilities.new_zeros(self.classes, dtype=torch.float64)
        self.g = log_probabilities.new_full(log_probabilities.shape[:1], -math.log(n), dtype=torch.float64)
        self.u: Tensor | None = None  # None: the potentials are f and g, and E has not been computed for them
        self.sums = self.f  # of the columns, Σ_i E_ik v_i / n
        self.v = torch.empty_like(self.g, dtype=self.dtype)
        capacity = ENTRIES if log_probabilities.device.type == "cpu" else 2**24
        size = max(capacity // self.classes, 1)
        self.blocks = [slice(start, start + size) for start in range(0, len(log_probabilities), size)]
        self.partial = self.entries.new_empty(len(self.blocks), self.classes)  # column sums of the blocks
        # entries, their transpose, v and column sums of each block: making these views took a sixth of an iteration
        self.views = [
            (self.entries[block], self.entries[block].T, self.v[block], partial)
            for block, partial in zip(self.blocks, self.partial, strict=True)
        ]

    def iterate(self, measured: bool) -> Tensor:
        """Make one iteration; return the sum of |exp(g_old - g) - 1| of this process's rows if it is measured."""
        if self.u is not None:
            u = 1 / (self.classes * self.sums)
            if bool((u.log().abs() <= DRIFT[self.dtype]).all()):
                return self._products(u, measured)
            self.g += self.v.double().log()  # as far as the last iteration came
        return self._logarithms()

    def _products(self, u: Tensor, measured: bool) -> Tensor:
        old = self.v.clone() if measured else self.v
        self.u, factors = u, u.to(self.dtype)
        for entries, columns, v, partial in self.views:
            torch.mv(entries, factors, out=v).reciprocal_()
            torch.mv(columns, v, out=partial)
        self.sums = self._joined()
        return (old.double() / self.v - 1).abs().sum() if measured else self.f[0]

    def _logarithms(self) -> Tensor:
        """Iterate on the potentials, and compute E for them."""
        columns = [torch.logsumexp(x + self.g[block, None], 0) for block, x in self._scores()]
        empty = self.f.new_full((self.classes,), -math.inf)
        own = torch.stack([empty, *columns]).logsumexp(0)
        self.f = -math.log(self.classes) - self.comm.gather_rows(own[None]).logsumexp(0)
        change = self.f.new_zeros(())
        for partial, (block, x) in zip(self.partial, self._scores(), strict=True):
            x = x + self.f
            scale = -math.log(self.n) - x.logsumexp(1)
            change += (self.g[block] - scale).expm1().abs().sum()
            self.g[block] = scale
            entries = x.add_(scale[:, None] + math.log(self.n)).exp_()
            self.entries[block] = entries.masked_fill_(entries < LEAST[self.dtype], 0)
            torch.sum(self.entries[block], 0, out=partial)
        self.v.fill_(1)
        self.u, self.sums = torch.ones_like(self.f), self._joined()
        return change

    def _joined(self) -> Tensor:
        """Add the column sums of blocks, and those of all processes."""
        return self.comm.sum(self.partial.sum(0, dtype=torch.float64)) / self.n

    def _scores(self) -> Iterator[tuple[slice, Tensor]]:
        for block in self.blocks:
            yield block, self.x[block].double() * self.lamb

    def potentials(self) -> Tensor:
        """Return f."""
        return self.f if self.u is None else self.f + self.u.log()

    def labels(self) -> Tensor:
        """Return the argmax of x + f in each row, the first one of equal numbers."""
        f = self.potentials()
        found = [(x + f).argmax(1) for _, x in self._scores()]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=self.x.device)
