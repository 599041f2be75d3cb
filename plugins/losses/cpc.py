"""CPC: the context above a place of the image predicts the features below it.

van den Oord, Li & Vinyals, "Representation Learning with Contrastive Predictive Coding" (2018, arXiv:1807.03748),
eq. 4, on a grid of patches; Hénaff et al., "Data-Efficient Image Recognition with Contrastive Predictive Coding"
(2019, arXiv:1905.09272), with linear predictions and all locations of the batch as candidates.

The scores of all predictions with all locations are never stored: each block of rows gives its part of the loss and of
the gradient.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from plugins.checks import check_choice, check_count, check_range, check_result, check_whole, compute_dtype
from plugins.clock import Clock
from plugins.distributed import LOCAL, Collective
from plugins.draws import step_generator
from plugins.linalg import attach_gradient, score_blocks

REDUCTIONS = ("mean", "sum")
LEAST = -1e9
"""Logit of a candidate that is the positive itself; finite, because a row may have no other candidate."""


class CPCTerms(NamedTuple):
    """The loss of CPC over several directions, and what it says of the features."""

    loss: Tensor
    """The loss to minimise: the mean over the directions."""
    information: Tensor
    """Logarithm of the number of candidates minus the mean loss of a prediction, in nats: a lower bound of the mutual
    information of a context and a location below it, in expectation (arXiv:1807.03748, eq. 5)."""


class _Grid(NamedTuple):
    """What the M predictions of one image have in common with those of the others."""

    label: Int64[Tensor, " M"]
    """Location of the positive, row-major."""
    weight: Float[Tensor, " M"]
    """Weight in the loss."""


def cpc_loss(
    predictions: Mapping[int, Float[Tensor, "B T R G"]],
    targets: Float[Tensor, "B T G G"],
    *,
    scale: float = 0.1,
    negatives: str | int = "all",
    reduction: str = "mean",
    generator: torch.Generator | None = None,
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """Mean over the offsets k and over image b, row i < G − k, column j of ``−log softmax(s)[b, i + k, j]``.

    ``s = scale ⟨p^k_bij, y_m⟩`` for the locations m of all images of the joined batch.

    Args:
        predictions: for each offset k in 1…G−1 the predictions ``[B, T, G−k, G]`` of the rows i + k. Row i is made from
            the context of the rows up to i.
        targets: y, on the grid of G × G patches, row 0 on top. It gets a gradient.
        scale: factor of the scores, > 0; 0.1 in CPC v2, 1 in CPC v1.
        negatives: "all" locations of the joined batch, or a number n > 0 of locations that are drawn from it, the same
            for all predictions; the positive is not among them.
        reduction: "mean" over the offsets, or "sum" as in the paper.
        generator: draws the negatives, the same on all processes; on the CPU. None is torch's default generator, which
            is refused with several processes, since theirs may differ.
        comm: the processes that share the batch. The targets are gathered, and their gradients are summed over the
            processes in forward. Backward communicates nothing.

    Returns:
        The loss of the joined batch in nats, float32 (float64 for float64 input); log(N G²) for equal scores.

    Raises:
        ValueError: the shapes do not fit, a number is out of range, an unknown choice, drawn negatives without a
            generator on several processes, or (on the CPU) the loss is NaN because of an input that holds NaN or inf.

    >>> zeros = torch.zeros(3, 8, 6, 6)
    >>> round(cpc_loss({3: zeros[:, :, 3:]}, zeros).item(), 5)  # log(3 * 36)
    4.68213
    """
    _check_numbers(scale, negatives, reduction)
    if not isinstance(negatives, str) and generator is None and comm.size > 1:
        raise ValueError("drawn negatives need a generator with the same seed on all processes")
    _check(predictions, targets)
    side = targets.shape[2]
    with torch.autocast(targets.device.type, enabled=False):
        dtype = compute_dtype(targets.dtype)
        p = torch.cat([_rows(each) for each in predictions.values()], 1).to(dtype)
        y = _rows(targets).to(dtype)
        counts = comm.row_counts(len(y), y.device)
        images, before = sum(counts), sum(counts[: comm.rank])
        check_count(images, least=1, what="the CPC loss")
        grid = _grid(predictions, side, images, reduction, y)
        own_p, own_y = p.detach().flatten(0, 1), y.detach().flatten(0, 1)
        columns = comm.gather_rows(y.detach(), counts=counts).flatten(0, 1)
        chosen: Tensor | None = None
        if not isinstance(negatives, str):
            chosen = torch.randperm(len(columns), generator=generator)[:negatives].to(y.device)
            columns = columns[chosen]
        wanted = torch.is_grad_enabled() and (p.requires_grad or y.requires_grad)
        by_p, by_y, by_columns = torch.zeros_like(own_p), torch.zeros_like(own_y), torch.zeros_like(columns)
        total = own_p.new_zeros(())
        for part in score_blocks(len(own_p), len(columns), y.device):
            image, place = _places(part, len(grid.label), y.device)
            positive = image * side**2 + grid.label[place]  # among the targets of this process
            joined = positive + before * side**2
            logits = own_p[part] @ columns.T
            if chosen is not None:
                logits = logits.masked_fill_(chosen == joined[:, None], LEAST)
                own = (own_p[part] * own_y[positive]).sum(1, keepdim=True)
                logits, joined = torch.cat([logits, own], 1), torch.full_like(joined, len(columns))
            log_q = logits.mul_(scale).log_softmax(1)
            weight = grid.weight[place]
            total = total - (log_q.gather(1, joined[:, None]).squeeze(1) * weight).sum()
            if wanted:
                slope = log_q.exp_().mul_(weight[:, None])
                slope.scatter_add_(1, joined[:, None], -weight[:, None])
                if chosen is not None:
                    last, slope = slope[:, -1:], slope[:, :-1]
                    by_p[part] = last * own_y[positive]
                    by_y.index_add_(0, positive, last * own_p[part])
                by_p[part] += slope @ columns
                by_columns.addmm_(slope.T, own_p[part])
        loss = comm.sum(total)
        if wanted:
            by_columns = comm.sum(by_columns)
            if chosen is None:
                by_y += by_columns[before * side**2 :][: len(by_y)]
            else:
                ours = (chosen >= before * side**2) & (chosen < before * side**2 + len(by_y))
                by_y[chosen[ours] - before * side**2] += by_columns[ours]
            factor = comm.size * scale
            loss = attach_gradient(loss, [p, y], [by_p.mul_(factor).view_as(p), by_y.mul_(factor).view_as(y)])
    check_result(
        "the CPC loss", loss, comm, targets=targets, **{f"predictions[{k}]": z for k, z in predictions.items()}
    )
    return loss


def cpc_terms(
    directions: Sequence[tuple[Mapping[int, Float[Tensor, "B T R G"]], Float[Tensor, "B T G G"]]],
    *,
    scale: float = 0.1,
    negatives: str | int = "all",
    reduction: str = "mean",
    generator: torch.Generator | None = None,
    comm: Collective = LOCAL,
) -> CPCTerms:
    """Return the mean of :func:`cpc_loss` over directions, and the information that the predictions have.

    Args:
        directions: the first two arguments of ``cpc_loss`` for each direction, with the same offsets.
        scale: as in ``cpc_loss``.
        negatives: as in ``cpc_loss``; each direction has its own draw.
        reduction: as in ``cpc_loss``.
        generator: as in ``cpc_loss``.
        comm: as in ``cpc_loss``.

    Raises:
        ValueError: there is no direction, or as ``cpc_loss``.

    >>> zeros = torch.zeros(3, 8, 6, 6)
    >>> terms = cpc_terms([({3: zeros[:, :, 3:]}, zeros)] * 2)
    >>> round(terms.loss.item(), 5), abs(terms.information.item()) < 1e-6
    (4.68213, True)
    """
    if not directions:
        raise ValueError("directions must have at least one entry, got none")
    losses = []
    for predictions, targets in directions:
        kwargs = {"scale": scale, "negatives": negatives, "reduction": reduction, "generator": generator}
        losses.append(cpc_loss(predictions, targets, **kwargs, comm=comm))
    loss = torch.stack(losses).mean()
    predictions, targets = directions[0]
    images = sum(comm.row_counts(len(targets), targets.device))
    locations = images * targets.shape[2] ** 2
    # a drawn location that is the positive itself is no candidate: rare, and not counted
    candidates = locations if isinstance(negatives, str) else min(negatives + 1, locations)
    mean = loss.detach() / (len(predictions) if reduction == "sum" else 1)
    return CPCTerms(loss, math.log(candidates) - mean)


class CPCLoss(nn.Module):
    """Module of :func:`cpc_terms`. It draws negatives from a seed and the step, the same on all processes.

    Args:
        scale: as in :func:`cpc_loss`.
        negatives: as in :func:`cpc_loss`.
        reduction: as in :func:`cpc_loss`.
        seed: of drawn negatives.
        comm: the processes that share the batch.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        scale: float = 0.1,
        negatives: str | int = "all",
        reduction: str = "mean",
        seed: int = 0,
        comm: Collective = LOCAL,
    ) -> None:
        super().__init__()
        _check_numbers(scale, negatives, reduction)
        check_whole("seed", seed, low=0)
        self.scale, self.negatives, self.reduction, self.seed, self.comm = scale, negatives, reduction, seed, comm
        self.clock = None if negatives == "all" else Clock()

    def forward(
        self, predictions: Mapping[int, Float[Tensor, "B T R G"]], targets: Float[Tensor, "B T G G"]
    ) -> Float[Tensor, ""]:
        return self.terms([(predictions, targets)]).loss

    def terms(
        self, directions: Sequence[tuple[Mapping[int, Float[Tensor, "B T R G"]], Float[Tensor, "B T G G"]]]
    ) -> CPCTerms:
        """Return the loss over all directions, and the information."""
        return cpc_terms(
            directions,
            scale=self.scale,
            negatives=self.negatives,
            reduction=self.reduction,
            generator=None if self.clock is None else step_generator(self.seed, self.clock.earlier()),
            comm=self.comm,
        )

    def extra_repr(self) -> str:
        return (
            f"scale={self.scale}, negatives={self.negatives!r}, reduction={self.reduction!r}, seed={self.seed}, "
            f"comm={self.comm}"
        )


