"""Linear algebra shared by losses and logging.

Centring over all processes, covariance or Gram matrix by cost, spectra, matrix functions and their derivatives, and
analytic gradients.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from plugins.checks import check_count, check_finite, check_range, check_whole, compute_dtype
from plugins.distributed import LOCAL, Collective

FORMS = ("auto", "covariance", "gram")
LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]


CPU_SCORES, GPU_SCORES = 2**20, 2**26
"""Number of scores of a block of :func:`score_blocks`."""


def gram_is_cheaper(rows: int, width: int) -> bool:
    """Return whether ``S S^T`` (rows x rows) needs less computation and communication than ``S^T S`` (width x width).

    Args:
        rows: number of rows of S over all processes, and over both views if views are stacked.
        width: number of columns of S.

    >>> gram_is_cheaper(rows=512, width=2048), gram_is_cheaper(rows=512, width=512)
    (True, False)
    """
    return rows < width


def squared_norm(matrix: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Sum the squared entries in one pass, without a temporary of the size of the matrix.

    >>> squared_norm(torch.tensor([[1.0, 2.0], [0.0, 2.0]])).item()
    9.0
    """
    return torch.linalg.vector_norm(matrix).square()


def joined_mean(values: Float[Tensor, " B *C"], comm: Collective = LOCAL) -> Float[Tensor, " *C"]:
    """Average one number per row, or C numbers, over the rows of all processes; the numbers of rows may differ.

    Differentiable by the rule of :mod:`plugins.distributed`. It communicates C + 1 floats and does not synchronise with
    the device.

    Args:
        values: the numbers of the rows of this process.
        comm: the processes that share the batch.

    Raises:
        ValueError: there is no row on any process.

    >>> joined_mean(torch.tensor([1.0, 2.0, 6.0])).item()
    3.0
    """
    if comm.size == 1:
        check_count(values.shape[0], least=1, what="a batch mean")
        return values.mean(0)
    total = comm.sum(torch.cat([values.sum(0).flatten(), values.new_tensor([values.shape[0]])]))
    if values.shape[0] == 0:  # the joined batch can be empty only in this case, so only this case synchronises
        check_count(int(total[-1].item()), least=1, what="a batch mean")
    return (total[:-1] / total[-1]).view(values.shape[1:])


def joined_sums(parts: Sequence[Tensor], comm: Collective = LOCAL) -> list[Tensor]:
    """Sum several tensors of one dtype over the processes, with one collective.

    >>> [part.tolist() for part in joined_sums([torch.tensor([1.0, 2.0]), torch.tensor(3.0)])]
    [[1.0, 2.0], 3.0]
    """
    if comm.size == 1:
        return [*parts]
    sums = comm.sum(torch.cat([part.flatten() for part in parts])).split([part.numel() for part in parts])
    return [summed.view_as(part) for summed, part in zip(sums, parts, strict=True)]


def labelled_mean(
    values: Float[Tensor, " B *C"], labelled: Bool[Tensor, " B *C"], comm: Collective = LOCAL
) -> Float[Tensor, " *C"]:
    """Average numbers over the rows of all processes that have a label; 0 if none has one. See :func:`joined_mean`.

    Args:
        values: the numbers of the rows of this process.
        labelled: whether each of them counts. The others have the gradient 0.
        comm: the processes that share the batch.

    >>> labelled_mean(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, True, False])).item()
    1.5
    """
    weights = labelled.to(values.dtype)
    # a product, in which NaN shows, also that of a row without a label
    sums, counts = comm.sum(torch.stack([(values * weights).sum(0), weights.sum(0)]))
    return sums / counts.clamp(min=1)


