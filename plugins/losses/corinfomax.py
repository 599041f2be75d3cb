"""CorInfoMax: the views agree, and the running covariance of each view has a large determinant.

Ozsoy, Hamdan, Arik, Yuret & Erdogan, "Self-Supervised Learning with an Information Maximization Criterion" (NeurIPS
2022, arXiv:2209.07999), with the factors of the published code: rows of length 1, a mean over entries, two running
covariances. Statistics are those of the joined batch. They are computed in float64, as in the published code: its ε of
1e-8 is below the rounding of a float32 covariance. The gradient is analytic, from one Cholesky decomposition per view.

For more than two views the loss is the mean of the two-view loss over all unordered pairs of views, each of which has
its own covariance. The published code has two views only.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from plugins.checks import check_count, check_range, check_result, check_rows, check_whole, compute_dtype
from plugins.clock import MovedByMeans
from plugins.distributed import LOCAL, Collective
from plugins.linalg import attach_gradient, centre_distance, joined_sums, tangent, unit_rows

LEAST_EPS = 1e-10
"""Rounding of the float64 covariance of unit rows is far below it, so that the Cholesky decomposition exists."""
MOST_MOMENTUM = 0.999
WHAT = "the CorInfoMax loss"


class CorInfoMaxLossTerms(NamedTuple):
    """``loss = sim_weight * attraction - 2 * cov_weight * log_det``. Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    attraction: Float[Tensor, ""]
    """Mean squared difference of the views' unit rows, per entry, in [0, 4 / D]; 0 if they agree."""
    log_det: Float[Tensor, ""]
    """Mean over the views of the log-determinant of the running covariance over D, in nats; at most about -log D once
    the first state is forgotten, and near log eps for a constant embedding."""


class _Settings(NamedTuple):
    sim_weight: float
    cov_weight: float
    mean_momentum: float
    covariance_momentum: float
    eps: float

    def check(self) -> None:
        check_range("sim_weight", self.sim_weight, low=0)
        check_range("cov_weight", self.cov_weight, low=0)
        check_range("mean_momentum", self.mean_momentum, low=0, high=MOST_MOMENTUM)
        check_range("covariance_momentum", self.covariance_momentum, low=0, high=MOST_MOMENTUM)
        check_range("eps", self.eps, low=LEAST_EPS)


class _Moments(NamedTuple):
    """Means over the joined rows of one batch, in float64."""

    first: Float[Tensor, "V D"]
    second: Float[Tensor, "V D D"]
    rows: Float[Tensor, ""]


