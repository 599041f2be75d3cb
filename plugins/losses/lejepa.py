"""LeJEPA: the views of an image agree, and the embedding is an isotropic Gaussian in random directions (SIGReg).

Balestriero & LeCun, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics" (2025,
arXiv:2511.08544), written from the paper's equations: docs/specs/lejepa.md numbers them.

The Epps-Pulley statistic needs cosines and sines of k x at equidistant knots k. All follow from those of the first knot
by a recurrence, ``cos (k+1)x = 2 cos x cos kx - cos (k-1)x``, in blocks of directions that fit the cache. A second pass
computes them again for the gradient, so that the memory does not grow with the number of knots or directions.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_count, check_range, check_result, check_rows, check_views, check_whole, compute_dtype
from plugins.clock import Clock
from plugins.distributed import LOCAL, Collective
from plugins.draws import device_generator, unit_directions
from plugins.linalg import attach_gradient, centre_distance

Views = Sequence[Float[Tensor, "B D"]] | Float[Tensor, "V B D"]
T_MAX, KNOTS = 5.0, 17
"""End of the domain of the characteristic function, and number of knots from 0 to there."""
_CPU_BLOCK, _GPU_BLOCK = 2**16, 2**24
"""Numbers of a block of directions x rows."""


class LeJEPALossTerms(NamedTuple):
    """``loss = (1 - sigreg_weight) * prediction + sigreg_weight * sigreg``. Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    prediction: Float[Tensor, ""]
    """Mean squared distance to the mean of the large views, per dimension: 0 if the views agree."""
    sigreg: Float[Tensor, ""]
    """Mean statistic over views and directions: about 1.06 for a Gaussian embedding, 0.41 N for a zero one."""


