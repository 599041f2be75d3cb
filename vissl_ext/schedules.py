"""Learning-rate schedule with a linear warm-up and a cosine.

VISSL composes two schedules for it. Its automatic scaling of the learning rate then removes the warm-up on one machine
and overwrites its start on several (vissl/utils/hydra_config.py:146). This schedule is scaled like a cosine.
"""

import math
from typing import Any

from classy_vision.optim.param_scheduler import ClassyParamScheduler, UpdateInterval, register_param_scheduler


@register_param_scheduler("warmup_cosine")
class WarmupCosine(ClassyParamScheduler):
    """Linear from ``warmup_value`` to ``start_value``, then half a cosine period to ``end_value``.

    A schedule of VISSL depends on the fraction of the training, not on the number of steps. The peak is at the first
    step after the W steps of the warm-up. In the scripts of Matrix-SSL and MEC, and in solo-learn, the last step of the
    warm-up and the step after it both have the peak value. The learning rates of the warm-up are (W - 1) / W of theirs,
    a relative difference of 8e-5 for W = 12510.

    Args:
        start_value: peak value. ``auto_lr_scaling`` replaces it by the scaled learning rate, and scales ``end_value``.
        end_value: value at the end.
        warmup: length of the warm-up as a fraction of the training, in [0, 1).
        warmup_value: value at the start; not scaled.
        update_interval: whether the value changes after each step or each epoch.

    Raises:
        ValueError: ``warmup`` is out of range.

    Example:
        >>> schedule = WarmupCosine(1.0, 0.0, warmup=0.2)
        >>> [round(schedule(where), 3) for where in (0.0, 0.1, 0.2, 0.6)]
        [0.0, 0.5, 1.0, 0.5]
    """

    def __init__(
        self,
        start_value: float,
        end_value: float = 0.0,
        *,
        warmup: float = 0.0,
        warmup_value: float = 0.0,
        update_interval: UpdateInterval = UpdateInterval.STEP,
    ) -> None:
        super().__init__(update_interval)
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup must be a fraction of the training in [0, 1), got {warmup}")
        self.start_value, self.end_value = start_value, end_value
        self.warmup, self.warmup_value = warmup, warmup_value

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WarmupCosine":
        """Create the schedule from a section of ``OPTIMIZER.param_schedulers``."""
        return cls(
            config["start_value"],
            config["end_value"],
            warmup=config.get("warmup", 0.0),
            warmup_value=config.get("warmup_value", 0.0),
            update_interval=UpdateInterval.from_config(config, UpdateInterval.STEP),
        )

    def __call__(self, where: float) -> float:
        """Return the value at a fraction of the training in [0, 1)."""
        if where < self.warmup:
            return self.warmup_value + (self.start_value - self.warmup_value) * where / self.warmup
        rest = (where - self.warmup) / (1 - self.warmup)
        return self.end_value + (self.start_value - self.end_value) * (1 + math.cos(math.pi * rest)) / 2
