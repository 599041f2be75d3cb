"""DINO: the student predicts the teacher's centred and sharpened assignments of the other views.

Caron et al. 2021, arXiv:2104.14294, eqs. 1-4. The authors of DISSL (Dubois et al. 2022, arXiv:2209.06235) move the
centre of :class:`DINOLoss` after each teacher view; in the original it moves once per batch, after the loss.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from plugins.checks import check_choice, check_range, check_result, check_views, compute_dtype
from plugins.clock import MovedByMeans
from plugins.distributed import LOCAL, Collective
from plugins.linalg import joined_mean

Views = Sequence[Float[Tensor, "B C"]]
Center = Float[Tensor, " C"] | Sequence[Float[Tensor, " C"]]


class DINOTerms(NamedTuple):
    """In nats. Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    H_Mlz: Float[Tensor, ""]
    """Mean entropy of the teacher's assignments."""


def dino_loss(
    student: Views,
    teacher: Views,
    center: Center,
    *,
    tau_student: float = 0.1,
    tau_teacher: float = 0.04,
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """Mean over the pairs of different views of the cross-entropy of the teacher's and the student's assignments.

    ``mean_{v ≠ u} H(softmax((t_u − c) / τ_t), softmax(s_v / τ_s))``, student view v, teacher view u, mean over rows.

    Args:
        student: logits of S ≥ 2 views.
        teacher: logits of T ≥ 1 views, the first of the student's; detached here.
        center: c, or one for each teacher view; see :class:`DINOLoss`.
        tau_student: τ_s > 0.
        tau_teacher: τ_t > 0.
        comm: the processes that share the batch.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input).

    Raises:
        ValueError: a tensor in place of a list, the shapes differ, the numbers of views do not fit, a temperature is
            out of range, or (on the CPU) a view holds NaN or inf.

    >>> uniform = [torch.zeros(4, 8)] * 2
    >>> round(dino_loss(uniform, uniform, torch.zeros(8)).item(), 5)  # log 8
    2.07944
    """
    options = {"tau_student": tau_student, "tau_teacher": tau_teacher}
    return dino_terms(student, teacher, center, **options, comm=comm).loss


def dino_terms(
    student: Views,
    teacher: Views,
    center: Center,
    *,
    tau_student: float = 0.1,
    tau_teacher: float = 0.04,
    comm: Collective = LOCAL,
) -> DINOTerms:
    """Compute :func:`dino_loss` and the entropy of the teacher's assignments."""
    check_range("tau_student", tau_student, low=1e-6)
    check_range("tau_teacher", tau_teacher, low=1e-6)
    named = check_views(student=student, teacher=teacher)
    if not 1 <= len(teacher) <= len(student) or len(student) < 2:
        raise ValueError(
            "dino_loss needs at least 2 student views and 1 to as many teacher views, "
            f"got {len(student)} and {len(teacher)}"
        )
    dtype = compute_dtype(student[0].dtype)
    centers = [center] * len(teacher) if isinstance(center, Tensor) else center
    with torch.autocast(student[0].device.type, enabled=False):
        log_p = [
            ((t.detach().to(dtype) - c) / tau_teacher).log_softmax(1) for t, c in zip(teacher, centers, strict=True)
        ]
        log_q = [(s.to(dtype) / tau_student).log_softmax(1) for s in student]
        pairs = [(u, v) for u in range(len(teacher)) for v in range(len(student)) if u != v]
        crossed = torch.stack([-(log_p[u].exp() * log_q[v]).sum(1) for u, v in pairs]).mean(0)
        entropies = torch.stack([-(rows.exp() * rows).sum(1) for rows in log_p]).mean(0)
        loss, entropy = joined_mean(torch.stack([crossed, entropies], 1), comm).unbind()
        terms = DINOTerms(loss, entropy.detach())
    check_result("the DINO loss", terms.loss, comm, **named)
    return terms


def teacher_temperature(epoch: int, *, first: float = 0.04, last: float = 0.04, epochs: int = 0) -> float:
    """Return τ_t of an epoch: from ``first`` in epoch 0 in equal steps to ``last`` in the last epoch of the warm-up.

    Args:
        epoch: number of the epoch, from 0.
        first: τ_t in epoch 0.
        last: τ_t after the warm-up.
        epochs: number of epochs of the warm-up, >= 0.

    >>> [round(teacher_temperature(epoch, first=0.04, last=0.07, epochs=4), 6) for epoch in (0, 1, 3, 9)]
    [0.04, 0.05, 0.07, 0.07]
    """
    return last if epoch >= epochs else first + (last - first) * epoch / max(epochs - 1, 1)


class DINOLoss(MovedByMeans):
    """:func:`dino_terms` with a running centre: in training ``c ← m c + (1 − m) mean(t)`` after the loss.

    The means are over the joined batch, so the centre is the same on all processes.

    Args:
        classes: C, the number of columns.
        tau_student: τ_s > 0.
        tau_teacher: τ_t > 0; a schedule may change the attribute.
        center_momentum: m, in [0, 1].
        moves: "batch": once per step, by the mean over all teacher views and over the micro-batches of the step, which
            all see the same centre. "view": after each teacher view, as in the code of DISSL's authors; the next view
            sees the new centre.
        comm: the processes that share the batch.

    Buffers:
        center: ``[C]``, 0 before the first step.
    """

    center: Tensor

    def __init__(
        self,
        classes: int,
        *,
        tau_student: float = 0.1,
        tau_teacher: float = 0.04,
        center_momentum: float = 0.9,
        moves: str = "batch",
        comm: Collective = LOCAL,
    ) -> None:
        super().__init__()
        check_range("center_momentum", center_momentum, low=0.0, high=1.0)
        check_choice("moves", moves, ("batch", "view"))
        self.register_buffer("center", torch.zeros(classes))
        self.tau_student, self.tau_teacher = tau_student, tau_teacher
        self.center_momentum, self.moves, self.comm = center_momentum, moves, comm

    def forward(self, student: Views, teacher: Views) -> DINOTerms:
        options = {"tau_student": self.tau_student, "tau_teacher": self.tau_teacher}
        if not self.training or not len(teacher):
            return dino_terms(student, teacher, self.center, **options, comm=self.comm)
        means, rows = self._means(teacher)
        if self.moves == "batch":
            terms = dino_terms(student, teacher, self.center, **options, comm=self.comm)
            self.observe([means.mean(0)], rows)
            return terms
        centers = [self.center]
        for mean in means:
            centers.append(centers[-1].lerp(mean, 1 - self.center_momentum))
        terms = dino_terms(student, teacher, centers[:-1], **options, comm=self.comm)
        self.center.copy_(centers[-1])
        return terms

    def move(self, means: list[Tensor]) -> None:
        """Move the centre by the mean of the teacher's logits over a step."""
        moved = self.center.lerp(means[0], 1 - self.center_momentum)
        self.center.copy_(moved.where(moved.isfinite().all(), self.center))  # an overflow must not stay

    @torch.no_grad()
    def _means(self, teacher: Views) -> tuple[Float[Tensor, "T C"], Float[Tensor, ""]]:
        """Return the joined mean of each teacher view, and the number of joined rows."""
        sums = torch.stack([t.to(self.center.dtype).sum(0) for t in teacher])
        rows = sums.new_full((len(teacher), 1), len(teacher[0]))
        sums = self.comm.sum(torch.cat([sums, rows], 1))
        return sums[:, :-1] / sums[:, -1:], sums[0, -1]
