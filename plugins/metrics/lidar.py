"""LiDAR: the effective rank of linear discriminant analysis, in which each image is a class and its views are rows."""

import torch
from jaxtyping import Float
from torch import Tensor

from plugins.checks import check_range, check_whole
from plugins.linalg import eigvalsh
from plugins.metrics.spectrum import exp_entropy, significant


@torch.no_grad()
def lidar(
    between: Float[Tensor, "D D"],
    within: Float[Tensor, "D D"],
    *,
    delta: float = 1e-4,
    eps: float = 1e-7,
    views: int | None = None,
) -> Float[Tensor, ""]:
    """Compute LiDAR: 1 (one direction separates the images) to min(D, n − 1) for n images; 0 if all are the same.

    ``exp(−Σ_k p_k log p_k)`` with ``p_k = λ_k / Σ_j λ_j + eps``, where λ are the eigenvalues of
    ``Σ_w^(−1/2) Σ_b Σ_w^(−1/2)``. They are computed as those of ``L⁻¹ Σ_b L⁻ᵀ`` with ``Σ_w = L Lᵀ``, which are equal.

    The mean of V views retains a V-th of the variance within an image, which adds ``Σ_w / V`` to Σ_b in expectation.
    With few views this noise dominates and raises LiDAR towards D. ``views`` removes it: Σ_b becomes
    ``between − within / (V − 1)``, an estimate without bias, and negative eigenvalues count as 0.

    Args:
        between: Σ_b, covariance of the images' mean rows.
        within: covariance of the rows about the mean of their image; ``Σ_w = within + delta · I``.
        delta: regularisation of Σ_w, in units of the squared features, > 0.
        eps: constant of the paper, dimensionless.
        views: V ≥ 2, to remove the noise of the mean views; None is the definition of the paper.

    Raises:
        ValueError: delta is not above 0, or views is below 2.

    Reference:
        Thilak et al. 2023, arXiv:2312.04000; with 1000 images of 50 views each.

    >>> round(lidar(torch.diag(torch.tensor([6.0, 2.0])), torch.diag(torch.tensor([3.0, 1.0])), delta=1e-9).item(), 3)
    2.0
    """
    check_range("delta", delta, low=1e-300)
    if views is not None:
        check_whole("views", views, low=2)
        between = between - within / (views - 1)
    factor = torch.linalg.cholesky(within + delta * torch.eye(len(within), dtype=within.dtype, device=within.device))
    half = torch.linalg.solve_triangular(factor, between, upper=False)
    matrix = torch.linalg.solve_triangular(factor, half.T, upper=False)
    return exp_entropy(significant(eigvalsh((matrix + matrix.T) / 2)), eps)
