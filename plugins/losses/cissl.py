"""CISSL: contrastive learning with two different heads, in which a view is a positive of itself.

Dubois, Hashimoto, Ermon & Liang, "Improving Self-Supervised Learning by Characterizing Idealized Representations"
(NeurIPS 2022, arXiv:2209.06235). The softmax is over the teacher head's outputs only, and the row's own view is one of
its columns. If the own view is excluded, the function is SimCLR's loss (Chen et al., arXiv:2002.05709) for a single
head, and the "simple" variant of the published VISSL fork for two heads.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_choice, check_count, check_range, check_result, check_views, compute_dtype
from plugins.distributed import LOCAL, Collective
from plugins.linalg import attach_gradient, directions, row_blocks

POSITIVES = ("all", "other")
Views = Sequence[Float[Tensor, "B D"]] | Float[Tensor, "V B D"]


class CISSLTerms(NamedTuple):
    """Terms in nats. Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    I_q_zm: Float[Tensor, ""]
    """``hat_H_m - loss``: a lower bound on the mutual information of representation and image."""
    hat_H_m: Float[Tensor, ""]
    """Logarithm of the number of columns, T N, or T N - 1 if the row's own view is excluded; mean over the rows."""


def cissl_loss(
    student: Views, teacher: Views, *, temperature: float = 0.07, positives: str = "all", comm: Collective = LOCAL
) -> Float[Tensor, ""]:
    """Mean over rows (view v, image i) of ``-mean_u log softmax_j(cos(s_vi, t_j) / τ)`` at j = (view u, image i).

    The columns j are the T views of all N images, the teacher's outputs. Nothing is detached.

    Args:
        student: outputs of the student head (linear, for linear probes) for S ≥ T views, as a list or one tensor. Views
            beyond T are small crops. The student is the first argument here and the second of
            :func:`plugins.losses.dissl_loss`: pass keywords.
        teacher: outputs of the teacher head (an MLP) for T ≥ 2 views, which are the first T views of the student.
        temperature: τ > 0, fixed; 0.07 in the paper's own code, 0.1 in its VISSL fork.
        positives: "all": all T views of the row's image are positives. "other": the row's own view is excluded from the
            columns. Small crops are never columns, so all T views of their image stay positives.
        comm: the processes that share the batch. The rows of both heads are gathered, and S N numbers more if gradients
            are needed. Backward communicates nothing.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input). With "all" it is at least log T,
        and log T N if all rows are equal. The cosines of a row with a norm below 1e-8 are 0, and it gets no gradient.

    Raises:
        ValueError: a tensor in place of a list, the shapes differ, there are more teacher than student views, fewer
            than two views or images, or ``positives`` is unknown, or (on the CPU) a view holds NaN or inf.

    >>> same = torch.ones(2, 4, 3)
    >>> round(cissl_loss(same, same).item(), 5)  # log 8
    2.07944
    """
    return cissl_terms(student, teacher, temperature=temperature, positives=positives, comm=comm).loss


def cissl_terms(
    student: Views, teacher: Views, *, temperature: float = 0.07, positives: str = "all", comm: Collective = LOCAL
) -> CISSLTerms:
    """Return :func:`cissl_loss` and its bound on the mutual information."""
    check_choice("positives", positives, POSITIVES)
    named, what = _check(student, teacher), "a contrastive loss"
    return contrastive_terms(student, teacher, named, what, temperature=temperature, positives=positives, comm=comm)


