"""ReLIC: instance discrimination whose distribution over the candidates is the same under every augmentation.

Mitrovic, McWilliams, Walker, Buesing & Blundell, "Representation Learning via Invariant Causal Mechanisms" (ICLR 2021,
arXiv:2010.07922), eq. 3, with means in place of its sums: for two views and one divergence, the sum with α is twice the
mean with α / 2. The paper states neither τ nor α. ``pairs="all"`` and ``candidates`` are those of ReLICv2 (Tomasev et
al. 2022, arXiv:2201.05119); ``kl="column"`` is that of the re-implementation github.com/filipbasara0/relic.

The N x N matrices of similarities are never stored: each block of rows gives its part of the loss and of the gradient.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from plugins.checks import (
    check_choice,
    check_count,
    check_indices,
    check_range,
    check_result,
    check_views,
    compute_dtype,
)
from plugins.distributed import LOCAL, Collective
from plugins.linalg import attach_gradient, row_blocks, tangent, unit_rows

KL = ("forward", "symmetric", "column")
STOP = ("target", "entropy", "none")
PAIRS = ("cross", "all")
LEAST = -1e9
"""Logit of a column that is left out; finite, because differences of logits are taken."""
Views = Sequence[Float[Tensor, "B D"]] | Float[Tensor, "V B D"]
Matrix = tuple[int, int]
"""A matrix of logits: the side of its rows and the side of its columns."""


class ReLICLossTerms(NamedTuple):
    """In nats. Only ``loss = contrastive + α invariance + α_s invariance_small`` has a gradient."""

    loss: Float[Tensor, ""]
    contrastive: Float[Tensor, ""]
    """Mean of -log P_ab[i, i]: log N if all rows are equal."""
    invariance: Float[Tensor, ""]
    """Mean divergence of the distributions of two views, ≥ 0."""
    invariance_small: Float[Tensor, ""]
    """Mean divergence of small crops from large views, ≥ 0; 0 if ``alpha_small`` is 0, or without such pairs."""
    temperature: Float[Tensor, ""]
    """τ, which may be learned."""


class _Job(NamedTuple):
    """Matrices that are needed at the same time, how many of them are contrastive, and the divergences to take.

    If ``small``, these are the divergences of small crops from large views.
    """

    matrices: list[Matrix]
    contrastive: int
    divergences: list[tuple[int, int]]
    small: bool = False


def relic_loss(
    online: Views,
    target: Views,
    *,
    temperature: float | Float[Tensor, ""] = 0.2,
    alpha: float = 1.0,
    alpha_small: float = 0.0,
    kl: str = "forward",
    stop: str = "target",
    pairs: str = "cross",
    candidates: Int64[Tensor, " K"] | None = None,
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """``L = mean_(a, b) mean_i -log P_ab[i, i] + α mean_(a, b) mean_i KL(P_ab[i] || P_ba[i])``.

    ``P_ab[i]`` is the softmax over the images j of ``cos(online_a[i], target_b[j]) / τ``. The first mean is over the
    ordered pairs of a view a and a large view b, a ≠ b; the second over the unordered pairs of large views. With
    ``alpha_small`` > 0, ``α_s mean_(a, b, s) mean_i KL(P_ab[i] || P_sb[i])`` is added, where a ≠ b are large views and
    s is a small crop; P_ab has no gradient there.

    Args:
        online: predictions of V views, large ones first.
        target: targets of the L ≥ 1 large views. They get a gradient if they require one: compute a teacher's without.
        temperature: τ > 0. A 0-dim tensor is not checked, and gets a gradient if it requires one.
        alpha: weight α of the invariance, ≥ 0.
        alpha_small: weight α_s of the invariance of small crops, ≥ 0. It has no effect without small crops, or with
            one large view.
        kl: "forward" takes the divergence above, "symmetric" the mean of it and of its reverse. "column" takes
            KL(C_ab[i] || P_ab[i]) for each pair of the first mean, where C_ab[i] is the softmax over the rows j of
            ``cos(online_a[j], target_b[i]) / τ``.
        stop: what has no gradient in the first argument P of KL(P || R): "target": all of P; "entropy": P in
            sum P log P; "none".
        pairs: "cross", or "all" to include a = b in the first mean.
        candidates: distinct indices of rows of the joined batch, the same on all processes: the softmax is over these
            and over the row's own image. None means all rows.
        comm: the processes that share the batch. The targets are gathered. "column" also gathers the predictions. A
            gradient through columns (of targets that require one, or for "column" unless stop is "target") is summed
            over the processes in forward. Backward communicates nothing.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input). The cosines of a row shorter than 1e-12 are
        0, and it gets no gradient.

    Raises:
        ValueError: a tensor in place of a list, the shapes differ, the numbers of views do not fit, fewer than two
            images, an unknown choice, a number outside its range, candidates that are no such indices, or (on the CPU)
            a view holds NaN or inf.

    >>> z = torch.eye(64)
    >>> round(relic_loss([z, z], [z, z], temperature=0.1).item(), 7)  # log(1 + 63 exp(-10))
    0.0028561
    """
    options = {"temperature": temperature, "alpha": alpha, "alpha_small": alpha_small}
    options |= {"kl": kl, "stop": stop, "pairs": pairs}
    return relic_terms(online, target, **options, candidates=candidates, comm=comm).loss


def relic_terms(
    online: Views,
    target: Views,
    *,
    temperature: float | Float[Tensor, ""] = 0.2,
    alpha: float = 1.0,
    alpha_small: float = 0.0,
    kl: str = "forward",
    stop: str = "target",
    pairs: str = "cross",
    candidates: Int64[Tensor, " K"] | None = None,
    comm: Collective = LOCAL,
) -> ReLICLossTerms:
    """Return :func:`relic_loss` and its parts."""
    named = check_views(online=online, target=target)
    _check(temperature, alpha, alpha_small, kl, stop, pairs)
    views, large = len(online), len(target)
    if not 1 <= large <= views or (views == 1 and pairs == "cross"):
        raise ValueError(
            f"the ReLIC loss needs at least 2 online views and 1 to as many targets, got {views} and {large}"
        )
    jobs, contrastive_pairs, divergences, small_divergences = _jobs(views, large, kl, pairs, alpha_small > 0)
    with torch.autocast(online[0].device.type, enabled=False):
        dtype = compute_dtype(reduce(torch.promote_types, [z.dtype for z in named.values()]))
        z = [view.to(dtype) for view in (*online, *target)]
        if any(view.requires_grad for view in z[views:]):  # they may be the online views
            z[views:] = torch.stack(z[views:]).unbind()
        tau = temperature.to(z[0]) if isinstance(temperature, Tensor) else z[0].new_full((), temperature)
        counts = comm.row_counts(len(z[0]), z[0].device)
        images = sum(counts)
        check_count(images, least=2, what="the ReLIC loss")
        if candidates is not None:
            check_indices("candidates", candidates, images)
        wanted = [torch.is_grad_enabled() and leaf.requires_grad for leaf in (*z, tau)]
        units = [unit_rows(view) for view in z]  # the sides: V online views, L targets
        unit, inverse = [u for u, _ in units], [i for _, i in units]
        blocks = _Blocks(unit, 0 if kl == "column" else views, candidates, 1 / tau.detach(), wanted, counts, comm)
        counted = [images * max(each, 1) for each in (contrastive_pairs, divergences, small_divergences)]
        rows = row_blocks(z[0]) or [slice(0, 0)]  # a process without rows takes part in the sums
        weights = {False: (1 / counted[0], alpha / counted[1], stop)}
        weights[True] = 1 / counted[0], alpha_small / counted[2], "target"
        parts = [blocks.run(job, part, *weights[job.small]) for part in rows for job in jobs]
        sums = comm.sum(torch.stack(parts).sum(0)).unbind()
        contrastive, invariance, small = (total / count for total, count in zip(sums, counted, strict=True))
        loss = contrastive + alpha * invariance
        if small_divergences:
            loss = loss + alpha_small * small
        if any(wanted):
            factor = comm.size / tau.detach()
            by_scale = blocks.by_scale() if wanted[-1] else None
            leaves = [leaf for leaf, its in zip((*z, tau), wanted, strict=True) if its]
            gradients = [
                tangent(blocks.gradient(side), unit[side], inverse[side] * factor)
                for side in range(views + large)
                if wanted[side]
            ]
            if by_scale is not None:
                gradients.append(by_scale * (-factor / tau.detach()))
            loss = attach_gradient(loss, leaves, gradients)
    check_result("the ReLIC loss", loss, comm, **named)
    return ReLICLossTerms(loss, contrastive, invariance, small, tau.detach().clone())


def _jobs(views: int, large: int, kl: str, pairs: str, with_small: bool) -> tuple[list[_Job], int, int, int]:
    """Return the matrices to compute, and the numbers of contrastive terms and of both kinds of divergences.

    Side V + b is target b. P_ab and P_ba are needed at the same time, and are used for both terms.
    """
    small: list[_Job] = []
    if with_small and large > 1 and views > large:
        small = [_small_job(views, large, b, contrastive=kl != "column") for b in range(large)]
    small_divergences = sum(len(job.divergences) for job in small)
    ordered = [(a, b) for a in range(views) for b in range(large) if a != b or pairs == "all"]
    if kl == "column":
        jobs = [_Job([(a, views + b), (views + b, a)], 1, [(1, 0)]) for a, b in ordered]
        return jobs + small, len(ordered), len(ordered), small_divergences
    which = [(0, 1)] if kl == "forward" else [(0, 1), (1, 0)]
    both = [(a, b) for a, b in ordered if a < b]
    jobs = [_Job([(a, views + b), (b, views + a)], 2, which) for a, b in both]
    jobs += [_Job([(a, views + b)], 1, []) for a, b in ordered if (a >= large and not small) or a == b]
    return jobs + small, len(ordered), len(both) * len(which), small_divergences


def _small_job(views: int, large: int, b: int, *, contrastive: bool) -> _Job:
    """Return the matrices P_sb of the small crops s, which may be contrastive, and P_ab of the other large views a."""
    crops, others = range(large, views), [a for a in range(large) if a != b]
    pairs = [(len(crops) + other, crop) for other in range(len(others)) for crop in range(len(crops))]
    return _Job([(a, views + b) for a in (*crops, *others)], len(crops) if contrastive else 0, pairs, small=True)


class _Blocks:
    """The loss and its gradient, a block of rows at a time.

    Args:
        unit: unit rows of all sides on this process.
        shared: the first of the sides that are columns.
        candidates: the columns of the softmax besides the own one; None means all.
        scale: 1 / τ.
        wanted: for each side and for τ, whether it needs a gradient.
        counts: number of rows of each process.
        comm: the processes that share the batch.
    """

    def __init__(
        self,
        unit: list[Tensor],
        shared: int,
        candidates: Tensor | None,
        scale: Tensor,
        wanted: list[bool],
        counts: list[int],
        comm: Collective,
    ) -> None:
        self.unit, self.candidates, self.wanted, self.comm = unit, candidates, wanted, comm
        self.images, self.first = sum(counts), sum(counts[: comm.rank])
        self.scaled = [u * scale for u in (unit if shared == 0 else unit[:shared])]
        every = unit[shared:]
        if comm.size > 1:
            every = comm.gather_rows(torch.stack(every, 1), counts=counts).unbind(1)
        self.columns = {y: u if candidates is None else u[candidates] for y, u in enumerate(every, shared)}
        self.by_rows: dict[int, Tensor] = {}
        self.by_own: dict[int, Tensor] = {}
        self.by_columns: dict[int, Tensor] = {}

    def run(self, job: _Job, part: slice, weight: float, kl_weight: float, stop: str) -> Tensor:
        """Return the sums over a block of rows of the three terms; add the block's part to the gradients."""
        positive = torch.arange(part.start, part.stop, device=self.unit[0].device)[:, None] + self.first
        log_p = [self._log_softmax(x, y, part, positive) for x, y in job.matrices]
        if self.candidates is not None:
            positive = torch.full_like(positive, log_p[0].shape[1] - 1)
        zero = log_p[0].new_zeros(())
        contrastive = -torch.stack([zero, *(each.gather(1, positive).sum() for each in log_p[: job.contrastive])]).sum()
        invariance = zero
        if not (any(self.wanted) or job.divergences):
            return torch.stack([contrastive, zero, zero])
        p = [each.exp() for each in log_p]
        slopes: list[Tensor | None] = [None] * len(p)
        if any(self.wanted):
            for m, each in enumerate(p):
                share = weight * (m < job.contrastive) + kl_weight * sum(g == m for _, g in job.divergences)
                slopes[m] = each * share if share else None
        for f, g in job.divergences:
            weighted = torch.sub(log_p[f], log_p[g]).mul_(p[f])
            divergence = weighted.sum(1, keepdim=True)
            invariance = invariance + divergence.sum()
            if not any(self.wanted):
                continue
            slopes[g] = _added(slopes[g], p[f], -kl_weight)
            if stop == "none":
                slopes[f] = _added(slopes[f], weighted.addcmul_(p[f], divergence, value=-1), kl_weight)
            elif stop == "entropy":
                crossed = torch.mul(p[f], log_p[g])
                mean = crossed.sum(1, keepdim=True)
                slopes[f] = _added(slopes[f], crossed.addcmul_(p[f], mean, value=-1), -kl_weight)
        for m, ((x, y), slope) in enumerate(zip(job.matrices, slopes, strict=True)):
            if slope is not None:
                if m < job.contrastive:
                    slope.scatter_add_(1, positive, torch.full_like(slope[:, :1], -weight))
                self._backward(x, y, part, slope)
        return torch.stack([contrastive, zero, invariance] if job.small else [contrastive, invariance, zero])

    def _log_softmax(self, x: int, y: int, part: slice, positive: Tensor) -> Tensor:
        rows = self.scaled[x][part]
        logits = rows @ self.columns[y].T
        if self.candidates is not None:  # the own image is the last column, and no other
            logits.masked_fill_(positive == self.candidates, LEAST)
            logits = torch.cat([logits, (rows * self.unit[y][part]).sum(1, keepdim=True)], 1)
        return logits.log_softmax(1)

    def _backward(self, x: int, y: int, part: slice, slope: Tensor) -> None:
        """Add the gradients by the cosines' rows and columns, times τ."""
        others, last = (slope, None) if self.candidates is None else (slope[:, :-1], slope[:, -1:])
        if self.wanted[x] or self.wanted[-1]:
            product = others @ self.columns[y]
            if last is not None:
                product.addcmul_(self.unit[y][part], last)
            self._add(self.by_rows, x, part, product)
        if self.wanted[y]:
            product = others.T @ self.unit[x][part]
            self.by_columns[y] = product if y not in self.by_columns else self.by_columns[y].add_(product)
            if last is not None:
                self._add(self.by_own, y, part, self.unit[x][part] * last)

    def _add(self, total: dict[int, Tensor], side: int, part: slice, product: Tensor) -> None:
        if side not in total and len(product) == len(self.unit[side]):
            total[side] = product
        else:
            total.setdefault(side, torch.zeros_like(self.unit[side]))[part].add_(product)

    def gradient(self, side: int) -> Tensor:
        """Return the gradient by the unit rows of a side of this process, of all processes' losses, times τ."""
        if side in self.by_columns:
            by_columns = self.by_columns[side]
            if self.candidates is not None:
                by_columns = torch.zeros(self.images, by_columns.shape[1]).to(by_columns)
                by_columns[self.candidates] = self.by_columns[side]
            rows = slice(self.first, self.first + len(self.unit[side]))
            total = self.comm.sum(by_columns)[rows]
            for part in (self.by_rows.get(side), self.by_own.get(side)):
                total = total if part is None else total + part
            return total
        return self.by_rows[side] if side in self.by_rows else torch.zeros_like(self.unit[side])

    def by_scale(self) -> Tensor:
        """Return the derivative by 1 / τ of this process's part of the loss. Call it before :meth:`gradient`."""
        return torch.stack([(rows * self.unit[side]).sum() for side, rows in self.by_rows.items()]).sum()


