"""Functions of a spectrum that measure the quality of a representation.

Eigenvalues below ``10 D ε`` times the largest are rounding errors and count as zero, where ε is 2.2e-16 in float64. So
singular values, which are their square roots, are resolved down to ``√D · 4.7e-8`` of the largest.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from plugins.checks import check_whole


def rankme(eigenvalues: Float[Tensor, " D"], *, rows: int | None = None, eps: float = 1e-7) -> Float[Tensor, ""]:
    """Compute RankMe, the exponential of the entropy of the singular values: 1 (one direction) to D (equal ones).

    ``exp(−Σ_k p_k log p_k)`` with ``p_k = σ_k / Σ_j σ_j + eps``, where σ are the min(N, D) singular values of Z, the
    matrix of N rows, uncentred. Unlike :func:`plugins.linalg.effective_rank` it takes square roots of the eigenvalues.

    Args:
        eigenvalues: of ``Zᵀ Z / N``, in any order and scale.
        rows: N, if it may be below D; None means N ≥ D.
        eps: constant of the paper, dimensionless.

    Reference:
        Garrido et al. 2023, arXiv:2210.02885.

    >>> round(rankme(torch.tensor([4.0, 4.0, 0.0, 0.0])).item(), 3), round(rankme(torch.ones(8)).item(), 3)
    (2.0, 8.0)
    """
    return exp_entropy(significant(eigenvalues)[:rows].sqrt(), eps)


def alpha_req(eigenvalues: Float[Tensor, " D"], *, first: int = 11, last: int = 50) -> Float[Tensor, ""]:
    """Compute α-ReQ, the exponent α of the power law ``λ_k ∝ k^(−α)`` of the eigenvalues.

    It is the negative slope of the least-squares line through ``(log k, log λ_k)`` for k = first … last.

    Args:
        eigenvalues: of the covariance, centred, in any order and scale.
        first: smallest index k of the fit, from 1. The first eigenvalues do not follow the law.
        last: largest index; at most the number of eigenvalues above the rounding errors is used.

    Returns:
        α ≥ 0; NaN if fewer than three eigenvalues remain.

    Raises:
        ValueError: ``first`` is below 1 or ``last`` below ``first`` + 2.

    Reference:
        Agrawal et al. 2022, arXiv:2202.05808.

    >>> round(alpha_req(torch.arange(1, 65, dtype=torch.float64) ** -1.5).item(), 6)
    1.5
    """
    check_whole("first", first, low=1)
    check_whole("last", last, low=first + 2)
    spectrum = significant(eigenvalues)
    last = min(last, int((spectrum > 0).sum()))
    if last < first + 2:
        return spectrum.new_full((), torch.nan)
    x = torch.arange(first, last + 1, dtype=spectrum.dtype, device=spectrum.device).log()
    y = spectrum[first - 1 : last].log()
    x = x - x.mean()
    return -(x * y).sum() / x.square().sum()


def stable_rank(eigenvalues: Float[Tensor, " D"]) -> Float[Tensor, ""]:
    """Compute the stable rank ``‖Z‖_F² / ‖Z‖_2²``: 1 (one direction) to D (equal ones); 0 if Z = 0.

    Args:
        eigenvalues: of ``Zᵀ Z / N``, uncentred, in any order and scale.

    >>> stable_rank(torch.tensor([2.0, 1.0, 1.0])).item()
    2.0
    """
    spectrum = significant(eigenvalues)
    return torch.where(spectrum[0] > 0, spectrum.sum() / spectrum[0].clamp_min(torch.finfo(spectrum.dtype).tiny), 0)


def nesum(eigenvalues: Float[Tensor, " D"]) -> Float[Tensor, ""]:
    """Compute NESum, ``Σ_k λ_k / λ_1``: 1 (one direction varies) to D (whitened); 0 without variance.

    The formula is that of the stable rank, of centred features.

    Args:
        eigenvalues: of the covariance, centred, in any order and scale.

    Reference:
        He & Ozay 2022, "Exploring the gap between collapsed and whitened features in self-supervised learning", ICML.

    >>> nesum(torch.tensor([2.0, 1.0, 1.0])).item()
    2.0
    """
    return stable_rank(eigenvalues)


def exp_entropy(values: Float[Tensor, " D"], eps: float) -> Float[Tensor, ""]:
    """Return ``exp(−Σ p log p)`` with ``p = values / sum + eps``; 0 if all values, which are ≥ 0, are 0."""
    total = values.sum()
    share = values / total.clamp_min(torch.finfo(values.dtype).tiny) + eps
    return torch.where(total > 0, torch.special.entr(share).sum().exp(), 0)


def significant(eigenvalues: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    """Return the eigenvalues, largest first, with 0 in place of those that are rounding errors."""
    spectrum = eigenvalues.sort(descending=True).values
    floor = 10 * len(spectrum) * torch.finfo(spectrum.dtype).eps * spectrum[0]
    return torch.where(spectrum > floor, spectrum, 0)
