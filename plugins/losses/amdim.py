"""AMDIM: global features of one view predict the local features of another.

Bachman, Hjelm & Buchwalter, "Learning Representations by Maximizing Mutual Information Across Views" (NeurIPS 2019,
arXiv:1906.00910), section 3. The paper weights the regulariser by 0.04, the published code by 0.05.

The ``[N, N, L]`` scores of all images at all locations are never stored: each block of rows gives its part of the loss
and of the gradient.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from plugins.checks import check_count, check_range, check_result, compute_dtype
from plugins.distributed import LOCAL, Collective
from plugins.linalg import attach_gradient, score_blocks

LARGEST_EXPONENT = 40.0
"""Clipped scores up to this size, with either sign, have exponentials whose sum is a normal float32."""


class AMDIMTerms(NamedTuple):
    """Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    """In nats. It contains the regulariser."""
    reg: Float[Tensor, ""]
    """The regulariser, weight times mean squared score, ≥ 0."""


class AMDIMView(NamedTuple):
    """The embeddings of one view; locations of a map are flattened."""

    whole: Float[Tensor, "B D"]
    """Of the whole image."""
    coarse: Float[Tensor, "B D L"]
    """Of the L locations of the coarser map."""
    fine: Float[Tensor, "B D M"]
    """Of the M locations of the finer map."""


def amdim_nce(
    source: Float[Tensor, "B D"],
    targets: Float[Tensor, "B D L"],
    *,
    clip: float = 20.0,
    reg: float = 0.05,
    comm: Collective = LOCAL,
) -> AMDIMTerms:
    """``mean_il log(1 + Σ_{j≠i,m} exp(ŝ_ijm − ŝ_iil)) + λ mean_ijl s_ijl²``, images i and j, locations l and m.

    ``s_ijl = ⟨a_i, T_jl⟩ / √D`` and ``ŝ = c tanh(s / c)``. All locations of the other images are negatives; the other
    locations of the own image are not.

    Args:
        source: a, one row for each image.
        targets: T, the map of each image with its L ≥ 1 locations flattened.
        clip: c > 0, the largest absolute score.
        reg: weight λ ≥ 0 of the regulariser.
        comm: the processes that share the batch. Sources and targets are gathered, and two numbers a row more if
            gradients are needed. Backward communicates nothing.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input). Its first term is between 0 and
        2 c + log(1 + L (N − 1)), and 0 if N = 1.

    Raises:
        ValueError: the shapes do not fit, a number is out of range, or (on the CPU) an input holds NaN or inf.

    >>> zeros = torch.zeros(7, 8)
    >>> round(amdim_nce(zeros, zeros[..., None].expand(7, 8, 25)).loss.item(), 5)  # log(1 + 6 * 25)
    5.01728
    """
    return _nce([source], targets, clip, reg, comm)


