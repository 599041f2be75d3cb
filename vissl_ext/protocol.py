"""The attributes and methods of a loss that the task, the hooks and the checks use.

Losses of other plugins may define them too.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from plugins.predictors import RunningMoment


@runtime_checkable
class LossWithMetrics(Protocol):
    """A registered loss whose terms are logged in metrics.csv.

    Attributes:
        metrics: the terms of the last step by name, detached scalars.
        moment: the running second moment of the embedding, whose spectrum is logged, or None.
        options: the values below ``LOSS.<name>``, completed with the defaults.

    Optional attributes: ``tau``, the teacher's momentum, and ``clock``, a :class:`plugins.clock.Clock`.
    """

    metrics: dict[str, Tensor]
    moment: RunningMoment | None
    options: Mapping[str, Any]


class CheckedLoss(Protocol):
    """A registered loss class that validates its part of a configuration before the run starts."""

    @classmethod
    def option_names(cls) -> set[str]:
        """Return the keys that are allowed below ``LOSS.<name>``."""
        ...

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """Raise a ValueError if ``LOSS.<name>`` is invalid."""
        ...

    @classmethod
    def check_run(cls, config: Any, *, training: bool) -> None:
        """Raise a UserError if the loss cannot be used with the rest of the configuration, below ``config``."""
        ...