def contrastive_terms(
    student: Views,
    teacher: Views,
    named: dict[str, Tensor],
    what: str,
    *,
    temperature: float,
    positives: str,
    comm: Collective,
) -> CISSLTerms:
    """Return :func:`cissl_terms` of views whose numbers and shapes have been checked.

    Args:
        student: as in :func:`cissl_loss`.
        teacher: as in :func:`cissl_loss`.
        named: the views by the names that an error message shows.
        what: the loss, for error messages.
        temperature: as in :func:`cissl_loss`.
        positives: as in :func:`cissl_loss`.
        comm: as in :func:`cissl_loss`.
    """
    check_range("temperature", temperature, low=1e-6)
    with torch.autocast(student[0].device.type, enabled=False):
        one_head = teacher is student
        u = _directions(student)
        w = u if one_head else _directions(teacher)
        (rows, students, _), teachers = u.shape, w.shape[1]
        counts = comm.row_counts(rows, u.device)
        images, before = sum(counts), sum(counts[: comm.rank])
        check_count(images, least=2, what=what)
        columns, own = images * teachers, None if positives == "all" else before
        if one_head:
            all_u = all_w = comm.gather_rows(u.detach(), counts=counts).flatten(0, 1)
        else:
            gathered = comm.gather_rows(torch.cat([u, w], 1).detach(), counts=counts)
            all_u, all_w = (part.flatten(0, 1) for part in gathered.split([students, teachers], 1))
        flat_u, flat_w = u.detach().flatten(0, 1), w.detach().flatten(0, 1)
        # mean_w: mean of the positives of each row. mean_u: for each column, the sum of the rows that have it as a
        # positive, each divided by its number of positives
        if own is None:
            mean_w = w.detach().mean(1, keepdim=True).expand_as(u)
            mean_u = (u.detach().sum(1, keepdim=True) / teachers).expand_as(w)
        else:
            crops = u.detach()[:, teachers:]
            mean_w = torch.cat([_others(w.detach()), w.detach().mean(1, keepdim=True).expand_as(crops)], 1)
            mean_u = _others(u.detach()[:, :teachers]) + crops.sum(1, keepdim=True) / teachers
        mean_w = mean_w.flatten(0, 1)

        wanted = torch.is_grad_enabled() and (u.requires_grad or w.requires_grad)
        log_mass = flat_u.new_empty(len(flat_u), 1)
        by_u, by_w = torch.empty_like(flat_u), -mean_u.flatten(0, 1)
        for part in row_blocks(flat_u):
            weights, top = _exponentials(flat_u[part] @ all_w.T, temperature, (students, teachers), own, part.start)
            mass = weights.sum(1, keepdim=True)
            log_mass[part] = mass.log() + top
            if wanted:
                by_u[part] = (weights @ all_w) / mass - mean_w[part]
                if comm.size == 1:
                    by_w.addmm_(weights.T, flat_u[part] / mass)
        loss = comm.sum((log_mass.sum() - (flat_u * mean_w).sum() / temperature) / (images * students))
        if wanted:
            if comm.size > 1:  # gradient by this process's columns, which needs the rows of all processes
                log_masses = comm.gather_rows(log_mass.view(rows, students), counts=counts).flatten()
                for part in row_blocks(flat_w):
                    cosines, views = flat_w[part] @ all_u.T, (teachers, students)
                    weights, _ = _exponentials(cosines, temperature, views, own, part.start, log_masses)
                    by_w[part] += weights @ all_u
            scale = comm.size / (images * students * temperature)
            if one_head:
                loss = attach_gradient(loss, [u], [by_u.add_(by_w).mul_(scale).view_as(u)])
            else:
                loss = attach_gradient(loss, [u, w], [(by_u * scale).view_as(u), (by_w * scale).view_as(w)])
    without = 0 if own is None else teachers  # views of an image whose own view is excluded from the columns
    check_result(what, loss, comm, **named)
    entropy = (without * math.log(columns - 1) + (students - without) * math.log(columns)) / students
    return CISSLTerms(loss, entropy - loss.detach(), loss.new_full((), entropy))


def _exponentials(
    cosines: Tensor, temperature: float, views: tuple[int, int], own: int | None, start: int, top: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute exp(cosine / τ - top) in place; if ``top`` is None, it is the largest score of each row.

    Args:
        cosines: a block of rows; the first one is row ``start`` of this process.
        temperature: τ.
        views: number of views of an image among the rows and among the columns; views of an image are adjacent.
        own: number of images on processes of lower rank, if the row's own view is excluded; None keeps it.
        start: index of the first row.
        top: number to subtract from the scores of each row, or of each column.
    """
    scores = cosines.div_(temperature)
    if own is not None:
        rows = torch.arange(start, start + len(scores), device=scores.device)[:, None]
        view = rows % views[0]
        column = (own + rows // views[0]) * views[1] + view.clamp(max=views[1] - 1)
        left = scores.gather(1, column).masked_fill(view < views[1], -math.inf)  # a small crop is not among the columns
        scores.scatter_(1, column, left)
    if top is None:
        top = scores.amax(1, keepdim=True)
    return scores.sub_(top).exp_(), top


def _directions(views: Views) -> Float[Tensor, "B V D"]:
    z = torch.stack([*views], 1)
    return directions(z.to(compute_dtype(z.dtype)))


def _others(z: Float[Tensor, "B V D"]) -> Float[Tensor, "B V D"]:
    """Return for each view the mean over the other views of its image."""
    return (z.sum(1, keepdim=True) - z) / (z.shape[1] - 1)


def _check(student: Views, teacher: Views) -> dict[str, Tensor]:
    """Check numbers and shapes of the views; return them by name."""
    named = check_views(student=student, teacher=teacher)
    if not 2 <= len(teacher) <= len(student):
        raise ValueError(
            "a contrastive loss needs at least 2 teacher views and at least as many student views, got "
            f"{len(teacher)} and {len(student)}"
        )
    return named


class CISSLLoss(nn.Module):
    """Module of :func:`cissl_loss`; the arguments are the same."""

    def __init__(self, *, temperature: float = 0.07, positives: str = "all", comm: Collective = LOCAL) -> None:
        super().__init__()
        check_range("temperature", temperature, low=1e-6)
        check_choice("positives", positives, POSITIVES)
        self.temperature, self.positives, self.comm = temperature, positives, comm

    def forward(self, student: Views, teacher: Views) -> Float[Tensor, ""]:
        return cissl_loss(student, teacher, temperature=self.temperature, positives=self.positives, comm=self.comm)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, positives={self.positives!r}, comm={self.comm}"