def standardized_rows(
    z: Float[Tensor, "*V B D"],
    comm: Collective = LOCAL,
    *,
    what: str = "a covariance",
    overwrite: bool = False,
    unbiased: bool = True,
) -> tuple[Float[Tensor, "*V B D"], float | Float[Tensor, ""]]:
    """Return S, the rows minus the joined column means times ``1 / sqrt(N - 1)``: ``S^T S`` is the unbiased covariance.

    The rows are scaled before any product, so that no sum over rows grows with N. The mean is subtracted before
    squaring, which preserves a small variance next to a large mean. The result has no gradient: a joined mean applied
    to local rows would break the rule of :mod:`plugins.distributed`.

    Args:
        z: rows of this process, for each view.
        comm: the processes that share the batch.
        what: the quantity that needs two rows, for the error message.
        overwrite: write S into z, which no other code may use then. Allocating memory takes longer than the sums.
        unbiased: False divides by N instead of N - 1.

    Returns:
        S and the factor ``1 / sqrt(N - 1)``, which is a tensor if there are several processes.

    Raises:
        ValueError: there are fewer than two rows over all processes.

    >>> s, factor = standardized_rows(torch.tensor([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0], [7.0, 5.0], [9.0, 5.0]]))
    >>> s.square().sum(0), factor
    (tensor([10.,  0.]), 0.5)
    """
    z = z.detach()
    rows = z.shape[-2]
    if comm.size == 1:
        check_count(rows, least=2, what=what)
        factor = (rows - int(unbiased)) ** -0.5
        mean = z.mean(-2, keepdim=True)
        return (z.sub_(mean) if overwrite else z - mean).mul_(factor), factor
    total = comm.sum(torch.cat([z.sum(-2).flatten(), z.new_tensor([rows])]))
    if rows < 2:  # the joined batch can be too small only in this case, so only this case synchronises
        check_count(int(total[-1].item()), least=2, what=what)
    mean = (total[:-1] / total[-1]).unflatten(0, z.shape[:-2] + z.shape[-1:]).unsqueeze(-2)
    factor = (total[-1] - int(unbiased)).rsqrt()
    return (z.sub_(mean) if overwrite else z - mean).mul_(factor), factor


def split_square(z: Float[Tensor, "V N D"], *, form: str = "auto") -> Float[Tensor, ""]:
    """Estimate ``||V||_F^2`` without bias as tr(V_a V_b) of two half batches; V is the sum of the views' covariances.

    The halves are the rows with even and with odd index. Mean and divisor are computed separately for each half.

    Args:
        z: rows of all processes, with the same samples in each view.
        form: "covariance", "gram", or "auto" for the cheaper one. The value is the same.

    Raises:
        ValueError: there are fewer than four rows.

    >>> split_square(torch.tensor([[[1.0], [2.0], [-1.0], [-2.0]]])).item()  # variances 2 and 8
    16.0
    """
    _, rows, width = z.shape
    check_count(rows, least=4, what="an estimate from two halves")
    halves = [z[:, part::2] for part in (0, 1)]
    a, b = ((h - h.mean(1, keepdim=True)).flatten(0, 1) * (h.shape[1] - 1) ** -0.5 for h in halves)
    if form == "gram" or (form == "auto" and gram_is_cheaper(a.shape[0], 2 * width)):
        return (a @ b.T).square().sum()
    return ((a.T @ a) * (b.T @ b)).sum()


