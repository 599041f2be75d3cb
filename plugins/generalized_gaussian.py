"""The generalised Gaussian distribution and its rectification, the target of Rectified LpJEPA (arXiv:2602.01456).

``GN_p(μ, σ)`` has the density ``exp(-|x - μ|^p / (p σ^p))`` up to a factor: Laplace for p = 1, Gaussian for p = 2. All
functions are in float64; the scales need no solver of another package.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from plugins.checks import check_range


def unit_variance_scale(p: float) -> float:
    """Return the σ for which ``GN_p(0, σ)`` has the variance 1: ``Γ(1/p)^½ / (p^(1/p) Γ(3/p)^½)``.

    Args:
        p: in [0.1, 100].

    >>> [round(unit_variance_scale(p), 4) for p in (1.0, 2.0)]
    [0.7071, 1.0]
    """
    check_range("p", p, low=0.1, high=100)
    return math.exp((math.lgamma(1 / p) - math.lgamma(3 / p)) / 2 - math.log(p) / p)


def rectified_moments(p: float, mean: float, scale: float) -> tuple[float, float]:
    """Return mean and variance of ``max(X, 0)`` for X of ``GN_p(μ, σ)``.

    With ``u = |X - μ| / (p^(1/p) σ)``, u^p has the Gamma distribution of shape 1/p; the moments of u on a half line are
    incomplete Gamma functions.

    Args:
        p: in [0.1, 100].
        mean: μ.
        scale: σ > 0.

    >>> [round(value, 4) for value in rectified_moments(1.0, 0.0, 0.5**0.5)]
    [0.3536, 0.375]
    """
    check_range("p", p, low=0.1, high=100)
    check_range("scale", scale, low=1e-300)
    factor = p ** (1 / p) * scale
    bound = torch.tensor((abs(mean) / factor) ** p, dtype=torch.float64)
    sign = math.copysign(1.0, mean) if mean else 0.0
    moments = []  # of u^k over X > 0, without the sign: P(X > 0), then k = 1 and 2
    for k in range(3):
        shape = torch.tensor((k + 1) / p, dtype=torch.float64)
        size = math.exp(math.lgamma((k + 1) / p) - math.lgamma(1 / p)) / 2
        below = torch.special.gammainc(shape, bound).item()
        # u^k (X - μ)'s sign^k: for odd k the parts below and above μ within the bound cancel
        moments.append(size * (1 - below if k == 1 else 1 + sign * below))
    share, first, second = moments
    expected = mean * share + factor * first
    square = mean**2 * share + 2 * mean * factor * first + factor**2 * second
    return expected, square - expected**2


def rectified_unit_variance_scale(p: float, mean: float) -> float:
    """Return the σ for which ``max(X, 0)`` has the variance 1 for X of ``GN_p(μ, σ)``, by bisection.

    Args:
        p: in [0.1, 100].
        mean: μ.

    >>> round(rectified_unit_variance_scale(1.0, 0.0), 4)  # 2 / √3
    1.1547
    """
    low, high = 0.0, 1.0
    while rectified_moments(p, mean, high)[1] < 1:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rectified_moments(p, mean, middle)[1] < 1 else (low, middle)
    return high


def draw_generalized_gaussian(
    rows: int, width: int, p: float, generator: torch.Generator, *, dtype: torch.dtype | None = None
) -> Float[Tensor, "N D"]:
    """Draw independent numbers of ``GN_p(0, 1)`` on the device of the generator.

    Args:
        rows: N.
        width: D.
        p: in [0.1, 100].
        generator: of the draw.
        dtype: of the result.
    """
    check_range("p", p, low=0.1, high=100)
    device = generator.device
    if p == 2:
        return torch.randn(rows, width, generator=generator, device=device, dtype=dtype)
    if p == 1:
        sizes = torch.empty(rows, width, device=device, dtype=dtype).exponential_(generator=generator)
    else:
        shapes = torch.full((rows, width), 1 / p, device=device, dtype=dtype)
        # the public sampler takes no generator
        sizes = torch._standard_gamma(shapes, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        sizes = sizes.mul_(p).pow_(1 / p)
    signs = torch.randint(2, (rows, width), generator=generator, device=device)
    return torch.where(signs == 0, -sizes, sizes)
