"""The two matrix cross-entropies of Matrix-SSL and their gradient, from D x D covariances or from N x N Gram matrices.

With S_p, S_t the centred unit rows over sqrt N, C_tp = S_t^T S_p, C_pp = S_p^T S_p, C_tt = S_t^T S_t, K = S_p S_t^T and
K_p = S_p S_p^T, and a series log(mu I + C) = a_0 I + f(C) = a_0 I + C g(C):

* tr f(C_tp) = tr f(K), with the gradient S_t f'(C_tp)^T = f'(K)^T S_t by S_p;
* tr((C_tt + mu I) f(C_pp)) = tr(W g(K_p)) with W = K K^T + mu K_p, and its gradient 2 S_p Df(C_pp)[C_tt + mu I] is
  2 (g(K_p) K S_t + (Dg(K_p)[W] + mu g(K_p)) S_p), where Df(C)[P] is the derivative of f at C along P.

The exact logarithm has the same structure with a_0 = log mu. The gradients by S are those by the unit rows times
sqrt N. Their columns have the mean 0, so that the backward pass of the centring does not change them.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from plugins.checks import check_choice, check_range, check_whole
from plugins.distributed import LOCAL, Collective
from plugins.linalg import (
    logarithm,
    pack_symmetric,
    polynomial,
    power_traces,
    squared_norm,
    standardized_rows,
    unpack_symmetric,
)
from plugins.losses.log_series import log_series

LOGARITHMS = ("series", "exact")
WHAT = "the Matrix-SSL loss"


class Weights(NamedTuple):
    """The hyperparameters of the objective, named as the arguments of :func:`plugins.losses.matrix_ssl_loss`."""

    mce_lambd: float
    mce_mu: float
    gamma: float
    mce_order: int
    logarithm: str
    trace_term: bool

    def check(self) -> None:
        """Raise a ValueError if an option is unknown or out of range."""
        check_choice("logarithm", self.logarithm, LOGARITHMS)
        check_range("mce_lambd", self.mce_lambd, low=0.0)
        check_range("mce_mu", self.mce_mu, low=1e-6 if self.logarithm == "exact" else 0.0)
        check_range("gamma", self.gamma, low=0.0)
        check_whole("mce_order", self.mce_order, low=1)

    def constant(self, width: int) -> float:
        """Return the loss of a constant batch."""
        zero = self._coefficients()[0]
        of_trace = self.mce_mu * (1 + self.gamma) if self.trace_term else 0
        return width * (of_trace - zero * (self.mce_lambd + self.gamma * self.mce_mu))

    def _coefficients(self) -> tuple[float, list[float]]:
        if self.logarithm == "exact":
            return math.log(self.mce_mu), []
        return log_series(self.mce_order, self.mce_mu)

    def uniformity(self, cross: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``-lambda tr f(X)`` and the transpose of its derivative by X, which is C_tp or K."""
        if self.logarithm == "exact":
            eye = torch.eye(cross.shape[-1], dtype=cross.dtype, device=cross.device)
            value = torch.linalg.slogdet(eye + cross / self.mce_mu)[1]
            slope = torch.linalg.inv_ex(self.mce_mu * eye + cross)[0]  # inf where it is singular, no exception
        else:
            value, slope = power_traces(cross, self._coefficients()[1])
        value, slope = -self.mce_lambd * value, slope.mul_(-self.mce_lambd)
        if self.trace_term:
            value = value + cross.diagonal(dim1=-2, dim2=-1).sum(-1)
            slope.diagonal(dim1=-2, dim2=-1).add_(1)
        return value, slope

    def alignment(
        self, own: Tensor, direction: Tensor, target_trace: Tensor, *, gram: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-a_0 tr C_tt - tr(P f(B)), or with g for f, and the function of B and its derivative along P."""
        zero, coefficients = self._coefficients()
        if self.logarithm == "exact":
            function, slope = logarithm(own, direction, self.mce_mu, divided=gram)
        else:
            function, slope = polynomial(own, direction, coefficients if gram else [0.0, *coefficients])
        value = -zero * target_trace - (direction * function).sum((-2, -1))
        if self.trace_term:
            value = value + own.diagonal(dim1=-2, dim2=-1).sum(-1)
        return value, function, slope


class Entropies(NamedTuple):
    """The entropies of one pair of views minus their values for a constant batch, without an autograd graph."""

    uniformity: Float[Tensor, ""]
    alignment: Float[Tensor, ""]
    cross: Float[Tensor, "n n"]
    """C_tp or K."""
    own: Float[Tensor, "n n"]
    """C_pp or K_p."""
    gradient: Float[Tensor, "B D"]
    """Gradient of uniformity + gamma alignment by this process's unit rows of p, times the number of processes."""


def from_covariances(pair: Float[Tensor, "2 B D"], comm: Collective, weights: Weights) -> Entropies:
    """Compute the entropies from D x D covariances: the processes add up 2 D^2 statistics.

    It takes 10 N D^2 + 14 D^3 operations for order 4, including the gradient.

    Args:
        pair: unit rows of p and t; they are overwritten.
        comm: the processes that share the batch.
        weights: hyperparameters.
    """
    (s_p, s_t), factor = standardized_rows(pair, comm, what=WHAT, overwrite=True, unbiased=False)
    cross, own, direction = s_t.T @ s_p, s_p.T @ s_p, s_t.T @ s_t
    if comm.size > 1:
        width = cross.shape[0]
        total = comm.sum(torch.cat([cross, pack_symmetric(own, direction)]))
        cross = total[:width]
        own, direction = unpack_symmetric(total[width:])
    target_trace = direction.trace()
    direction.diagonal().add_(weights.mce_mu)
    uniformity, by_cross = weights.uniformity(cross)
    gradient = s_t @ by_cross.T
    del by_cross
    alignment, _, slope = weights.alignment(own, direction, target_trace, gram=False)
    slope.mul_(-2 * weights.gamma)
    if weights.trace_term:
        slope.diagonal().add_(2 * weights.gamma)
    gradient = gradient.addmm(s_p, slope).mul_(comm.size * factor)
    return Entropies(uniformity, alignment, cross, own, gradient)


def from_grams(pair: Float[Tensor, "2 B D"], comm: Collective, weights: Weights, counts: list[int]) -> Entropies:
    """Compute the entropies from N x N Gram matrices: the processes gather their rows, 2 N D numbers.

    It takes 8 N^2 D + 18 N^3 operations for order 4, including the gradient.

    Args:
        pair: unit rows of p and t; they are overwritten.
        comm: the processes that share the batch.
        weights: hyperparameters.
        counts: number of rows of each process.
    """
    first = sum(counts[: comm.rank])
    here = slice(first, first + counts[comm.rank])
    every = comm.gather_rows(pair.transpose(0, 1), counts=counts).transpose(0, 1)
    (s_p, s_t), factor = standardized_rows(every, LOCAL, what=WHAT, overwrite=True, unbiased=False)
    cross, own = s_p @ s_t.T, s_p @ s_p.T
    direction = torch.addmm(own, cross, cross.T, beta=weights.mce_mu)
    uniformity, by_cross = weights.uniformity(cross)
    alignment, function, slope = weights.alignment(own, direction, squared_norm(s_t), gram=True)
    del direction
    by_target = by_cross.T[here].addmm(function[here], cross, alpha=-2 * weights.gamma)
    by_own = slope[here].add_(function[here], alpha=weights.mce_mu).mul_(-2 * weights.gamma)
    del by_cross, function
    gradient = (by_target @ s_t).addmm(by_own, s_p)
    if weights.trace_term:
        gradient.add_(s_p[here], alpha=2 * weights.gamma)
    return Entropies(uniformity, alignment, cross, own, gradient.mul_(comm.size * factor))
