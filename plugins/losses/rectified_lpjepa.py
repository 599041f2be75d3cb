"""Rectified LpJEPA: the views agree, and the sparse embedding is distributed as a rectified generalised Gaussian.

Kuang, Dagade, Rudner, Balestriero & LeCun, "Rectified LpJEPA: Joint-Embedding Predictive Architectures with Sparse and
Maximum-Entropy Representations" (2026, arXiv:2602.01456); docs/specs/rectified_lpjepa.md numbers the equations. The
published code has two views, and each process draws directions and targets of its own.

The distance is computed in blocks of directions, which are divided among the processes.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import (
    check_choice,
    check_count,
    check_range,
    check_result,
    check_rows,
    check_views,
    check_whole,
    compute_dtype,
)
from plugins.clock import Clock
from plugins.distributed import LOCAL, Collective
from plugins.draws import device_generator, unit_directions
from plugins.generalized_gaussian import (
    draw_generalized_gaussian,
    rectified_unit_variance_scale,
    unit_variance_scale,
)
from plugins.linalg import attach_gradient, centre_distance, score_blocks

Views = Sequence[Float[Tensor, "B D"]] | Float[Tensor, "V B D"]
PROJECTIONS = ("random", "torch_svd_and_random", "torch_svd_bottom_half_eigen_and_random")
"""Names of the published code: random directions, or singular vectors of each view (all, the last half) before them."""
TARGETS = ("rectified_lp_distribution", "lp_distribution")
SIGMAS = ("sigma_GN", "sigma_RGN")


class RectifiedLpJEPALossTerms(NamedTuple):
    """``loss = invariance_loss_weight * invariance + rdm_reg_loss_weight * rdm``. Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    invariance: Float[Tensor, ""]
    """Mean squared difference of two views, over all pairs of views: 0 if they agree."""
    rdm: Float[Tensor, ""]
    """Mean squared distance of sorted projections from those of the targets; about 0.5 if the embedding is 0."""