def corinfomax_loss(
    z0: Float[Tensor, "B D"],
    z1: Float[Tensor, "B D"],
    *others: Float[Tensor, "B D"],
    mean: Float[Tensor, "V D"] | None = None,
    covariance: Float[Tensor, "V D D"] | None = None,
    sim_weight: float = 250.0,
    cov_weight: float = 1.0,
    mean_momentum: float = 0.01,
    covariance_momentum: float = 0.01,
    eps: float = 1e-8,
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """``L = α mean (u_0 - u_1)^2 - β / D (logdet(R_0 + ε I) + logdet(R_1 + ε I))``.

    u_v are the rows of z_v divided by their lengths, N joined rows. ``R_v = λ_R R_v' + (1 - λ_R) C_v``, where
    ``C_v = mean (u - μ_v) (u - μ_v)^T``, ``μ_v = λ_μ μ_v' + (1 - λ_μ) mean u``, and μ_v' and R_v' are those before this
    batch. The gradient passes through the statistics of this batch alone.

    Args:
        z0: projections of the first view, one row per sample of this process.
        z1: projections of the second view, in the same order.
        others: projections of further views, in the same order. With V views the loss is the mean over their
            V (V - 1) / 2 unordered pairs.
        mean: μ' of each view; None is 0. :class:`CorInfoMaxLoss` keeps the state.
        covariance: R' of each view, symmetric positive semidefinite; None is the identity.
        sim_weight: weight α of the squared difference, ≥ 0 (dimensionless).
        cov_weight: weight β of the log-determinants, ≥ 0.
        mean_momentum: λ_μ, the share of μ' that is kept, in [0, 0.999].
        covariance_momentum: λ_R, the share of R' that is kept, in [0, 0.999].
        eps: ε ≥ 1e-10, added to the eigenvalues; those of unit rows are about 1 / D.
        comm: the processes that share the batch. V (D^2 + D) float64 numbers are summed, and nothing in backward.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input). A row with a norm below 1e-12 counts as zero.

    Raises:
        ValueError: the shapes differ, a number is out of range, or all processes together have fewer than two rows, or
            (on the CPU) an argument holds NaN or inf.

    >>> z = torch.cat([torch.eye(4), -torch.eye(4)])  # C = I / 4
    >>> round(corinfomax_loss(z, z, covariance=torch.eye(4).expand(2, 4, 4) / 4).item(), 4)  # 2 log 4
    2.7726
    """
    settings = _Settings(sim_weight, cov_weight, mean_momentum, covariance_momentum, eps)
    return _compute((z0, z1, *others), mean, covariance, settings, comm)[0].loss


def corinfomax_terms(
    z0: Float[Tensor, "B D"],
    z1: Float[Tensor, "B D"],
    *others: Float[Tensor, "B D"],
    mean: Float[Tensor, "V D"] | None = None,
    covariance: Float[Tensor, "V D D"] | None = None,
    sim_weight: float = 250.0,
    cov_weight: float = 1.0,
    mean_momentum: float = 0.01,
    covariance_momentum: float = 0.01,
    eps: float = 1e-8,
    comm: Collective = LOCAL,
) -> CorInfoMaxLossTerms:
    """Return :func:`corinfomax_loss` and its two parts."""
    settings = _Settings(sim_weight, cov_weight, mean_momentum, covariance_momentum, eps)
    return _compute((z0, z1, *others), mean, covariance, settings, comm)[0]


def _compute(
    of_views: tuple[Tensor, ...],
    mean: Tensor | None,
    covariance: Tensor | None,
    settings: _Settings,
    comm: Collective,
) -> tuple[CorInfoMaxLossTerms, _Moments]:
    """Return the terms, and the moments by which the state moves."""
    named = {f"z{view}": z for view, z in enumerate(of_views)}
    if len(named) < 2:
        raise ValueError(f"{WHAT} needs at least 2 views, got {len(named)}")
    check_rows(**named)
    settings.check()
    (rows_here, width), device, count = of_views[0].shape, of_views[0].device, len(of_views)
    mean = torch.zeros(count, width) if mean is None else mean.detach()
    covariance = torch.eye(width).expand(count, width, width) if covariance is None else covariance.detach()
    for name, state, shape in (("mean", mean, (count, width)), ("covariance", covariance, (count, width, width))):
        if state.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(state.shape)}")
    dtype = compute_dtype(reduce(torch.promote_types, [z.dtype for z in of_views]))
    with torch.autocast(device.type, enabled=False):
        views = [z.to(dtype) for z in of_views]
        unit, inverse = unit_rows(torch.stack(views))
        total, pull = centre_distance(unit, count)
        # view by view: the rows in float64 take twice the memory
        second, first = (torch.stack(parts) for parts in zip(*map(_sums, unit), strict=True))
        second, first, total, rows = joined_sums([second, first, total.double(), first.new_tensor(rows_here)], comm)
        if rows_here < 2:  # the joined batch can be too small only in this case, so only this case synchronises
            check_count(int(rows.item()), least=2, what=WHAT)
        moments = _Moments(first / rows, second.div_(rows), rows)
        _, matrix, away = _running(moments.first, moments.second, mean.to(first), covariance.to(first), settings)
        matrix.diagonal(dim1=1, dim2=2).add_(settings.eps)
        factor, _ = torch.linalg.cholesky_ex(matrix)
        log_det = factor.diagonal(dim1=1, dim2=2).log().mean() * 2  # of the factor, half the logarithm
        entries = 2 / ((count - 1) * width) / rows  # a mean over the pairs is this multiple of the distances
        attraction = total * entries
        loss = settings.sim_weight * attraction - 2 * settings.cov_weight * log_det
        if torch.is_grad_enabled() and any(view.requires_grad for view in views):
            share = -4 * settings.cov_weight * (1 - settings.covariance_momentum) / (count * width)
            weights = torch.cholesky_inverse(factor).mul_(share / rows)
            shifts = ((settings.mean_momentum**2 * away - moments.first).unsqueeze(1) @ weights).squeeze(1)
            gradient = pull.mul_((settings.sim_weight * entries).to(dtype))
            for part, u, weight, shift in zip(gradient, unit, weights, shifts, strict=True):
                part.add_(torch.addmm(shift, u.double(), weight))
            loss = attach_gradient(loss.to(dtype), views, tangent(gradient, unit, inverse).mul_(comm.size).unbind())
        terms = CorInfoMaxLossTerms(loss.to(dtype), attraction.to(dtype), log_det.to(dtype))
    check_result(WHAT, terms.loss, comm, **named)
    return terms, moments


def _sums(u: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "D D"], Float[Tensor, " D"]]:
    x = u.double()
    return x.T @ x, x.sum(0)


def _running(
    first: Tensor, second: Tensor, mean: Tensor, covariance: Tensor, settings: _Settings
) -> tuple[Float[Tensor, "V D"], Float[Tensor, "V D D"], Float[Tensor, "V D"]]:
    """Return the running means and covariances with this batch, and the distances of its means from those before it."""
    away = first - mean
    of_batch = torch.baddbmm(
        second, torch.stack([-first, settings.mean_momentum**2 * away], 2), torch.stack([first, away], 1)
    )
    moved = mean + (1 - settings.mean_momentum) * away
    return moved, of_batch.lerp_(covariance, settings.covariance_momentum), away