def ustat_square(z: Float[Tensor, "V N D"], *, form: str = "auto") -> Float[Tensor, ""]:
    """Estimate ``||V||_F^2`` without bias by the U-statistic of order four; V is the sum of the views' covariances.

    It is the mean, over all ordered quadruples of distinct rows i, j, k, l, of
    sum_uv ((u_i - u_j) . (v_k - v_l))^2 / 4, where u and v run over the views. After centring it is computed from power
    sums of the blocks G_uv = u v^T, at the cost of the biased estimate.

    Args:
        z: rows of all processes, with the same samples in each view.
        form: "covariance", "gram", or "auto" for the cheaper one. The value is the same.

    Raises:
        ValueError: there are fewer than four rows.

    >>> z = torch.tensor([[[1.0], [2.0], [-1.0], [-2.0]]])
    >>> round(ustat_square(z).item(), 4)  # ((1 * 1)^2 + (2 * 4)^2 + (3 * 3)^2) / 4 / 3
    12.1667
    """
    views, n, width = z.shape
    check_count(n, least=4, what="a U-statistic of order four")
    z = (z - z.mean(1, keepdim=True)) * (n - 1) ** -0.5
    if form == "gram" or (form == "auto" and gram_is_cheaper(n, width)):
        stacked = z.flatten(0, 1)
        blocks = (stacked @ stacked.T).unflatten(1, (views, n)).unflatten(0, (views, n))
        square = blocks.square().sum()
    else:
        beside = z.transpose(0, 1).flatten(1)
        blocks = (beside.T @ beside).unflatten(1, (views, width)).unflatten(0, (views, width))
        square = blocks.diagonal(dim1=0, dim2=2).sum(-1).square().sum()
    turned = (blocks * blocks.transpose(1, 3)).sum()
    products = (z.unsqueeze(0) * z.unsqueeze(1)).sum(-1)  # u_i . v_i, [V, V, N]
    diagonal, traces = products.square().sum(), products.sum(-1).square().sum()
    pairs = square - diagonal
    triples = 2 * (square - 2 * diagonal) / (n - 2)
    quadruples = (traces - 6 * diagonal + square + turned) / ((n - 2) * (n - 3))
    return (pairs + triples + quadruples) * (n - 1) / n  # the rows carry 1 / sqrt(n - 1)


@torch.no_grad()
def covariance_eigenvalues(z: Float[Tensor, "B D"], comm: Collective = LOCAL) -> Float[Tensor, " R"]:
    """Compute the eigenvalues of the covariance of the joined rows, ascending, for logging; without gradient.

    They are computed from the smaller of covariance and Gram matrix. The result has D values, or N values if N < D
    (the others are zero).

    Args:
        z: rows of this process.
        comm: the processes that share the batch.

    Raises:
        ValueError: there are fewer than two rows over all processes, or z contains NaN or inf.

    >>> covariance_eigenvalues(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, -3.0]]))
    tensor([0.6667, 6.0000])
    """
    check_finite("a spectrum", z=z)  # synchronises with the device, as the solver does
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32)
        counts = comm.row_counts(z.shape[0], z.device)
        if gram_is_cheaper(sum(counts), z.shape[1]):
            s, _ = standardized_rows(comm.gather_rows(z, counts=counts))
            matrix = s @ s.T
        else:
            s, _ = standardized_rows(z, comm)
            matrix = comm.sum(s.T @ s)
        return eigvalsh(matrix).clamp_min(0)


def participation_ratio(eigenvalues: Float[Tensor, " D"]) -> Float[Tensor, ""]:
    """Compute the participation ratio ``(sum s)^2 / sum s^2``: 1 (one mode) to D (equal modes); 0 without variance.

    Args:
        eigenvalues: of a covariance or second moment, in any order and scale; negative ones count as zero.

    >>> participation_ratio(torch.tensor([2.0, 2.0, 0.0, 0.0])).item()
    2.0
    """
    share = _shares(eigenvalues)
    square = share.square().sum()
    return torch.where(square > 0, 1 / square.clamp_min(torch.finfo(square.dtype).tiny), 0)


def effective_rank(eigenvalues: Float[Tensor, " D"]) -> Float[Tensor, ""]:
    """Compute the exponential of the spectrum's entropy: 1 (one mode) to D (equal modes); 0 without variance.

    Args:
        eigenvalues: of a covariance or second moment, in any order and scale; negative ones count as zero.

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0, 0.0])).item(), 4)
    2.0
    """
    share = _shares(eigenvalues)
    return torch.where(share.sum() > 0, torch.special.entr(share).sum().exp(), 0)