def _added(total: Tensor | None, part: Tensor, weight: float) -> Tensor:
    """Return ``total + weight * part``, in place if there is a total."""
    return part * weight if total is None else total.add_(part, alpha=weight)


def _check(temperature: float | Tensor, alpha: float, alpha_small: float, kl: str, stop: str, pairs: str) -> None:
    if not isinstance(temperature, Tensor):
        check_range("temperature", temperature, low=1e-6)
    check_range("alpha", alpha, low=0)
    check_range("alpha_small", alpha_small, low=0)
    check_choice("kl", kl, KL)
    check_choice("stop", stop, STOP)
    check_choice("pairs", pairs, PAIRS)


class ReLICLoss(nn.Module):
    """Module of :func:`relic_loss`; the arguments are the same. The temperature may be learned.

    Args:
        temperature: τ, or its first value if it is learned.
        learn_temperature: whether 1 / τ = min(exp(θ), 1 / min_temperature) with a parameter θ. The parameter gets no
            gradient once its bound is reached. Exclude it from weight decay.
        min_temperature: the least learned τ, > 0. The re-implementation begins at τ = 1 and has a bound of 0.2.
        alpha, alpha_small, kl, stop, pairs, comm: as for the function.

    Raises:
        ValueError: a number outside its range, an unknown choice, or a learned temperature begins at its bound.
    """

    log_scale: nn.Parameter | None

    def __init__(
        self,
        *,
        temperature: float = 0.2,
        learn_temperature: bool = False,
        min_temperature: float = 0.1,
        alpha: float = 1.0,
        alpha_small: float = 0.0,
        kl: str = "forward",
        stop: str = "target",
        pairs: str = "cross",
        comm: Collective = LOCAL,
    ) -> None:
        super().__init__()
        _check(temperature, alpha, alpha_small, kl, stop, pairs)
        check_range("min_temperature", min_temperature, low=1e-6)
        if learn_temperature and temperature <= min_temperature:
            raise ValueError(
                f"a learned temperature must begin above min_temperature, {min_temperature}, where it has a gradient, "
                f"got {temperature}"
            )
        self.temperature, self.min_temperature = temperature, min_temperature
        self.alpha, self.alpha_small, self.kl, self.stop, self.pairs = alpha, alpha_small, kl, stop, pairs
        self.comm = comm
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learn_temperature else None

    def terms(self, online: Views, target: Views, candidates: Tensor | None = None) -> ReLICLossTerms:
        """Return the loss and its parts."""
        tau: float | Tensor = self.temperature
        if self.log_scale is not None:
            tau = 1 / self.log_scale.exp().clamp(max=1 / self.min_temperature)
        options = {"alpha": self.alpha, "alpha_small": self.alpha_small, "comm": self.comm}
        options |= {"kl": self.kl, "stop": self.stop, "pairs": self.pairs}
        return relic_terms(online, target, temperature=tau, candidates=candidates, **options)

    def forward(self, online: Views, target: Views, candidates: Tensor | None = None) -> Float[Tensor, ""]:
        return self.terms(online, target, candidates).loss

    def extra_repr(self) -> str:
        learned = "" if self.log_scale is None else f" (learned, at least {self.min_temperature})"
        return (
            f"temperature={self.temperature}{learned}, alpha={self.alpha}, alpha_small={self.alpha_small}, "
            f"kl={self.kl!r}, stop={self.stop!r}, pairs={self.pairs!r}, comm={self.comm}"
        )