class CorInfoMaxLoss(MovedByMeans):
    """:func:`corinfomax_loss` with the running mean and covariance of each view, which move in training.

    All micro-batches of a step see the same state. The step moves it once, by the rows of all of them. The state is the
    same on all processes.

    Args:
        width: D, the number of columns.
        initial_covariance: R is this multiple of the identity before the first step, ≥ 0.
        sim_weight, cov_weight, mean_momentum, covariance_momentum, eps, comm: as of :func:`corinfomax_loss`.

    Buffers, always float64. V is 0 before the first step or checkpoint, then the largest number of views of a step:
        mean: ``[V, D]``, initially 0.
        covariance: ``[V, D, D]``.
    """

    mean: Tensor
    covariance: Tensor

    def __init__(
        self,
        width: int,
        *,
        initial_covariance: float = 1.0,
        sim_weight: float = 250.0,
        cov_weight: float = 1.0,
        mean_momentum: float = 0.01,
        covariance_momentum: float = 0.01,
        eps: float = 1e-8,
        comm: Collective = LOCAL,
    ) -> None:
        super().__init__()
        check_whole("width", width, low=1)
        check_range("initial_covariance", initial_covariance, low=0)
        self.settings = _Settings(sim_weight, cov_weight, mean_momentum, covariance_momentum, eps)
        self.settings.check()
        self.width, self.initial_covariance, self.comm = width, initial_covariance, comm
        self.register_buffer("mean", torch.zeros(0, width, dtype=torch.float64))
        self.register_buffer("covariance", torch.zeros(0, width, width, dtype=torch.float64))

    def terms(self, *views: Float[Tensor, "B D"]) -> CorInfoMaxLossTerms:
        """Return the loss and its two parts; in training, move the state or leave it to the end of the open step."""
        self._check(views)
        mean, covariance = self._state(len(views))
        terms, moments = _compute(views, mean, covariance, self.settings, self.comm)
        if self.training:
            self.observe([moments.first, moments.second], moments.rows)
        return terms

    def forward(self, *views: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
        return self.terms(*views).loss

    def _check(self, views: tuple[Tensor, ...]) -> None:
        for number, z in enumerate(views):
            if z.shape[-1:] != (self.width,):
                raise ValueError(f"z{number} must be [B, {self.width}], the width of the module, got {tuple(z.shape)}")
        if self._seen is not None and (before := len(self._seen.means[0])) != len(views):
            raise ValueError(
                f"all micro-batches of a step need the same number of views, got {before} and {len(views)}"
            )

    def _state(self, views: int) -> tuple[Tensor, Tensor]:
        """Return the state of the first views; views that it does not hold yet have the first state."""
        more = views - len(self.mean)
        if more <= 0:
            return self.mean[:views], self.covariance[:views]
        first = self.initial_covariance * torch.eye(self.width).to(self.mean).expand(more, self.width, self.width)
        return torch.cat([self.mean, self.mean.new_zeros(more, self.width)]), torch.cat([self.covariance, first])

    def move(self, means: list[Tensor]) -> None:
        """Move the running means and covariances by the moments of a step."""
        first, second = means
        views = len(first)
        if views > len(self.mean):
            self.mean, self.covariance = self._state(views)
        mean, covariance = self.mean[:views], self.covariance[:views]
        moved, matrix, _ = _running(first, second, mean, covariance, self.settings)
        finite = matrix.isfinite().all()  # an overflow must not stay
        # in place, once their views are there: DistributedDataParallel keeps references to the buffers
        mean.copy_(moved.where(finite, mean))
        covariance.copy_(matrix.where(finite, covariance))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        mean, covariance = (state_dict.get(f"{prefix}{name}") for name in ("mean", "covariance"))
        errors = lists[-1]
        if isinstance(mean, Tensor) and mean.ndim == 2 and mean.shape[1] == self.width:
            views, width = mean.shape
            if not isinstance(covariance, Tensor) or covariance.shape != (views, width, width):
                errors.append(f"{prefix}covariance must be [{views}, {width}, {width}], like {prefix}mean")
                return
            if not (mean.isfinite().all() and covariance.isfinite().all()):
                errors.append(f"{prefix}mean or {prefix}covariance holds NaN or inf")
                return
            self.mean, self.covariance = (
                state.new_zeros(views, *state.shape[1:]) for state in (self.mean, self.covariance)
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CorInfoMaxLoss":
        def in_float64(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != torch.float64 else moved

        return super()._apply(in_float64, recurse)

    def extra_repr(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings._asdict().items())
        return f"{self.width}, initial_covariance={self.initial_covariance}, {settings}, comm={self.comm}"