def amdim_loss(
    views: Sequence[AMDIMView],
    locations: Sequence[Int64[Tensor, " B"]],
    *,
    large: int | None = None,
    clip: float = 20.0,
    reg: float = 0.05,
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """Mean over view v and large view u ≠ v of ``whole → coarse + whole → fine + coarse at l → coarse``.

    Each term is :func:`amdim_nce` with a source of view v and a map of view u as targets. ``coarse at l`` is the coarse
    map of v at one location per image. For two views this is the sum of the published code.

    Args:
        views: V ≥ 2 views, large ones first. Small crops may have smaller maps.
        locations: for each view the location l of each image, in 0…L−1.
        large: number of large views, 1…V; None means all.
        clip: as for :func:`amdim_nce`.
        reg: as for :func:`amdim_nce`.
        comm: as for :func:`amdim_nce`.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input).

    Raises:
        ValueError: fewer than two views, not one vector of locations for each view, ``large`` is out of range, or what
            :func:`amdim_nce` does not accept.

    >>> zeros = torch.zeros(7, 8)
    >>> view = AMDIMView(zeros, zeros[..., None].expand(7, 8, 4), zeros[..., None].expand(7, 8, 16))
    >>> location = torch.zeros(7, dtype=torch.int64)
    >>> round(amdim_loss([view, view], [location, location]).item(), 5)  # 2 log(1 + 6 * 4) + log(1 + 6 * 16)
    11.01246
    """
    return amdim_terms(views, locations, large=large, clip=clip, reg=reg, comm=comm).loss


def amdim_terms(
    views: Sequence[AMDIMView],
    locations: Sequence[Int64[Tensor, " B"]],
    *,
    large: int | None = None,
    clip: float = 20.0,
    reg: float = 0.05,
    comm: Collective = LOCAL,
) -> AMDIMTerms:
    """Return :func:`amdim_loss` and the regularisers of its terms."""
    if len(views) < 2 or len(locations) != len(views):
        raise ValueError(
            f"amdim_loss needs at least 2 views and a vector of locations for each, got {len(views)} views and "
            f"{len(locations)} vectors"
        )
    large = len(views) if large is None else large
    check_range("large", large, low=1, high=len(views))
    for view, where in zip(views, locations, strict=True):
        places = view.coarse.shape[2]
        if where.device.type == "cpu" and not torch.compiler.is_compiling() and ((where < 0) | (where >= places)).any():
            raise ValueError(f"locations must be in 0…{places - 1}, got {where.min():d} to {where.max():d}")
    local = [
        view.coarse.gather(2, where[:, None, None].expand(-1, view.coarse.shape[1], 1)).squeeze(2)
        for view, where in zip(views, locations, strict=True)
    ]
    terms = []
    for u, target in enumerate(views[:large]):
        others = [v for v in range(len(views)) if v != u]
        whole = [views[v].whole for v in others]
        # each mean is over all rows of its sources: weigh it by their number, in units of the pairs of views
        terms.append(_nce([*whole, *(local[v] for v in others)], target.coarse, clip, reg, comm, weight=2.0))
        terms.append(_nce(whole, target.fine, clip, reg, comm))
    loss, regs = (torch.stack(part).sum() / large for part in zip(*terms, strict=True))
    return AMDIMTerms(loss, regs)


def _nce(
    sources: Sequence[Tensor], targets: Tensor, clip: float, reg: float, comm: Collective, weight: float = 1.0
) -> AMDIMTerms:
    """Return a weight times the mean of :func:`amdim_nce` over sources that share their targets."""
    check_range("clip", clip, low=1e-6)
    check_range("reg", reg, low=0)
    _check(sources, targets)
    with torch.autocast(targets.device.type, enabled=False):
        dtype = compute_dtype(torch.promote_types(sources[0].dtype, targets.dtype))
        a = torch.stack([*sources], 1).to(dtype)
        t = targets.transpose(1, 2).contiguous().to(dtype)
        (size, shared, width), locations = a.shape, t.shape[1]
        counts = comm.row_counts(size, a.device)
        images, before = sum(counts), sum(counts[: comm.rank])
        check_count(images, least=1, what="the AMDIM loss")
        rows, scale = images * shared, 1 / math.sqrt(width)
        pull = 2 * reg / images  # derivative of the regulariser over that of the mean, per score
        own_a, own_t = a.detach().flatten(0, 1) * scale, t.detach().flatten(0, 1)
        all_t = comm.gather_rows(t.detach(), counts=counts).flatten(0, 1)
        wanted = torch.is_grad_enabled() and (a.requires_grad or t.requires_grad)
        by_a, by_t = torch.empty_like(own_a), torch.empty_like(own_t)  # blocks write them
        parts = [own_a.new_zeros(2)]
        log_masses, all_missed = own_a.new_empty(len(own_a)), own_a.new_empty(len(own_a))
        least = max(16, width // 3)  # a block of scores takes at most a third of the memory of the maps
        blocks = score_blocks(len(own_a), len(all_t), a.device, least=least)
        memory = own_a.new_empty(blocks[0].stop if blocks else 0, len(all_t))
        for part in blocks:
            slopes = memory[: part.stop - part.start]
            every = torch.mm(own_a[part], all_t.T, out=slopes).unflatten(1, (images, locations))
            # few rows, which stay in the cache; with gradients the slopes overwrite their scores
            for few in score_blocks(len(every), 4 * len(all_t), a.device, least=4):
                scores, here = every[few], slice(part.start + few.start, part.start + few.stop)
                each = torch.arange(len(scores), device=a.device)
                own = each, (each + here.start) // shared + before
                block = _Block.of(scores, own, clip)
                log_masses[here] = log_mass = block.mass.sum((1, 2)).log() + block.top
                missed = (log_mass[:, None] - block.positive).sigmoid()
                all_missed[here] = missed.sum(1)
                lost = torch.logaddexp(log_mass[:, None] - block.positive, missed.new_zeros(()))
                parts.append(torch.stack([lost.sum() / (rows * locations), _mean_square(scores, rows)]))
                if wanted:
                    slope = block.slope(scores, own, missed, all_missed[here], log_mass, pull)
                    scores.copy_(slope.view_as(scores))
            if wanted:
                torch.mm(slopes, all_t, out=by_a[part])
                if comm.size == 1:
                    by_t.addmm_(slopes.T, own_a[part], beta=float(part.start > 0))
        nce, square = comm.sum(torch.stack(parts).sum(0)).unbind()
        regularizer = weight * reg * square
        loss = weight * nce + regularizer
        if wanted:
            if comm.size > 1:  # the columns of this process, of which other processes hold the rows
                all_a = comm.gather_rows(own_a.unflatten(0, (size, shared)), counts=counts).flatten(0, 1)
                sums = torch.stack([log_masses, all_missed], 1).unflatten(0, (size, shared))
                log_masses, all_missed = comm.gather_rows(sums, counts=counts).flatten(0, 1).unbind(1)
                for part in score_blocks(len(all_a), len(own_t), a.device, least=least) if size else []:
                    image = torch.arange(part.start, part.stop, device=a.device) // shared - before
                    inside = ((image >= 0) & (image < size)).nonzero().squeeze(1)
                    own = inside, image[inside]
                    scores = (all_a[part] @ own_t.T).unflatten(1, (size, locations))
                    block, log_mass = _Block.of(scores, own, clip), log_masses[part]
                    missed = (log_mass[inside, None] - block.positive).sigmoid()
                    slope = block.slope(scores, own, missed, all_missed[part], log_mass, pull)
                    by_t.addmm_(slope.T, all_a[part], beta=float(part.start > 0))
            factor = comm.size * weight / (rows * locations)
            by_a.mul_(factor * scale)
            gradients = [by_a.view_as(a), by_t.mul_(factor).view_as(t)]
            loss = attach_gradient(loss, [a, t], gradients)
    check_result("the AMDIM loss", loss, comm, targets=targets, **{f"source {s}": z for s, z in enumerate(sources)})
    return AMDIMTerms(loss, regularizer)


Own = tuple[Tensor, Tensor]
"""Positions of the scores of an image with its own map: rows of a block, and images among its columns."""


class _Block(NamedTuple):
    """A block of rows, b, against J images with L locations."""

    ratio: Float[Tensor, "b J L"]
    """Clipped scores over c, tanh(s / c)."""
    mass: Float[Tensor, "b J L"]
    """Exponentials of the clipped scores minus ``top``, 0 at the own image."""
    positive: Float[Tensor, "k L"]
    """Clipped scores with the own map."""
    top: Float[Tensor, " b"]
    clip: float

    @classmethod
    def of(cls, scores: Float[Tensor, "b J L"], own: Own, clip: float) -> "_Block":
        """Compute a block."""
        ratio = _tanh(scores / clip) if clip <= LARGEST_EXPONENT else (scores / clip).tanh_()
        clipped = ratio * clip
        positive = clipped[own]
        clipped[own] = -math.inf
        top = scores.new_zeros(len(scores))
        if clip > LARGEST_EXPONENT:
            top = clipped.flatten(1).amax(1).clamp_min(-clip)
            clipped.sub_(top[:, None, None])
        return cls(ratio, clipped.exp_(), positive, top, clip)

    def slope(
        self, scores: Tensor, own: Own, missed: Tensor, all_missed: Tensor, log_mass: Tensor, pull: float
    ) -> Tensor:
        """Return the derivative by the scores of the mean over rows and locations, times their number, ``[b, J L]``.

        It overwrites the block.

        Args:
            scores: s.
            own: as for :meth:`of`.
            missed: 1 − p at the own map's locations, ``[k, L]``.
            all_missed: their sum for each row, ``[b]``.
            log_mass: logarithm of the sum of the exponentials over the negatives, ``[b]``; −inf without any.
            pull: weight of s itself, the regulariser's part.
        """
        # at least −c, but for rows without negatives, whose all_missed is 0
        factor = all_missed * (self.top - log_mass.clamp_min(-self.clip)).exp()
        slope = self.mass.mul_(factor[:, None, None])
        slope[own] = -missed
        return slope.addcmul_(slope, self.ratio.square_(), value=-1).add_(scores, alpha=pull).flatten(1)


def _tanh(x: Tensor) -> Tensor:
    """Overwrite x by its tanh with an absolute error of about the machine's epsilon, in a third of the time of tanh."""
    return x.mul_(-2).sigmoid_().mul_(-2).add_(1)


def _mean_square(scores: Tensor, rows: int) -> Tensor:
    """Return the block's part of the mean over all rows, images and locations of s²."""
    return torch.linalg.vector_norm(scores).square() / (rows * scores[0].numel())


def _check(sources: Sequence[Tensor], targets: Tensor) -> None:
    for source in sources:
        if source.ndim != 2 or targets.ndim != 3 or source.shape != targets.shape[:2] or 0 in targets.shape[1:]:
            raise ValueError(
                "the AMDIM loss needs sources [N, D] and targets [N, D, L] with L > 0, got "
                f"{tuple(source.shape)} and {tuple(targets.shape)}"
            )


class AMDIMLoss(nn.Module):
    """Module of :func:`amdim_loss`; the arguments are the same."""

    def __init__(self, *, clip: float = 20.0, reg: float = 0.05, comm: Collective = LOCAL) -> None:
        super().__init__()
        check_range("clip", clip, low=1e-6)
        check_range("reg", reg, low=0)
        self.clip, self.reg, self.comm = clip, reg, comm

    def forward(
        self, views: Sequence[AMDIMView], locations: Sequence[Int64[Tensor, " B"]], *, large: int | None = None
    ) -> Float[Tensor, ""]:
        return self.terms(views, locations, large=large).loss

    def terms(
        self, views: Sequence[AMDIMView], locations: Sequence[Int64[Tensor, " B"]], *, large: int | None = None
    ) -> AMDIMTerms:
        """Return the loss and its parts."""
        return amdim_terms(views, locations, large=large, clip=self.clip, reg=self.reg, comm=self.comm)

    def extra_repr(self) -> str:
        return f"clip={self.clip}, reg={self.reg}, comm={self.comm}"
