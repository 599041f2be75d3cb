"""DISSL: a teacher head assigns each view to one of C pseudo-classes, a student head predicts the other views' class.

Dubois, Hashimoto, Ermon & Liang, "Improving Self-Supervised Learning by Characterizing Idealized Representations"
(NeurIPS 2022, arXiv:2209.06235). There is no stop-gradient, no moving average and no Sinkhorn step. This is the
published loss for any number of views. The published code loops over pairs of views. Here one product with the sum of
the views replaces the loop, and the loss and its gradient are computed together (:mod:`plugins.losses.dissl_blocks`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_range, check_result, check_views
from plugins.distributed import LOCAL, Collective
from plugins.losses.dissl_blocks import Views, value_and_parts


class DISSLTerms(NamedTuple):
    """``loss = w distillation - λ H_M + β invariance``, in nats. Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    distillation: Float[Tensor, ""]
    """Cross-entropy of the student's predictions relative to the assignments of the other views."""
    invariance: Float[Tensor, ""]
    """Cross-entropy of the assignments of two views; 0 if there is a single teacher view."""
    H_M: Float[Tensor, ""]
    """Entropy of the mean assignment, averaged over views; log C if all classes are used equally."""
    H_Mlz: Float[Tensor, ""]
    """Mean entropy of an assignment; 0 if every assignment is certain, log C if all are uniform."""
    KL_invariance: Float[Tensor, ""]
    """``invariance`` minus the entropy of the assignments; 0 if the views agree."""
    KL_distillation: Float[Tensor, ""]
    """KL divergence of the student from the teacher on the same view; 0 if they agree."""


def dissl_loss(
    teacher_logits: Views,
    student_logits: Views,
    *,
    lambda_maximality: float | Tensor = 2.3,
    beta_det_inv: float | Tensor = 0.8,
    distillation_weight: float | Tensor = 1.0,
    tau_teacher: float = 0.5,
    tau_student: float = 1.0,
    assignment_views: Sequence[int] | None = None,
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """``w D - λ H + β I``, with p_t = softmax(teacher_t / τ_t), q_s = softmax(student_s / τ_s), means over all rows.

    D is the mean of -p_t · log q_s over t ≠ s, I that of -p_t · log p_u over t ≠ u, and H the mean over t of the
    entropy of the batch mean of p_t. L ≥ -λ log C always. Uniform assignments give (w - λ + β) log C, the value of a
    stalled run.

    Args:
        teacher_logits: logits of T ≥ 1 views, which are the first T views of the student: a list of [B, C], or one
            tensor [T, B, C], which saves memory. The teacher is the first argument here and the second of
            :func:`plugins.losses.cissl_loss`: pass keywords.
        student_logits: logits of S ≥ max(2, T) views, in the same form.
        lambda_maximality: λ ≥ 0, the weight of H; useful range 1.8 to 2.8. The three weights may be 0-dim tensors.
        beta_det_inv: β ≥ 0, the weight of I; useful range 0.4 to 1.
        distillation_weight: w ≥ 0, the weight of D; 1 except during a warm-up of the teacher.
        tau_teacher: τ_t > 0.
        tau_student: τ_s > 0.
        assignment_views: indices of the teacher views used as assignments, t above; the others are only predicted, u.
            None uses all.
        comm: the processes that share the batch. T C + 6 floats are summed; backward communicates nothing.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input).

    Raises:
        ValueError: a tensor in place of a list, the shapes differ, there are too few views, an index in
            ``assignment_views`` does not exist, a weight or temperature is out of range, or (on the CPU) a view holds
            NaN or inf.

    >>> uniform = torch.zeros(2, 4, 8)
    >>> round(dissl_loss(uniform, uniform).item(), 4)  # (1 - 2.3 + 0.8) log 8
    -1.0397
    """
    return dissl_terms(
        teacher_logits,
        student_logits,
        lambda_maximality=lambda_maximality,
        beta_det_inv=beta_det_inv,
        distillation_weight=distillation_weight,
        tau_teacher=tau_teacher,
        tau_student=tau_student,
        assignment_views=assignment_views,
        comm=comm,
    ).loss


def dissl_terms(
    teacher_logits: Views,
    student_logits: Views,
    *,
    lambda_maximality: float | Tensor = 2.3,
    beta_det_inv: float | Tensor = 0.8,
    distillation_weight: float | Tensor = 1.0,
    tau_teacher: float = 0.5,
    tau_student: float = 1.0,
    assignment_views: Sequence[int] | None = None,
    comm: Collective = LOCAL,
) -> DISSLTerms:
    """Return :func:`dissl_loss` and its parts."""
    named = _checked(teacher_logits, student_logits)
    chosen = _chosen(len(teacher_logits), assignment_views)
    weights = _weights(distillation_weight, lambda_maximality, beta_det_inv)
    taus = _taus(tau_teacher, tau_student)
    with torch.autocast(teacher_logits[0].device.type, enabled=False):
        found = value_and_parts(teacher_logits, student_logits, chosen, weights, taus, comm)
    terms = DISSLTerms(**found)
    check_result("the DISSL loss", terms.loss, comm, **named)
    return terms


def _checked(teacher: Views, student: Views) -> dict[str, Tensor]:
    """Check numbers and shapes of the views; return them by name."""
    named = check_views(teacher_logits=teacher, student_logits=student)
    if not 1 <= len(teacher) <= len(student) or len(student) < 2:
        raise ValueError(
            "the DISSL loss needs at least 1 teacher view, 2 student views and as many student as teacher views, "
            f"got {len(teacher)} and {len(student)}"
        )
    return named


def _chosen(teachers: int, views: Sequence[int] | None) -> list[int]:
    chosen = list(range(teachers) if views is None else views)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(teachers)):
        raise ValueError(f"assignment_views must be different teacher views, 0 to {teachers - 1}, got {views}")
    return chosen


def _weights(w: float | Tensor, lam: float | Tensor, beta: float | Tensor) -> tuple[float | Tensor, ...]:
    weights = {"distillation_weight": w, "lambda_maximality": lam, "beta_det_inv": beta}
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            check_range(name, weight, low=0)
    return tuple(weight.detach() if isinstance(weight, Tensor) else weight for weight in weights.values())


def _taus(tau_teacher: float, tau_student: float) -> tuple[float, float]:
    check_range("tau_teacher", tau_teacher, low=1e-6)
    check_range("tau_student", tau_student, low=1e-6)
    return tau_teacher, tau_student


class DISSLLoss(nn.Module):
    """Module of :func:`dissl_loss` with the same arguments. A call can override the weights, as a warm-up does."""

    def __init__(
        self,
        *,
        lambda_maximality: float = 2.3,
        beta_det_inv: float = 0.8,
        tau_teacher: float = 0.5,
        tau_student: float = 1.0,
        assignment_views: Sequence[int] | None = None,
        comm: Collective = LOCAL,
    ) -> None:
        super().__init__()
        _weights(1.0, lambda_maximality, beta_det_inv)
        _taus(tau_teacher, tau_student)
        self.weights = {"lambda_maximality": lambda_maximality, "beta_det_inv": beta_det_inv}
        self.options = {"tau_teacher": tau_teacher, "tau_student": tau_student, "assignment_views": assignment_views}
        self.comm = comm

    def forward(self, teacher_logits: Views, student_logits: Views, **weights: float | Tensor) -> Float[Tensor, ""]:
        given: dict = {**self.weights, **weights}
        return dissl_loss(teacher_logits, student_logits, **given, **self.options, comm=self.comm)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={value}" for name, value in {**self.weights, **self.options, "comm": self.comm}.items()
        )