def lejepa_loss(
    views: Views,
    directions: Float[Tensor, "M D"],
    *,
    large: int | None = None,
    sigreg_weight: float = 0.05,
    t_max: float = T_MAX,
    knots: int = KNOTS,
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """``L = (1 - λ) mean_v |z_v - μ|² / D + λ mean_v SIGReg(z_v)``, with μ the mean of the large views.

    ``SIGReg(z)`` is the mean over directions a of ``N ∫ |φ(t) - exp(-t²/2)|² exp(-t²/2) dt``, where φ is the empirical
    characteristic function of ``z a`` over the N joined rows.

    Args:
        views: projections of V views, large ones first, as a list or one tensor.
        directions: unit rows, the same on all processes: see :func:`plugins.draws.unit_directions`.
        large: number of large views, in [1, V]; None: all.
        sigreg_weight: λ in [0, 1].
        t_max: end of the domain [0, t_max] of φ, > 0. The published domain is [-5, 5], whose halves are equal.
        knots: number of equidistant points of the trapezoid rule on the domain, ≥ 2. Rows that differ by a multiple
            of ``2 π (knots - 1) / t_max`` in a direction are equal for it: 20.1 with the defaults.
        comm: the processes that share the batch. ``2 V (knots - 1) M`` sums are communicated, and nothing in backward.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input). Zero embeddings give λ 0.4089 N.

    Raises:
        ValueError: a tensor in place of a list, shapes differ, no view or row, a number out of range, or (on the CPU) a
            view holds NaN or inf.

    >>> zero = torch.zeros(2, 8, 3)
    >>> round(lejepa_loss(zero, torch.eye(3), sigreg_weight=1.0).item(), 3)
    3.271
    """
    return lejepa_terms(
        views, directions, large=large, sigreg_weight=sigreg_weight, t_max=t_max, knots=knots, comm=comm
    ).loss


def lejepa_terms(
    views: Views,
    directions: Float[Tensor, "M D"],
    *,
    large: int | None = None,
    sigreg_weight: float = 0.05,
    t_max: float = T_MAX,
    knots: int = KNOTS,
    comm: Collective = LOCAL,
) -> LeJEPALossTerms:
    """Return :func:`lejepa_loss` and its two parts."""
    named = check_views(views=views)
    if not named:
        raise ValueError("the LeJEPA loss needs at least 1 view, got 0")
    large = len(views) if large is None else large
    check_whole("large", large, low=1)
    check_range("large", large, low=1, high=len(views))
    _check(sigreg_weight, t_max, knots)
    check_rows(directions=directions)
    if directions.shape[1] != views[0].shape[1]:
        wanted_shape = f"[M, {views[0].shape[1]}], as wide as the views"
        raise ValueError(f"directions must be {wanted_shape}, got {tuple(directions.shape)}")
    dtype = compute_dtype(reduce(torch.promote_types, [view.dtype for view in views]))
    with torch.autocast(views[0].device.type, enabled=False):
        z = torch.stack([view.detach().to(dtype) for view in views])
        wanted = torch.is_grad_enabled() and any(view.requires_grad for view in views)
        rows = comm.sum(z.new_tensor([z.shape[1]]))
        if z.shape[1] == 0:  # only then can the joined batch be empty, so only then waits this for the device
            check_count(int(rows.item()), least=1, what="the LeJEPA loss")
        away, slope = centre_distance(z, large)
        prediction = comm.sum(away) / (rows[0] * z.shape[0] * z.shape[2])
        sigreg, gradient = sigreg_terms(z, directions.to(dtype), rows[0], wanted, t_max, knots, comm)
        loss = (1 - sigreg_weight) * prediction + sigreg_weight * sigreg
        if wanted:
            weight = (1 - sigreg_weight) * comm.size / (z.shape[0] * z.shape[2])
            gradient = gradient.mul_(sigreg_weight * comm.size).add_(slope.mul_(weight / rows))
            loss = attach_gradient(loss, list(views), list(gradient))
    check_result("the LeJEPA loss", loss, comm, **named)
    return LeJEPALossTerms(loss, prediction, sigreg)


def sigreg_terms(
    z: Float[Tensor, "V B D"],
    directions: Float[Tensor, "M D"],
    rows: Float[Tensor, ""],
    wanted: bool,
    t_max: float,
    knots: int,
    comm: Collective,
) -> tuple[Float[Tensor, ""], Float[Tensor, "V B D"]]:
    """Return SIGReg, the mean over views of eq. 4, and its gradient with respect to this process's rows.

    Args:
        z: rows of this process, detached.
        directions: unit rows.
        rows: N, number of rows of all processes.
        wanted: whether the gradient is computed; it is empty otherwise.
        t_max, knots: as of :func:`lejepa_loss`.
        comm: the processes that share the batch.
    """
    views, own, _ = z.shape
    step = t_max / (knots - 1)
    blocks = _blocks(len(directions), max(own, 1), z.device)
    sums = z.new_zeros(2, views, knots - 1, len(directions))
    for view, of_view in enumerate(z):
        for block in blocks:
            for k, cosine, sine in _waves(directions[block] @ of_view.T, step, knots):
                sums[0, view, k - 1, block] = cosine.sum(1)
                sums[1, view, k - 1, block] = sine.sum(1)
    knot = torch.arange(1, knots, device=z.device, dtype=z.dtype)
    normal = torch.exp(-((knot * step) ** 2) / 2)
    weights = 2 * step * normal
    weights[-1] /= 2
    signs = z.new_tensor([1.0 if k % 4 < 2 else -1.0 for k in range(1, knots)])  # of the waves
    real, imaginary = comm.sum(sums) * signs[:, None] / rows
    real = real - normal[:, None]
    statistic = rows * (weights[:, None] * (real.square() + imaginary.square())).sum(1).mean()
    if not wanted:
        return statistic, z.new_empty(0)
    scale = (2 * step / (views * len(directions))) * weights * knot * signs
    of_cosine, of_sine = scale[:, None] * imaginary, -scale[:, None] * real
    gradient = torch.zeros_like(z)
    for view, of_view in enumerate(z):
        for block in blocks:
            x = directions[block] @ of_view.T
            slope = torch.zeros_like(x)
            for k, cosine, sine in _waves(x, step, knots):
                slope.addcmul_(cosine, of_cosine[view, k - 1, block, None])
                slope.addcmul_(sine, of_sine[view, k - 1, block, None])
            gradient[view].addmm_(slope.T, directions[block])
    return statistic, gradient


def _waves(x: Tensor, step: float, knots: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield k, ± cos(k h x) and ± sin(k h x) for k = 1 … knots - 1, with the signs +, -, -, + in turn.

    With these signs the recurrence is one operation in place. The tensors of a turn change two turns later.
    """
    x = x * step
    cosines, sines = [torch.ones_like(x), x.cos()], [torch.zeros_like(x), x.sin()]
    twice = 2 * cosines[1]
    for k in range(1, knots):
        now, before = k % 2, (k + 1) % 2
        yield k, cosines[now], sines[now]
        if k + 1 < knots:
            sign = -1 if k % 2 else 1
            for waves in (cosines, sines):
                waves[before].addcmul_(twice, waves[now], value=sign)


def _blocks(directions: int, rows: int, device: torch.device) -> list[slice]:
    size = max((_CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK) // rows, 8)
    return [slice(start, min(start + size, directions)) for start in range(0, directions, size)]


def _check(sigreg_weight: float, t_max: float, knots: int) -> None:
    check_range("sigreg_weight", sigreg_weight, low=0, high=1)
    check_range("t_max", t_max, low=1e-6)
    check_whole("knots", knots, low=2)


class LeJEPALoss(nn.Module):
    """Module of :func:`lejepa_loss` that draws the directions of each step.

    Args:
        num_directions: M ≥ 1.
        seed: of the directions, which depend on it and on the number of the step only.
        sigreg_weight, t_max, knots, comm: as of :func:`lejepa_loss`.
    """

    def __init__(
        self,
        *,
        num_directions: int = 1024,
        sigreg_weight: float = 0.05,
        t_max: float = T_MAX,
        knots: int = KNOTS,
        seed: int = 0,
        comm: Collective = LOCAL,
    ) -> None:
        super().__init__()
        _check(sigreg_weight, t_max, knots)
        check_whole("num_directions", num_directions, low=1)
        self.num_directions, self.sigreg_weight, self.t_max, self.knots = num_directions, sigreg_weight, t_max, knots
        self.seed, self.comm = seed, comm
        self.clock = Clock()

    def terms(self, views: Views, *, large: int | None = None) -> LeJEPALossTerms:
        """Return the loss and its two parts, with the directions of this step."""
        generator = device_generator(self.seed, self.clock.earlier(), views[0].device)
        directions = unit_directions(self.num_directions, views[0].shape[-1], generator)
        return lejepa_terms(
            views,
            directions,
            large=large,
            sigreg_weight=self.sigreg_weight,
            t_max=self.t_max,
            knots=self.knots,
            comm=self.comm,
        )

    def forward(self, views: Views, *, large: int | None = None) -> Float[Tensor, ""]:
        return self.terms(views, large=large).loss

    def extra_repr(self) -> str:
        return (
            f"num_directions={self.num_directions}, sigreg_weight={self.sigreg_weight}, t_max={self.t_max}, "
            f"knots={self.knots}, seed={self.seed}, comm={self.comm}"
        )
