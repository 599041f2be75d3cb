"""The teacher of BYOL (2006.07733, Section 3.2): an exponential moving average of the student's parameters."""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from plugins.checks import check_range


def cosine_tau(step: int, total: int, base: float = 0.99, final: float = 1.0) -> float:
    """Return τ, the decay of the teacher at the update after ``step`` earlier updates.

    ``τ_k = τ_f − (τ_f − τ_b) (1 + cos(π k / K)) / 2``: from τ_b at the first update to τ_f. It depends on the
    step only, so that a resumed run continues the schedule.

    Args:
        step: k ≥ 0, number of earlier updates. Values above K are treated as K.
        total: K ≥ 1, number of optimiser steps of the whole run.
        base: τ_b in [0, 1].
        final: τ_f in [0, 1].

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> [round(cosine_tau(step, 1000, 0.99, 1.0), 6) for step in (0, 500, 1000)]
        [0.99, 0.995, 1.0]
    """
    check_range("step", step, low=0)
    check_range("total", total, low=1)
    check_range("base", base, low=0.0, high=1.0)
    check_range("final", final, low=0.0, high=1.0)
    return final - (final - base) * (1 + math.cos(math.pi * min(step, total) / total)) / 2


def needs_teacher(base: float, final: float) -> bool:
    """Return whether a teacher with this schedule can differ from the student.

    With τ = 0 throughout, the teacher equals the student, and its projections are the detached projections of the
    student. No teacher and no second forward pass are needed then.

    Example:
        >>> needs_teacher(0.99, 1.0), needs_teacher(0.0, 0.0)
        (True, False)
    """
    return base > 0 or final > 0


@torch.no_grad()
def update_teacher(teacher: Iterable[nn.Module], student: Iterable[nn.Module], tau: float) -> None:
    """Update ``θ_t ← τ θ_t + (1 − τ) θ`` in place, for all parameters of all modules; buffers do not change.

    Args:
        teacher: the modules to update.
        student: the modules of the student, with the same parameters in the same order.
        tau: τ in [0, 1].

    Raises:
        ValueError: τ is out of range.
    """
    check_range("tau", tau, low=0.0, high=1.0)
    averages: list[Tensor] = [parameter for module in teacher for parameter in module.parameters()]
    parameters: list[Tensor] = [parameter for module in student for parameter in module.parameters()]
    if averages:
        get_ema_multi_avg_fn(tau)(averages, parameters, 0)


class EMATeacher(nn.Module):
    """An exponential moving average of the student: ``θ_t ← τ θ_t + (1 − τ) θ`` after each optimiser step.

    Only parameters are averaged. Buffers are not copied after construction: the teacher runs in training mode, and its
    BatchNorm layers use and track the statistics of its own batches. The teacher has no gradient. Its complete state is
    in its state dict, because τ depends only on the step that the caller counts.

    Args:
        student: the module that computes the projections, such as backbone and head. It is not registered as a
            submodule. Wrap it in DistributedDataParallel after this call.
        teacher: a module with the same parameters to use as the teacher. Its parameters are set to the student's; its
            buffers do not change. None makes a deep copy of the student.
        base: τ of the first update, in [0, 1].
        final: τ at the end, in [0, 1].

    Raises:
        ValueError: τ is outside [0, 1], or the parameters of the teacher differ from the student's.

    Example:
        >>> student = nn.Linear(1, 1, bias=False)
        >>> teacher = EMATeacher(student, base=0.5, final=1.0)
        >>> with torch.no_grad():
        ...     before = student.weight.clone()
        ...     _ = student.weight.add_(1.0)
        >>> teacher.update(0, 100)
        0.5
        >>> round(float(teacher.module.weight - before), 4)
        0.5
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None = None, *, base: float = 0.99, final: float = 1.0
    ) -> None:
        super().__init__()
        cosine_tau(0, 1, base, final)  # checks the ranges
        self.base, self.final = base, final
        self._student = [student]  # in a list: the student must not be registered as a submodule
        self.module = copy.deepcopy(student) if teacher is None else teacher
        ours, theirs = list(self.module.parameters()), list(student.parameters())
        if [p.shape for p in ours] != [p.shape for p in theirs]:
            raise ValueError(
                f"teacher must have the student's parameters: {len(theirs)} of the shapes "
                f"{[tuple(p.shape) for p in theirs]}, got {[tuple(p.shape) for p in ours]}"
            )
        with torch.no_grad():
            for own, other in zip(ours, theirs, strict=True):
                own.copy_(other)
        self.module.requires_grad_(False)

    @property
    def student(self) -> nn.Module:
        """The module whose parameters are averaged."""
        return self._student[0]

    @torch.no_grad()
    def update(self, step: int, total: int) -> float:
        """Update the teacher. Call it once after each optimiser step, also if gradients are accumulated.

        Args:
            step: number of earlier updates, 0 at the first call.
            total: number of optimiser steps of the whole run.

        Returns:
            τ, for logging.
        """
        tau = cosine_tau(step, total, self.base, self.final)
        update_teacher([self.module], [self.student], tau)
        return tau

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the teacher's output, without gradient."""
        return self.module(*args, **kwargs)