def rectified_lpjepa_loss(
    views: Views,
    directions: Float[Tensor, "P D"],
    targets: Float[Tensor, "N D"],
    *,
    invariance_loss_weight: float = 25.0,
    rdm_reg_loss_weight: float = 125.0,
    projection_vectors_type: str = "random",
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """``L = w_inv mean (z_u - z_v)² + w_rdm mean_v SW(z_v)``, with the sliced Wasserstein distance SW to the targets.

    ``SW(z)`` is the mean over directions a of ``mean_i (sort(z a)_i - sort(y a)_i)²`` over the N joined rows.

    Args:
        views: projections of V ≥ 2 views, as a list or one tensor.
        directions: unit rows, the same on all processes.
        targets: sample y of the wanted distribution, one row for each joined row, the same on all processes.
        invariance_loss_weight: w_inv ≥ 0. The mean is over all pairs of views, rows and columns.
        rdm_reg_loss_weight: w_rdm ≥ 0.
        projection_vectors_type: one of PROJECTIONS. Singular vectors of the centred joined rows of a view replace the
            first directions.
        comm: the processes that share the batch. V N D numbers are gathered, and as many summed if gradients are
            needed; nothing in backward.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input).

    Raises:
        ValueError: a tensor in place of a list, shapes differ, fewer than two views, no row, another number of
            targets, a number out of range, or (on the CPU) a view holds NaN or inf.

    >>> z = torch.tensor([[3.0], [1.0]])
    >>> rectified_lpjepa_loss([z, z], torch.ones(1, 1), torch.tensor([[2.0], [1.0]])).item()  # 125 (0 + 1²) / 2
    62.5
    """
    return rectified_lpjepa_terms(
        views,
        directions,
        targets,
        invariance_loss_weight=invariance_loss_weight,
        rdm_reg_loss_weight=rdm_reg_loss_weight,
        projection_vectors_type=projection_vectors_type,
        comm=comm,
    ).loss


def rectified_lpjepa_terms(
    views: Views,
    directions: Float[Tensor, "P D"],
    targets: Float[Tensor, "N D"],
    *,
    invariance_loss_weight: float = 25.0,
    rdm_reg_loss_weight: float = 125.0,
    projection_vectors_type: str = "random",
    comm: Collective = LOCAL,
    counts: list[int] | None = None,
) -> RectifiedLpJEPALossTerms:
    """Return the loss and its two parts; ``counts`` are the numbers of rows of the processes if they are known."""
    named = check_views(views=views)
    if len(named) < 2:
        raise ValueError(f"the Rectified LpJEPA loss needs at least 2 views, got {len(named)}")
    _check(invariance_loss_weight, rdm_reg_loss_weight, projection_vectors_type)
    check_rows(directions=directions)
    count, width = len(views), views[0].shape[1]
    dtype = compute_dtype(reduce(torch.promote_types, [view.dtype for view in views]))
    with torch.autocast(views[0].device.type, enabled=False):
        counts = comm.row_counts(len(views[0]), views[0].device) if counts is None else counts
        rows = sum(counts)
        check_count(rows, least=1, what="the Rectified LpJEPA loss")
        if directions.shape[1] != width or targets.shape != (rows, width):
            raise ValueError(
                f"directions must be [P, {width}] and targets [{rows}, {width}], got {tuple(directions.shape)} and "
                f"{tuple(targets.shape)}"
            )
        z = torch.stack([view.detach().to(dtype) for view in views])
        wanted = torch.is_grad_enabled() and any(view.requires_grad for view in views)
        away, slope = centre_distance(z, count)
        invariance = comm.sum(away) * (2 / ((count - 1) * rows * width))
        joined = comm.gather_rows(z.transpose(0, 1), counts=counts).transpose(0, 1).contiguous()
        axes = projection_directions(joined, directions.to(dtype), projection_vectors_type)
        # each process has its share of the directions
        mine = axes[:, comm.rank :: comm.size]
        rdm, gradient = sliced_distance(joined, mine, targets.to(dtype), wanted)
        scale = 1 / (count * rows * len(directions))
        rdm = comm.sum(rdm) * scale
        loss = invariance_loss_weight * invariance + rdm_reg_loss_weight * rdm
        if wanted:
            first = sum(counts[: comm.rank])
            gradient = comm.sum(gradient)[:, first : first + z.shape[1]]
            pull = invariance_loss_weight * 2 / ((count - 1) * rows * width)
            gradients = slope.mul_(pull).add_(gradient, alpha=rdm_reg_loss_weight * scale).mul_(comm.size)
            loss = attach_gradient(loss, list(views), list(gradients))
    check_result("the Rectified LpJEPA loss", loss, comm, **named)
    return RectifiedLpJEPALossTerms(loss, invariance, rdm)


def projection_directions(
    z: Float[Tensor, "V N D"], directions: Float[Tensor, "P D"], projection_vectors_type: str
) -> Float[Tensor, "W P D"]:
    """Return the directions of each view, or one entry for all views if they have the same.

    Args:
        z: joined rows.
        directions: random unit rows.
        projection_vectors_type: one of PROJECTIONS.
    """
    if projection_vectors_type == "random":
        return directions[None]
    finite = torch.nan_to_num(z)  # the solver raises for NaN, which the distance shows without it
    vectors = torch.linalg.svd(finite - finite.mean(1, keepdim=True), full_matrices=False).Vh
    if projection_vectors_type == "torch_svd_bottom_half_eigen_and_random":
        vectors = vectors[:, vectors.shape[1] // 2 :]
    vectors = vectors[:, : len(directions)]
    return torch.cat([vectors, directions[vectors.shape[1] :].expand(len(z), -1, -1)], 1)


def sliced_distance(
    z: Float[Tensor, "V N D"], axes: Float[Tensor, "W P D"], targets: Float[Tensor, "N D"], wanted: bool
) -> tuple[Float[Tensor, ""], Float[Tensor, "V N D"]]:
    """Return the sum over views, directions and rows of ``(sort(z a) - sort(y a))²``, and its gradient if wanted.

    Args:
        z: joined rows.
        axes: directions of each view, or of all (W = 1).
        targets: rows y.
        wanted: whether the gradient is computed; it is empty otherwise.
    """
    total = z.new_zeros(())
    gradient = torch.zeros_like(z) if wanted else z.new_empty(0)
    for block in score_blocks(axes.shape[1], 4 * z.shape[1], z.device):  # projections, ranks and their gradients
        for which, of_block in enumerate(axes[:, block]):
            wished = (of_block @ targets.T).sort(1).values
            for view in range(len(z)) if len(axes) == 1 else (which,):
                found, order = (of_block @ z[view].T).sort(1)
                found.sub_(wished)
                total += torch.linalg.vector_norm(found).square()
                if wanted:
                    slope = torch.empty_like(found).scatter_(1, order, found)
                    gradient[view].addmm_(slope.T, of_block, alpha=2)
    return total, gradient


def _check(invariance_loss_weight: float, rdm_reg_loss_weight: float, projection_vectors_type: str) -> None:
    check_range("invariance_loss_weight", invariance_loss_weight, low=0)
    check_range("rdm_reg_loss_weight", rdm_reg_loss_weight, low=0)
    check_choice("projection_vectors_type", projection_vectors_type, PROJECTIONS)


class RectifiedLpJEPALoss(nn.Module):
    """Module of :func:`rectified_lpjepa_loss` that draws the directions and targets of each step.

    Args:
        num_projections: P ≥ 1.
        target_distribution: one of TARGETS: ``max(X, 0)`` or X, for X of ``GN_p(μ, σ)``.
        lp_norm_parameter: p in [0.1, 100]: 1 is the (rectified) Laplace distribution, 2 the Gaussian.
        mean_shift_value: μ. A smaller one makes the embedding sparser.
        mode_of_sigma: "sigma_GN", X has the variance 1 for μ = 0, or "sigma_RGN", ``max(X, 0)`` has the variance 1.
        seed: of the draws, which depend on it and on the number of the step only.
        invariance_loss_weight, rdm_reg_loss_weight, projection_vectors_type, comm: as of
            :func:`rectified_lpjepa_loss`.
    """

    def __init__(
        self,
        *,
        invariance_loss_weight: float = 25.0,
        rdm_reg_loss_weight: float = 125.0,
        num_projections: int = 8192,
        projection_vectors_type: str = "random",
        target_distribution: str = "rectified_lp_distribution",
        lp_norm_parameter: float = 1.0,
        mean_shift_value: float = 0.0,
        mode_of_sigma: str = "sigma_GN",
        seed: int = 0,
        comm: Collective = LOCAL,
    ) -> None:
        super().__init__()
        _check(invariance_loss_weight, rdm_reg_loss_weight, projection_vectors_type)
        check_whole("num_projections", num_projections, low=1)
        check_choice("target_distribution", target_distribution, TARGETS)
        check_choice("mode_of_sigma", mode_of_sigma, SIGMAS)
        check_range("lp_norm_parameter", lp_norm_parameter, low=0.1, high=100)
        check_range("mean_shift_value", mean_shift_value, low=-100, high=100)
        self.weights = {
            "invariance_loss_weight": invariance_loss_weight,
            "rdm_reg_loss_weight": rdm_reg_loss_weight,
            "projection_vectors_type": projection_vectors_type,
        }
        self.num_projections, self.rectified = num_projections, target_distribution == TARGETS[0]
        self.p, self.mean = float(lp_norm_parameter), mean_shift_value
        if mode_of_sigma == "sigma_GN":
            self.scale = unit_variance_scale(self.p)
        else:
            self.scale = rectified_unit_variance_scale(self.p, self.mean)
        self.seed, self.comm = seed, comm
        self.clock = Clock()

    def draw(self, rows: int, width: int, step: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the directions ``[P, D]`` and the targets ``[N, D]`` of a step.

        Args:
            rows: N, number of joined rows.
            width: D.
            step: number of earlier steps.
            like: a tensor on the device.
        """
        generator = device_generator(self.seed, step, like.device)
        directions = unit_directions(self.num_projections, width, generator)
        targets = draw_generalized_gaussian(rows, width, self.p, generator).mul_(self.scale).add_(self.mean)
        return directions, targets.relu_() if self.rectified else targets

    def terms(self, views: Views) -> RectifiedLpJEPALossTerms:
        """Return the loss and its two parts, with the directions and targets of this step."""
        rows, width = views[0].shape
        counts = self.comm.row_counts(rows, views[0].device)
        drawn = self.draw(sum(counts), width, self.clock.earlier(), views[0])
        return rectified_lpjepa_terms(views, *drawn, **self.weights, comm=self.comm, counts=counts)

    def forward(self, views: Views) -> Float[Tensor, ""]:
        return self.terms(views).loss

    def extra_repr(self) -> str:
        of_draws = f"num_projections={self.num_projections}, rectified={self.rectified}, p={self.p}, mean={self.mean}"
        weights = ", ".join(f"{name}={value!r}" for name, value in self.weights.items())
        return f"{weights}, {of_draws}, scale={self.scale:g}, seed={self.seed}, comm={self.comm}"
