"""The Taylor series of the matrix logarithm about the identity: coefficients, and a check of its convergence.

Maximum Entropy Coding and Matrix-SSL train on ``log_K(Q) = sum_k (-1)^(k+1) / k (Q - I)^k``, k = 1 to K. The
series does not converge if the spectral radius of Q - I exceeds 1. The loss then grows without bound for even K and
falls without bound for odd K.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from plugins.checks import check_range, check_whole


def log_series(order: int, mu: float = 1.0) -> tuple[float, list[float]]:
    """Return the coefficients of ``log_K(mu I + C)`` in powers of C: that of the identity, and those of C to C^K.

    Args:
        order: K ≥ 1.
        mu: the shift, dimensionless; at 1 the coefficients are 0 and (-1)^(k+1) / k.

    Raises:
        ValueError: K is not an int, or is below 1.

    >>> log_series(3)
    (0.0, [1.0, -0.5, 0.3333333333333333])
    """
    check_whole("the order of a series", order, low=1)
    powers: list[float] = []
    for k in range(order, 0, -1):  # Horner's scheme with x = C + (mu - 1) I
        powers = _times(powers, mu - 1)
        powers[0] += (-1.0) ** (k + 1) / k
    first, *rest = _times(powers, mu - 1)
    return first, rest


def _times(polynomial: list[float], root: float) -> list[float]:
    """Return the coefficients of p(C) (C + root); those of p start with the constant term."""
    return [a + root * b for a, b in zip([0.0, *polynomial], [*polynomial, 0.0], strict=True)]


class SeriesWatch:
    """Warn when a series leaves its radius of convergence; warn again only after it has converged in between.

    The first call and then every ``every``-th call check the radius. Each check synchronises with the device.

    Args:
        name: name of the loss, for the message.
        advice: what the user can do, for the message.
        every: number of calls between two checks, ≥ 1.

    Raises:
        ValueError: ``every`` below 1.

    >>> watch = SeriesWatch("the loss", "lower it")
    >>> watch(lambda: torch.tensor(0.5))  # it converges: no warning
    """

    def __init__(self, name: str, advice: str, *, every: int = 100) -> None:
        check_range("every", every, low=1)
        self.name, self.advice, self.every = name, advice, every
        self.calls, self.outside = 0, False

    def __call__(self, radius: Callable[[], Tensor]) -> None:
        """Check the radius if a check is due.

        Args:
            radius: function that returns the spectral radius, ``[]``. It is called only if a check is due, and then on
                all processes in the same call.
        """
        if torch.compiler.is_compiling():  # a check would break the graph, so compiled code has none
            return
        due = self.calls % self.every == 0
        self.calls += 1
        if not due:
            return
        value, before = float(radius()), self.outside
        self.outside = not value <= 1  # a radius that is not a number is outside too
        if self.outside and not before:
            warnings.warn(
                f"the series of {self.name} diverges: spectral radius {value:.3g}, "
                f"{'not a number' if math.isnan(value) else 'above 1'}; {self.advice}",
                RuntimeWarning,
                stacklevel=3,
            )
