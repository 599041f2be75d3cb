"""Linear algebra shared by losses and logging.

Joined centring, covariance or Gram by cost, spectra, functions of matrices and their derivatives, analytic gradients.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from plugins.checks import check_count, check_finite
from plugins.distributed import LOCAL, Collective

FORMS = ("auto", "covariance", "gram")
LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]


def gram_is_cheaper(rows: int, width: int) -> bool:
    """Return whether ``S S^T`` (rows x rows) needs less computation and communication than ``S^T S`` (width x width).

    Args:
        rows: rows of S, over all processes and both views where views are stacked.
        width: columns of S.

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


def joined_mean(values: Float[Tensor, " B"], comm: Collective = LOCAL) -> Float[Tensor, ""]:
    """Average one number per row over the rows of all processes; the numbers of rows may differ.

    Differentiable by the rule of :mod:`plugins.distributed`; sends two floats and never waits for the device.

    Args:
        values: one number per row of this process.
        comm: the processes that share the batch.

    Raises:
        ValueError: there is no row on any process.

    >>> joined_mean(torch.tensor([1.0, 2.0, 6.0])).item()
    3.0
    """
    if comm.size == 1:
        check_count(values.shape[0], least=1, what="a batch mean")
        return values.mean()
    total = comm.sum(torch.stack([values.sum(), values.new_tensor(values.shape[0])]))
    if values.shape[0] == 0:  # only then can the joined batch be empty, and only then is the wait worth it
        check_count(int(total[1].item()), least=1, what="a batch mean")
    return total[0] / total[1]


