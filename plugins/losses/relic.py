"""ReLIC: instance discrimination whose distribution over the candidates is the same under every augmentation.

Mitrovic, McWilliams, Walker, Buesing & Blundell, "Representation Learning via Invariant Causal Mechanisms" (ICLR 2021,
arXiv:2010.07922), eq. 3, with means in place of its sums: for two views and one divergence, the sum with α is twice the
mean with α / 2. The paper states neither τ nor α. ``pairs="all"`` and ``candidates`` are those of ReLICv2 (Tomasev et
al. 2022, arXiv:2201.05119); ``kl="column"`` is that of the re-implementation github.com/filipbasara0/relic.

The N x N matrices of similarities are never stored: each block of rows gives its part of the loss and of the gradient.
"""

import math
from collections.abc import Sequence
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
from plugins.linalg import attach_gradient, tangent, unit_rows

KL = ("forward", "symmetric", "column")
STOP = ("target", "entropy", "none")
PAIRS = ("cross", "all")
LEAST = -1e9
"""Logit of a column that is left out; finite, because differences of logits are taken."""
Views = Sequence[Float[Tensor, "B D"]] | Float[Tensor, "V B D"]
Matrix = tuple[int, int]
"""A matrix of logits: the side of its rows and the side of its columns."""


class ReLICLossTerms(NamedTuple):
    """In nats. Only ``loss = contrastive + α invariance`` has a gradient."""

    loss: Float[Tensor, ""]
    contrastive: Float[Tensor, ""]
    """Mean of -log P_ab[i, i]: log N if all rows are equal."""
    invariance: Float[Tensor, ""]
    """Mean divergence of the distributions of two views, ≥ 0."""
    temperature: Float[Tensor, ""]
    """τ, which may be learned."""


class _Job(NamedTuple):
    """Matrices that are needed at the same time, how many of them are contrastive, and the divergences to take."""

    matrices: list[Matrix]
    contrastive: int
    divergences: list[tuple[int, int]]