def non_overlapping_offsets(grid: int, patch: int, stride: int, *, most: int = 5) -> list[int]:
    """Return the offsets of CPC whose patches share no pixel with the context: k · stride ≥ patch, at most five.

    Args:
        grid: number of patches along a side, G.
        patch: side of a patch in pixels.
        stride: distance of neighbouring patches in pixels.
        most: the largest number of offsets.

    Raises:
        ValueError: there are none.

    >>> non_overlapping_offsets(6, 80, 36), non_overlapping_offsets(7, 64, 32)  # CPC v2 and CPC v1 on ImageNet
    ([3, 4, 5], [2, 3, 4, 5, 6])
    """
    found = [k for k in range(1, grid) if k * stride >= patch][:most]
    if not found:
        raise ValueError(
            f"{grid} x {grid} patches of {patch} pixels at a distance of {stride} overlap at every offset; take a "
            "larger stride or more patches"
        )
    return found


def _rows(maps: Float[Tensor, "B T R G"]) -> Float[Tensor, "B M T"]:
    return maps.flatten(2).transpose(1, 2)


def _grid(predictions: Mapping[int, Tensor], side: int, images: int, reduction: str, like: Tensor) -> _Grid:
    offsets = len(predictions) if reduction == "mean" else 1
    label = [torch.arange(k * side, side**2, device=like.device) for k in predictions]
    weight = [like.new_full((len(each),), 1 / (offsets * images * len(each))) for each in label]
    return _Grid(torch.cat(label), torch.cat(weight))


def _places(part: slice, per_image: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the image on this process and the place in the grid of each row of a block."""
    rows = torch.arange(part.start, part.stop, device=device)
    return rows // per_image, rows % per_image


def _check_numbers(scale: float, negatives: str | int, reduction: str) -> None:
    check_range("scale", scale, low=1e-6)
    check_choice("reduction", reduction, REDUCTIONS)
    if isinstance(negatives, str):
        check_choice("negatives", negatives, ("all",))
    else:
        check_whole("negatives", negatives, low=1)


def _check(predictions: Mapping[int, Tensor], targets: Tensor) -> None:
    if targets.ndim != 4 or targets.shape[2] != targets.shape[3]:
        raise ValueError(f"targets must be [B, T, G, G], got {tuple(targets.shape)}")
    if not predictions:
        raise ValueError("predictions are missing: give those of at least one offset")
    batch, width, side, _ = targets.shape
    for k, each in predictions.items():
        if not 0 < k < side or each.shape != (batch, width, side - k, side):
            raise ValueError(
                f"predictions of offset k must be {[batch, width]} x (G − k) x G with 0 < k < G = {side}, got "
                f"{tuple(each.shape)} for k = {k}"
            )