def standardized_rows(
    z: Float[Tensor, "*V B D"],
    comm: Collective = LOCAL,
    *,
    what: str = "a covariance",
    overwrite: bool = False,
    unbiased: bool = True,
) -> tuple[Float[Tensor, "*V B D"], float | Float[Tensor, ""]]:
    """Rows minus the joined column means, times ``1 / sqrt(N - 1)``: S, of which ``S^T S`` is the unbiased covariance.

    Scaling comes before any product, so that no sum over rows grows with N. The mean is subtracted before squaring,
    which keeps a small variance beside a large mean. The result carries no gradient: a joined mean used on local rows
    would break the rule of :mod:`plugins.distributed`.

    Args:
        z: rows of this process, for each view.
        comm: the processes that share the batch.
        what: the quantity that needs two rows, for the error message.
        overwrite: write S into z, which then must be the caller's own: fresh memory costs more time than the sums.
        unbiased: False divides by N instead of N - 1.

    Returns:
        S and the factor ``1 / sqrt(N - 1)``; the factor is a tensor where only the device knows N.

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
    if rows < 2:  # only then can the joined batch be too small, and only then is waiting for the device worth it
        check_count(int(total[-1].item()), least=2, what=what)
    mean = (total[:-1] / total[-1]).unflatten(0, z.shape[:-2] + z.shape[-1:]).unsqueeze(-2)
    factor = (total[-1] - int(unbiased)).rsqrt()
    return (z.sub_(mean) if overwrite else z - mean).mul_(factor), factor


def split_square(z: Float[Tensor, "V N D"], *, form: str = "auto") -> Float[Tensor, ""]:
    """Estimate of ``||V||_F^2``, V the sum of the views' covariances, unbiased: tr(V_a V_b) of two half batches.

    The halves are the rows of even and of odd index; each has its own mean and divisor.

    Args:
        z: all rows, the same samples in each view.
        form: "covariance", "gram" or "auto", the cheaper one. The value is the same.

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
    """Estimate of ``||V||_F^2``, V the sum of the views' covariances, unbiased: the U-statistic of order four.

    The mean, over all ordered quadruples of distinct rows i, j, k, l, of sum_uv ((u_i - u_j) . (v_k - v_l))^2 / 4 where
    u and v run over the views. Centring turns it into power sums of the blocks G_uv = u v^T, at the cost of the biased
    estimate.

    Args:
        z: all rows, the same samples in each view.
        form: "covariance", "gram" or "auto", the cheaper one. The value is the same.

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
    """Eigenvalues of the covariance of the joined rows, ascending, for logging; without gradient.

    Found from the smaller of covariance and Gram matrix: D values, or N of them where N < D (the rest are zero).

    Args:
        z: rows of this process.
        comm: the processes that share the batch.

    Raises:
        ValueError: there are fewer than two rows over all processes; z holds NaN or inf.

    >>> covariance_eigenvalues(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, -3.0]]))
    tensor([0.6667, 6.0000])
    """
    check_finite("a spectrum", z=z)  # a wait for the device, as the solver's own
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
        z: rows, detached here; :func:`tangent` is the way back.

    >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))[0]
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    z = z.detach()
    lengths = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    inverse = torch.where(lengths > 1e-12, 1 / lengths, 0)
    return z * inverse, inverse


def tangent(
    gradient: Float[Tensor, "*V B D"], unit: Float[Tensor, "*V B D"], inverse: Float[Tensor, "*V B 1"]
) -> Float[Tensor, "*V B D"]:
    """Convert the gradient by unit rows u into that by the rows z: ``(g - (g . u) u) / |z|``.

    Args:
        gradient: by the unit rows; it is overwritten.
        unit: first result of :func:`unit_rows`.
        inverse: its second.

    >>> unit, inverse = unit_rows(torch.tensor([[2.0, 0.0]]))
    >>> tangent(torch.tensor([[5.0, 1.0]]), unit, inverse)
    tensor([[0.0000, 0.5000]])
    """
    along = (gradient * unit).sum(-1, keepdim=True)
    return gradient.addcmul_(along, unit, value=-1).mul_(inverse)


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
    """``tr f(X)`` and ``f'(X)`` of a polynomial ``f(X) = a_1 X + ... + a_K X^K``, X of any kind, in K - 2 products.

    The derivative of tr f(X) by X is ``f'(X)^T``. With X = S_t^T S_p, that by S_p is ``S_t f'(X)^T``; the traces are
    those of the Gram form X = S_p S_t^T, whose derivative by S_p is ``f'(X)^T S_t``.

    Args:
        x: square matrices.
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
    """``f(B) = c_0 I + c_1 B + ... + c_m B^m`` and its derivative along P, for symmetric B and P.

    The derivative, ``sum_k c_k sum_(i+j=k-1) B^i P B^j``, is also that of tr(P f(B)) by B. Both follow Horner's scheme
    in B^2: five products for m = 4, where powers and sums one by one would take a dozen.

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
    if odd == 0:  # so far the value is a multiple of the identity
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
    """Eigenvalues, ascending, and orthogonal eigenvectors of symmetric positive semidefinite matrices.

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
    """Eigenvalues of :func:`eigh`, at half its cost."""
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
    """``log(I + B / mu)`` of symmetric positive semidefinite B, and its derivative along a symmetric P.

    By Daleckii and Krein the derivative is ``V (G o V^T P V) V^T`` with B = V diag(w) V^T and G the divided differences
    of the function at pairs of eigenvalues. They are written without cancellation, so that equal eigenvalues, of which
    a batch of fewer rows than columns has many, do no harm; autograd through ``eigh`` divides by zero there.

    Args:
        b: B.
        direction: P.
        mu: > 0.
        divided: take ``log(1 + x / mu) / x`` (1 / mu at 0) instead, which is what the Gram form needs.

    >>> value, slope = logarithm(torch.zeros(2, 2), torch.eye(2), 0.5)
    >>> value.sum().item(), slope.diagonal()  # the derivative of log(1 + 2 x) at 0, twice
    (0.0, tensor([2., 2.]))
    """
    values, vectors = eigh(b)
    x = values.clamp_min(0).double() / mu  # numbers only: the products stay in their own precision
    one, other = torch.maximum(x.unsqueeze(-1), x.unsqueeze(-2)), torch.minimum(x.unsqueeze(-1), x.unsqueeze(-2))
    differences = _log1p_ratio((one - other) / (1 + other)) / (1 + other) / mu
    of_values = x.log1p()
    if divided:
        # of second order, at one, other and 0; what cancels near 0 is replaced by its expansion
        series = -1 / 2 + (one + other) / 3 - (one.square() + one * other + other.square()) / 4
        near = one < 1e-4
        safe = torch.where(near, 1, one)
        differences = torch.where(near, series, (differences * mu - _log1p_ratio(other)) / safe) / mu**2
        of_values = _log1p_ratio(x) / mu
    differences, of_values = differences.to(b.dtype), of_values.to(b.dtype)
    rotated = differences * (vectors.mT @ direction @ vectors)
    return (vectors * of_values.unsqueeze(-2)) @ vectors.mT, vectors @ rotated @ vectors.mT


def _log1p_ratio(x: Tensor) -> Tensor:
    """log(1 + x) / x, 1 at 0."""
    return torch.where(x == 0, 1, x.log1p() / torch.where(x == 0, 1, x))


@torch.no_grad()
def spectral_radius(x: Float[Tensor, "*V n n"], *, shift: float = 0.0, steps: int = 12) -> Float[Tensor, "*V"]:
    """Estimate the largest absolute eigenvalue of ``X + shift I`` by power iteration, without synchronisation.

    The growth is averaged over the last half of the steps, for complex pairs make it oscillate.

    Args:
        x: square matrices of any kind.
        shift: what is added to the diagonal.
        steps: products with a vector.

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


def attach_gradient(
    value: Float[Tensor, ""], inputs: Sequence[Float[Tensor, "..."]], gradients: Sequence[Float[Tensor, "..."]]
) -> Float[Tensor, ""]:
    """Attach analytic gradients to ``value``. Its backward only scales them.

    A second derivative is refused, since it would silently lack the derivative of the gradients.

    Args:
        value: a scalar computed without a graph.
        inputs: what it is a function of.
        gradients: its derivative by each of the inputs.

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
        gradients = ctx.saved_tensors
        return None, *(outer[0] * gradient for gradient in gradients), *(None for _ in gradients)