def relic_loss(
    online: Views,
    target: Views,
    *,
    temperature: float | Float[Tensor, ""] = 0.2,
    alpha: float = 1.0,
    kl: str = "forward",
    stop: str = "target",
    pairs: str = "cross",
    candidates: Int64[Tensor, " K"] | None = None,
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """``L = mean_(a, b) mean_i -log P_ab[i, i] + α mean_(a, b) mean_i KL(P_ab[i] || P_ba[i])``.

    ``P_ab[i]`` is the softmax over the images j of ``cos(online_a[i], target_b[j]) / τ``. The first mean is over the
    ordered pairs of a view a and a large view b, a ≠ b; the second over the unordered pairs of large views.

    Args:
        online: predictions of V views, large ones first.
        target: targets of the L ≥ 1 large views. They get a gradient if they require one: compute a teacher's without.
        temperature: τ > 0. A 0-dim tensor is not checked, and gets a gradient if it requires one.
        alpha: weight α of the invariance, ≥ 0.
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
    options = {"temperature": temperature, "alpha": alpha, "kl": kl, "stop": stop, "pairs": pairs}
    return relic_terms(online, target, **options, candidates=candidates, comm=comm).loss


def relic_terms(
    online: Views,
    target: Views,
    *,
    temperature: float | Float[Tensor, ""] = 0.2,
    alpha: float = 1.0,
    kl: str = "forward",
    stop: str = "target",
    pairs: str = "cross",
    candidates: Int64[Tensor, " K"] | None = None,
    comm: Collective = LOCAL,
) -> ReLICLossTerms:
    """Return :func:`relic_loss` and its parts."""
    named = check_views(online=online, target=target)
    _check(temperature, alpha, kl, stop, pairs)
    views, large = len(online), len(target)
    if not 1 <= large <= views or (views == 1 and pairs == "cross"):
        raise ValueError(
            f"the ReLIC loss needs at least 2 online views and 1 to as many targets, got {views} and {large}"
        )
    jobs, contrastive_pairs, divergences = _jobs(views, large, kl, pairs)
    with torch.autocast(online[0].device.type, enabled=False):
        q, t = (torch.stack([*side], 0) for side in (online, target))
        dtype = compute_dtype(torch.promote_types(q.dtype, t.dtype))
        q, t = q.to(dtype), t.to(dtype)
        tau = temperature.to(q) if isinstance(temperature, Tensor) else q.new_full((), temperature)
        own, inverse = unit_rows(torch.cat([q, t]))  # the sides: V online views, L targets
        rows = own.shape[1]
        counts = comm.row_counts(rows, q.device)
        images, first = sum(counts), sum(counts[: comm.rank])
        check_count(images, least=2, what="the ReLIC loss")
        if candidates is not None:
            check_indices("candidates", candidates, images)
        shared = 0 if kl == "column" else views  # sides from here on are columns
        columns = comm.gather_rows(own[shared:].transpose(0, 1), counts=counts).transpose(0, 1)

        wanted = torch.is_grad_enabled() and (q.requires_grad or t.requires_grad or tau.requires_grad)
        through_columns = wanted and (t.requires_grad or (kl == "column" and stop != "target"))
        blocks = _Blocks(own, columns, shared, first, candidates, 1 / tau.detach(), wanted, through_columns)
        weights = 1 / (contrastive_pairs * images), alpha / (max(divergences, 1) * images)
        sums = torch.zeros(2, dtype=dtype, device=q.device)
        for part in _split(own):
            for job in jobs:
                sums = sums + blocks.run(job, part, *weights, stop)
        contrastive, invariance = comm.sum(sums).div(images).unbind()
        contrastive, invariance = contrastive / contrastive_pairs, invariance / max(divergences, 1)
        loss = contrastive + alpha * invariance
        if wanted:
            by_own, by_scale = blocks.gradients(counts, comm)
            gradient = tangent(by_own.mul_(comm.size / tau.detach()), own, inverse)
            by_tau = -comm.size * by_scale / tau.detach().square()
            loss = attach_gradient(loss, [q, t, tau], [gradient[:views], gradient[views:], by_tau])
    check_result("the ReLIC loss", loss, comm, **named)
    return ReLICLossTerms(loss, contrastive, invariance, tau.detach().clone())


def _jobs(views: int, large: int, kl: str, pairs: str) -> tuple[list[_Job], int, int]:
    """Return the matrices to compute, and the numbers of contrastive terms and of divergences. Side V + b is target b.

    P_ab and P_ba are needed at the same time, and are used for both terms.
    """
    ordered = [(a, b) for a in range(views) for b in range(large) if a != b or pairs == "all"]
    if kl == "column":
        jobs = [_Job([(a, views + b), (views + b, a)], 1, [(1, 0)]) for a, b in ordered]
        return jobs, len(ordered), len(ordered)
    which = [(0, 1)] if kl == "forward" else [(0, 1), (1, 0)]
    both = [(a, b) for a, b in ordered if a < b]
    jobs = [_Job([(a, views + b), (b, views + a)], 2, which) for a, b in both]
    jobs += [_Job([(a, views + b)], 1, []) for a, b in ordered if a >= large or a == b]
    return jobs, len(ordered), len(both) * len(which)


class _Blocks:
    """The loss and its gradient, a block of rows at a time.

    Args:
        own: unit rows of all sides on this process.
        columns: those of all processes, of the sides that are columns.
        shared: the first of these sides.
        first: number of rows on processes of lower rank.
        candidates: the columns of the softmax besides the own one; None means all.
        scale: 1 / τ.
        wanted: whether gradients are needed.
        through_columns: whether rows also get a gradient as columns.
    """

    def __init__(
        self,
        own: Float[Tensor, "S B D"],
        columns: Float[Tensor, "T N D"],
        shared: int,
        first: int,
        candidates: Tensor | None,
        scale: Tensor,
        wanted: bool,
        through_columns: bool,
    ) -> None:
        self.own, self.shared, self.first, self.candidates = own, shared, first, candidates
        self.columns = columns if candidates is None else columns[:, candidates]
        self.images, self.scaled = columns.shape[1], own * scale
        self.wanted, self.through_columns = wanted, through_columns
        self.by_rows = torch.zeros_like(own) if wanted else own
        self.by_own = torch.zeros_like(own) if through_columns and candidates is not None else None
        self.by_columns = torch.zeros_like(self.columns) if through_columns else None

    def run(self, job: _Job, part: slice, weight: float, kl_weight: float, stop: str) -> Tensor:
        """Return the sums over a block of rows of both terms; add the gradients of the rows to the others."""
        positive = torch.arange(part.start, part.stop, device=self.own.device)[:, None] + self.first
        log_p = [self._log_softmax(x, y, part, positive) for x, y in job.matrices]
        if self.candidates is not None:
            positive = torch.full_like(positive, log_p[0].shape[1] - 1)
        contrastive = -sum(each.gather(1, positive).sum() for each in log_p[: job.contrastive])
        if not (self.wanted or job.divergences):
            return torch.stack([contrastive, torch.zeros_like(contrastive)])
        p = [each.exp() for each in log_p]
        slopes: list[Tensor | None] = [None] * len(p)
        if self.wanted:
            minus = torch.full_like(positive, -weight, dtype=p[0].dtype)
            slopes[: job.contrastive] = [
                (each * weight).scatter_add_(1, positive, minus) for each in p[: job.contrastive]
            ]
        invariance = torch.zeros_like(contrastive)
        for f, g in job.divergences:
            weighted = torch.sub(log_p[f], log_p[g]).mul_(p[f])
            divergence = weighted.sum(1, keepdim=True)
            invariance = invariance + divergence.sum()
            if not self.wanted:
                continue
            slopes[g] = _added(slopes[g], p[g], kl_weight).sub_(p[f], alpha=kl_weight)
            if stop == "none":
                slopes[f] = _added(slopes[f], weighted.addcmul_(p[f], divergence, value=-1), kl_weight)
            elif stop == "entropy":
                crossed = torch.mul(p[f], log_p[g])
                mean = crossed.sum(1, keepdim=True)
                slopes[f] = _added(slopes[f], crossed.addcmul_(p[f], mean, value=-1), -kl_weight)
        for (x, y), slope in zip(job.matrices, slopes, strict=True):
            if slope is not None:
                self._backward(x, y, part, slope)
        return torch.stack([contrastive, invariance])

    def _log_softmax(self, x: int, y: int, part: slice, positive: Tensor) -> Tensor:
        rows = self.scaled[x, part]
        logits = rows @ self.columns[y - self.shared].T
        if self.candidates is not None:  # the own image is the last column, and no other
            logits.masked_fill_(positive == self.candidates, LEAST)
            logits = torch.cat([logits, (rows * self.own[y, part]).sum(1, keepdim=True)], 1)
        return logits.log_softmax(1)

    def _backward(self, x: int, y: int, part: slice, slope: Tensor) -> None:
        if self.candidates is not None:
            slope, last = slope[:, :-1], slope[:, -1:]
            self.by_rows[x, part].addcmul_(self.own[y, part], last)
            if self.by_own is not None:
                self.by_own[y, part].addcmul_(self.own[x, part], last)
        self.by_rows[x, part].addmm_(slope, self.columns[y - self.shared])
        if self.by_columns is not None:
            self.by_columns[y - self.shared].addmm_(slope.T, self.own[x, part])

    def gradients(self, counts: list[int], comm: Collective) -> tuple[Tensor, Tensor]:
        """Return the gradients by ``own``, of all processes' rows, and by 1 / τ, of this process's, for cosines / 1."""
        by_scale = (self.by_rows * self.own).sum()
        total = self.by_rows
        if self.by_columns is not None:
            by_columns = self.by_columns
            if self.candidates is not None:
                by_columns = by_columns.new_zeros(len(by_columns), self.images, by_columns.shape[2])
                by_columns[:, self.candidates] = self.by_columns
            last = self.first + counts[comm.rank]
            total[self.shared :] += comm.sum(by_columns)[:, self.first : last]
            if self.by_own is not None:
                total = total + self.by_own
        return total, by_scale


def _added(total: Tensor | None, part: Tensor, weight: float) -> Tensor:
    """Return ``total + weight * part``, in place if there is a total."""
    return part * weight if total is None else total.add_(part, alpha=weight)


def _split(own: Tensor) -> list[slice]:
    """Split the rows into blocks, whose logits fit the cache: memory does not grow with the square of the rows."""
    rows, size = own.shape[1], 512 if own.device.type == "cpu" else 8192
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _check(temperature: float | Tensor, alpha: float, kl: str, stop: str, pairs: str) -> None:
    if not isinstance(temperature, Tensor):
        check_range("temperature", temperature, low=1e-6)
    check_range("alpha", alpha, low=0)
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
        alpha, kl, stop, pairs, comm: as for the function.

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
        kl: str = "forward",
        stop: str = "target",
        pairs: str = "cross",
        comm: Collective = LOCAL,
    ) -> None:
        super().__init__()
        _check(temperature, alpha, kl, stop, pairs)
        check_range("min_temperature", min_temperature, low=1e-6)
        if learn_temperature and temperature <= min_temperature:
            raise ValueError(
                f"a learned temperature must begin above min_temperature, {min_temperature}, where it has a gradient, "
                f"got {temperature}"
            )
        self.temperature, self.min_temperature = temperature, min_temperature
        self.alpha, self.kl, self.stop, self.pairs, self.comm = alpha, kl, stop, pairs, comm
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learn_temperature else None

    def terms(self, online: Views, target: Views, candidates: Tensor | None = None) -> ReLICLossTerms:
        """Return the loss and its parts."""
        tau: float | Tensor = self.temperature
        if self.log_scale is not None:
            tau = 1 / self.log_scale.exp().clamp(max=1 / self.min_temperature)
        options = {"alpha": self.alpha, "kl": self.kl, "stop": self.stop, "pairs": self.pairs, "comm": self.comm}
        return relic_terms(online, target, temperature=tau, candidates=candidates, **options)

    def forward(self, online: Views, target: Views, candidates: Tensor | None = None) -> Float[Tensor, ""]:
        return self.terms(online, target, candidates).loss

    def extra_repr(self) -> str:
        learned = "" if self.log_scale is None else f" (learned, at least {self.min_temperature})"
        return (
            f"temperature={self.temperature}{learned}, alpha={self.alpha}, kl={self.kl!r}, stop={self.stop!r}, "
            f"pairs={self.pairs!r}, comm={self.comm}"
        )