def spectrum_statistics(eigenvalues: Float[Tensor, " D"]) -> dict[str, Tensor]:
    """Summarise a spectrum for logging: eigval_min, eigval_max, eigval_mean, eigval_std and part_ratio.

    Args:
        eigenvalues: of a covariance or second moment, in any order.

    >>> {name: round(value.item(), 3) for name, value in spectrum_statistics(torch.tensor([3.0, 1.0])).items()}
    {'eigval_min': 1.0, 'eigval_max': 3.0, 'eigval_mean': 2.0, 'eigval_std': 1.414, 'part_ratio': 1.6}
    """
    return {
        "eigval_min": eigenvalues.min(),
        "eigval_max": eigenvalues.max(),
        "eigval_mean": eigenvalues.mean(),
        "eigval_std": eigenvalues.std(),
        "part_ratio": participation_ratio(eigenvalues),
    }


def _shares(eigenvalues: Tensor) -> Tensor:
    """Divide eigenvalues by their sum. The largest is divided out first, which avoids overflow and underflow."""
    positive = eigenvalues.clamp_min(0)
    relative = positive / positive.max().clamp_min(torch.finfo(positive.dtype).tiny)
    return relative / relative.sum().clamp_min(torch.finfo(positive.dtype).tiny)


def unit_rows(z: Float[Tensor, "*V B D"]) -> tuple[Float[Tensor, "*V B D"], Float[Tensor, "*V B 1"]]:
    """Return rows of unit length and the inverse norms; both are 0 for a row with a norm of at most 1e-12.

    Args:
        z: rows; they are detached. :func:`tangent` converts the gradient.

    >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))[0]
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    z = z.detach()
    lengths = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    inverse = torch.where(lengths > 1e-12, 1 / lengths, 0)
    return z * inverse, inverse


def directions(z: Float[Tensor, "*V B D"]) -> Float[Tensor, "*V B D"]:
    """Normalise rows to unit length, with gradient. A row with a norm of at most 1e-8 becomes 0 and has no gradient.

    >>> directions(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    lengths = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return z / torch.where(lengths > 1e-8, lengths, torch.inf)


def row_blocks(rows: Tensor) -> list[slice]:
    """Split rows into blocks whose products with all rows fit the cache, so that memory is linear in the rows.

    >>> row_blocks(torch.zeros(600, 2))
    [slice(0, 512, None), slice(512, 600, None)]
    """
    count, size = len(rows), 512 if rows.device.type == "cpu" else 8192
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def score_blocks(rows: int, columns: int, device: torch.device, *, least: int = 16, multiple: int = 1) -> list[slice]:
    """Split rows into blocks of about as many scores with all columns as fit the cache, and of ``least`` rows or more.

    The number of rows of a block, except for the last one, is a multiple of ``multiple``, a divisor of ``least``.

    >>> score_blocks(20_000, 6272, torch.device("cpu"))[:2]
    [slice(0, 167, None), slice(167, 334, None)]
    >>> score_blocks(20_000, 6272, torch.device("cpu"), multiple=16)[:2]
    [slice(0, 160, None), slice(160, 320, None)]
    """
    size = max((CPU_SCORES if device.type == "cpu" else GPU_SCORES) // max(columns, 1), least)
    size -= size % multiple
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def tangent(
    gradient: Float[Tensor, "*V B D"], unit: Float[Tensor, "*V B D"], inverse: Float[Tensor, "*V B 1"]
) -> Float[Tensor, "*V B D"]:
    """Convert the gradient with respect to unit rows u into that with respect to z: ``(g - (g . u) u) / |z|``.

    Args:
        gradient: gradient with respect to the unit rows; it is overwritten.
        unit: first result of :func:`unit_rows`.
        inverse: second result of :func:`unit_rows`.

    >>> unit, inverse = unit_rows(torch.tensor([[2.0, 0.0]]))
    >>> tangent(torch.tensor([[5.0, 1.0]]), unit, inverse)
    tensor([[0.0000, 0.5000]])
    """
    along = (gradient * unit).sum(-1, keepdim=True)
    return gradient.addcmul_(along, unit, value=-1).mul_(inverse)


@torch.no_grad()
def sinkhorn_codes(
    scores: Float[Tensor, "*V B K"], *, epsilon: float = 0.05, iterations: int = 3, comm: Collective = LOCAL
) -> Float[Tensor, "*V B K"]:
    """Assign rows to prototypes such that all prototypes get about the same number of rows (Sinkhorn and Knopp).

    ``Q = diag(a) exp(scores / ε) diag(b)``. Each iteration scales the columns such that each prototype has the mass
    N / K, then the rows such that each sums to 1. After it, the rows sum to 1 exactly, the columns approximately. Only
    the vectors a and b are iterated. Each row is shifted by its largest score, so that no row underflows. In float32,
    a prototype gets less than its share if its mass is below 1e-32 of the largest.

    Args:
        scores: of the rows of this process with K prototypes, for each view; detached. Views are assigned separately.
        epsilon: ε > 0, in the unit of the scores; a small one makes the assignments hard.
        iterations: number of iterations, >= 1.
        comm: the processes that share the batch; they exchange K numbers per view and iteration.

    Returns:
        The assignments Q, float32 (float64 for float64 input), without gradient.

    Raises:
        ValueError: ``epsilon`` or ``iterations`` is out of range.

    Reference:
        SwAV, arXiv:2006.09882, section 3.1 and appendix A.

    >>> sinkhorn_codes(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).tolist()  # no row is nearer to the second prototype
    [[0.5, 0.5], [0.5, 0.5]]
    """
    check_range("epsilon", epsilon, low=1e-6)
    check_whole("iterations", iterations, low=1)
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.detach().to(compute_dtype(scores.dtype))
        top = scores.amax(-1, keepdim=True)
        kernel = (scores - top).div_(epsilon).exp_()
        largest = torch.cat([top, torch.full_like(top.sum(-2, keepdim=True), -torch.inf)], -2).amax(-2, keepdim=True)
        if comm.size > 1:
            largest = comm.gather_rows(largest.unsqueeze(0), counts=[1] * comm.size).amax(0)
        a = (top - largest).div_(epsilon).exp_()
        least = 1e6 * torch.finfo(a.dtype).tiny  # in units of the largest mass: the sum of K inverses must be finite
        b = rows = a
        for _ in range(iterations):
            mass = comm.sum(a.mT @ kernel)
            # the scale of b is arbitrary; with b >= 1 neither a nor the mass can grow from iteration to iteration
            b = 1 / (mass / mass.amax(-1, keepdim=True)).clamp_min(least)
            rows = kernel @ b.mT
            a = 1 / rows
        return kernel.mul_(b).div_(rows)


def pack_symmetric(a: Float[Tensor, "*V D D"], b: Float[Tensor, "*V D D"]) -> Float[Tensor, "*V E D"]:
    """Pack two symmetric matrices into one matrix and a row, to halve communication: one above the diagonal, one below.

    >>> pack_symmetric(torch.tensor([[1.0, 2.0], [2.0, 3.0]]), torch.tensor([[4.0, 5.0], [5.0, 6.0]]))
    tensor([[1., 2.],
            [5., 3.],
            [4., 6.]])
    """
    return torch.cat([a.triu() + b.tril(-1), b.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)], -2)


def unpack_symmetric(packed: Float[Tensor, "*V E D"]) -> tuple[Float[Tensor, "*V D D"], Float[Tensor, "*V D D"]]:
    """Undo :func:`pack_symmetric`."""
    square, diagonal = packed[..., :-1, :], packed[..., -1, :]
    below = square.tril(-1)
    return square.triu() + square.triu(1).mT, below + below.mT + torch.diag_embed(diagonal)


def power_traces(
    x: Float[Tensor, "*V n n"], coefficients: Sequence[float]
) -> tuple[Float[Tensor, "*V"], Float[Tensor, "*V n n"]]:
    """Compute ``tr f(X)`` and ``f'(X)`` of ``f(X) = a_1 X + ... + a_K X^K`` in K - 2 matrix products.

    The derivative of tr f(X) with respect to X is ``f'(X)^T``. With X = S_t^T S_p, the derivative with respect to S_p
    is ``S_t f'(X)^T``. The Gram form X = S_p S_t^T has the same traces and the derivative ``f'(X)^T S_t``.

    Args:
        x: square matrices, not necessarily symmetric.
        coefficients: a_1 to a_K.

    >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    >>> power_traces(x, [1.0, 0.5])  # tr(X + X^2 / 2), I + X
    (tensor(2.), tensor([[1., 1.],
            [2., 1.]]))
    """
    value = coefficients[0] * x.diagonal(dim1=-2, dim2=-1).sum(-1)
    derivative = torch.zeros_like(x)
    derivative.diagonal(dim1=-2, dim2=-1).fill_(coefficients[0])
    power = x
    for k, coefficient in enumerate(coefficients[1:], 2):
        value = value + coefficient * (power * x.mT).sum((-2, -1))
        derivative.add_(power, alpha=k * coefficient)
        if k < len(coefficients):
            power = power @ x
    return value, derivative


def polynomial(
    b: Float[Tensor, "*V n n"], direction: Float[Tensor, "*V n n"], coefficients: Sequence[float]
) -> tuple[Float[Tensor, "*V n n"], Float[Tensor, "*V n n"]]:
    """Compute ``f(B) = c_0 I + c_1 B + ... + c_m B^m`` and its derivative along P, for symmetric B and P.

    The derivative ``sum_k c_k sum_(i+j=k-1) B^i P B^j`` is also the derivative of tr(P f(B)) with respect to B. Both
    are computed by Horner's scheme in B^2, with five matrix products for m = 4 instead of twelve.

    Args:
        b: symmetric matrices.
        direction: P, symmetric matrices.
        coefficients: c_0 to c_m.

    >>> f, slope = polynomial(torch.tensor([[3.0]]), torch.tensor([[10.0]]), [1.0, 0.0, 2.0])  # 1 + 2 x^2; 4 x * 10
    >>> f.item(), slope.item()
    (19.0, 120.0)
    """
    rest = [*coefficients, *[0.0] * (len(coefficients) % 2)]
    odd, even = rest.pop(), rest.pop()
    value, slope = b * odd, direction * odd
    value.diagonal(dim1=-2, dim2=-1).add_(even)
    if not rest:
        return value, slope
    square, half = b @ b, b @ direction
    square_slope = half + half.mT
    if odd == 0:  # the value is a multiple of the identity at this point
        value, slope = square * even, square_slope * even
    else:
        value, slope = value @ square, slope @ square + value @ square_slope
    while True:
        odd, even = rest.pop(), rest.pop()
        value.add_(b, alpha=odd).diagonal(dim1=-2, dim2=-1).add_(even)
        slope.add_(direction, alpha=odd)
        if not rest:
            return value, slope
        value, slope = value @ square, slope @ square + value @ square_slope


def eigh(matrix: Float[Tensor, "*V n n"]) -> tuple[Float[Tensor, "*V n"], Float[Tensor, "*V n n"]]:
    """Compute eigenvalues, ascending, and orthogonal eigenvectors of symmetric positive semidefinite matrices.

    The largest diagonal entry is added to the diagonal and subtracted from the eigenvalues afterwards. Without the
    shift LAPACK's float32 solver raises, or returns NaN, for some matrices of rank one (a batch of equal rows, or of
    rows on a line). The error stays a few eps times the largest eigenvalue. If the solver still does not converge,
    float64 on the CPU is used. A matrix with NaN or inf gives NaN or LinAlgError; the caller can name the input that
    caused it.

    >>> eigh(torch.diag(torch.tensor([3.0, 1.0])))[0]
    tensor([1., 3.])
    """
    shifted, shift = _shifted(matrix)
    try:
        values, vectors = torch.linalg.eigh(shifted)
    except LinAlgError:
        values, vectors = torch.linalg.eigh(shifted.double().cpu())
    return values.to(shift) - shift, vectors.to(matrix)


def eigvalsh(matrix: Float[Tensor, "*V n n"]) -> Float[Tensor, "*V n"]:
    """Compute only the eigenvalues of :func:`eigh`, at half its cost."""
    shifted, shift = _shifted(matrix)
    try:
        values = torch.linalg.eigvalsh(shifted)
    except LinAlgError:
        values = torch.linalg.eigvalsh(shifted.double().cpu())
    return values.to(shift) - shift


def _shifted(matrix: Tensor) -> tuple[Tensor, Tensor]:
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    shift = diagonal.amax(-1, keepdim=True)
    return matrix + torch.diag_embed(shift.expand_as(diagonal)), shift


def logarithm(
    b: Float[Tensor, "*V n n"], direction: Float[Tensor, "*V n n"], mu: float, *, divided: bool = False
) -> tuple[Float[Tensor, "*V n n"], Float[Tensor, "*V n n"]]:
    """Compute ``log(I + B / mu)`` of symmetric positive semidefinite B, and its derivative along a symmetric P.

    By Daleckii and Krein the derivative is ``V (G o V^T P V) V^T`` with B = V diag(w) V^T, where G are the divided
    differences of the function at pairs of eigenvalues. They are computed without cancellation, so equal eigenvalues
    are allowed; a batch with fewer rows than columns has many. Autograd through ``eigh`` divides by zero for them.

    Args:
        b: B.
        direction: P.
        mu: > 0.
        divided: use ``log(1 + x / mu) / x`` (1 / mu at 0) instead, for the Gram form.

    >>> value, slope = logarithm(torch.zeros(2, 2), torch.eye(2), 0.5)
    >>> value.sum().item(), slope.diagonal()  # the derivative of log(1 + 2 x) at 0, twice
    (0.0, tensor([2., 2.]))
    """
    values, vectors = eigh(b)
    x = values.clamp_min(0).double() / mu  # float64 for the eigenvalues only; the matrix products keep their precision
    one, other = torch.maximum(x.unsqueeze(-1), x.unsqueeze(-2)), torch.minimum(x.unsqueeze(-1), x.unsqueeze(-2))
    differences = _log1p_ratio((one - other) / (1 + other)) / (1 + other) / mu
    of_values = x.log1p()
    if divided:
        # second-order divided differences at one, other and 0; near 0 a series avoids the cancellation
        series = -1 / 2 + (one + other) / 3 - (one.square() + one * other + other.square()) / 4
        near = one < 1e-4
        safe = torch.where(near, 1, one)
        differences = torch.where(near, series, (differences * mu - _log1p_ratio(other)) / safe) / mu**2
        of_values = _log1p_ratio(x) / mu
    differences, of_values = differences.to(b.dtype), of_values.to(b.dtype)
    rotated = differences * (vectors.mT @ direction @ vectors)
    return (vectors * of_values.unsqueeze(-2)) @ vectors.mT, vectors @ rotated @ vectors.mT


def _log1p_ratio(x: Tensor) -> Tensor:
    """Compute log(1 + x) / x, which is 1 at 0."""
    return torch.where(x == 0, 1, x.log1p() / torch.where(x == 0, 1, x))


@torch.no_grad()
def spectral_radius(x: Float[Tensor, "*V n n"], *, shift: float = 0.0, steps: int = 12) -> Float[Tensor, "*V"]:
    """Estimate the largest absolute eigenvalue of ``X + shift I`` by power iteration, without synchronisation.

    The growth is averaged over the last half of the steps, because it oscillates for complex pairs of eigenvalues.

    Args:
        x: square matrices, not necessarily symmetric.
        shift: number added to the diagonal.
        steps: number of matrix-vector products.

    >>> round(spectral_radius(torch.tensor([[0.0, 2.0], [2.0, 3.0]]), shift=1.0).item(), 3)
    5.0
    """
    v = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device).cos().unsqueeze(-1).expand(*x.shape[:-1], 1)
    growth = []
    for _ in range(steps):
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        v = x @ v + shift * v
        growth.append(torch.linalg.vector_norm(v, dim=-2))
    return torch.stack(growth[steps // 2 :]).log().mean(0).exp().squeeze(-1)


def coding_rate(
    rows: Float[Tensor, "*V B D"], scale: float, counts: list[int] | None = None, comm: Collective = LOCAL
) -> tuple[Float[Tensor, "*V"], Float[Tensor, "*V B D"]]:
    """Compute ``R(U) = ½ logdet(I + c UᵀU)`` of the joined rows U by Cholesky, and its derivative with respect to U.

    The derivative ``c U (I + c UᵀU)⁻¹`` is that at this process's rows. The identity keeps the eigenvalues at 1 or
    above, so that the decomposition exists if c times the largest eigenvalue of UᵀU is far below 1 / eps of the dtype.

    Args:
        rows: rows of this process, for each view; without gradient.
        scale: c > 0.
        counts: the numbers of rows of all processes, to use ``U Uᵀ`` (rows x rows), which has the same determinant;
            None uses ``UᵀU`` (width x width).
        comm: the processes that share the batch.

    >>> rate, slope = coding_rate(torch.tensor([[1.0, 0.0]]), 3.0)  # ½ log 4; 3 / 4
    >>> round(rate.item(), 4), slope
    (0.6931, tensor([[0.7500, 0.0000]]))
    """
    if counts is None:
        matrix = comm.sum(rows.mT @ rows)
    else:
        every = comm.gather_rows(rows.movedim(-2, 0), counts=counts).movedim(0, -2)
        matrix = every @ every.mT
    matrix = matrix * scale
    matrix.diagonal(dim1=-2, dim2=-1).add_(1)
    factor, _ = torch.linalg.cholesky_ex(matrix)
    rate = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    if counts is None:
        return rate, torch.cholesky_solve(rows.mT, factor).mT * scale
    first = sum(counts[: comm.rank])
    own = slice(first, first + rows.shape[-2])
    return rate, torch.cholesky_solve(every, factor)[..., own, :] * scale


def centre_distance(z: Float[Tensor, "V B D"], large: int) -> tuple[Float[Tensor, ""], Float[Tensor, "V B D"]]:
    """Return the sum of all ``(z_v - μ)²`` and its gradient; μ is the mean of the first ``large`` views."""
    slope = z - z[:large].mean(0)
    total = torch.linalg.vector_norm(slope).square()
    if large < len(z):  # with all views large the distances to the mean add up to 0
        slope[:large] -= slope.sum(0) / large
    return total, slope.mul_(2)


def attach_gradient(
    value: Float[Tensor, " *B"], inputs: Sequence[Float[Tensor, "..."]], gradients: Sequence[Float[Tensor, "..."]]
) -> Float[Tensor, " *B"]:
    """Attach analytic gradients to ``value``; its backward multiplies them by the incoming gradient.

    A second derivative raises an error, since it would lack the derivative of the gradients.

    Args:
        value: a scalar, or one number per row, computed without a graph.
        inputs: the tensors that it is a function of. Number i of a vector is one of row i of each tensor.
        gradients: its derivative with respect to each of the inputs.

    >>> x = torch.tensor([3.0], requires_grad=True)
    >>> attach_gradient(torch.tensor(9.0), [x], [torch.tensor([6.0])]).backward()
    >>> x.grad
    tensor([6.])
    """
    return _AttachGradient.apply(value, *inputs, *gradients)


class _AttachGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # that is create_graph=True
            raise RuntimeError("an analytic gradient has no second derivative: differentiate without create_graph")
        gradients, (factor,) = ctx.saved_tensors, outer
        on_cpu = factor.device.type == "cpu" and not torch.compiler.is_compiling()  # else .item() would synchronise
        if not (on_cpu and factor.ndim == 0 and factor.item() == 1):  # a product of a large map costs time and memory
            gradients = [factor.view(factor.shape + (1,) * (g.ndim - factor.ndim)) * g for g in gradients]
        return None, *gradients, *(None for _ in gradients)
