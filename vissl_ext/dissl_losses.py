"""The fork's losses by its names and with its keys; the maths is that of ``plugins.losses``.

The model gives two outputs, the teacher head's first, each with the rows of one view after another. How many views
there are is inferred from them. Keys that hold what can be inferred are taken and not used: ``n_Mx``, ``num_crops`` and
``buffer_params``, which do not follow the heads and crops of the fork's own files.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from classy_vision.generic.distributed_util import is_primary
from classy_vision.losses import ClassyLoss, register_loss
from torch import Tensor

from plugins.distributed import WORLD
from plugins.losses import CISSLTerms, DISSLTerms, StallAlarm, cissl_terms, dissl_terms, dissl_warmup
from plugins.tools.command import UserError
from vissl_ext.model import WHOLE
from vissl_ext.views import check_batches, large_and_small, resolutions

_PATIENCE = 1000
"""Steps after the warm-ups until the assignments are first looked at for a stall."""
_BUFFER = {"embedding_dim", "world_size", "effective_batch_size"}


class ForkLoss(ClassyLoss):
    """A loss on the outputs of a teacher head and of a student head.

    Args:
        config: what stands below ``LOSS.<name>``.

    Raises:
        ValueError: see ``check_config``.
    """

    defaults: ClassVar[Mapping[str, Any]]
    """The keys and their defaults."""
    same_views: ClassVar[bool] = False
    """Whether the student has as many views as the teacher."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.options = self.resolved(config)
        self.metrics: dict[str, Tensor] = {}
        self.moment = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ForkLoss":
        """The loss that ``LOSS.<name>`` describes."""
        return cls(config)

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """Raise a ValueError if ``LOSS.<name>`` is invalid."""
        cls.resolved(config)

    @classmethod
    def option_names(cls) -> set[str]:
        """Return the keys that are allowed below ``LOSS.<name>``."""
        return set(cls.defaults)

    @classmethod
    def check_run(cls, config: Any, *, training: bool) -> None:
        """Validate the heads and views of a configuration.

        Args:
            config: VISSL's configuration, below ``config``.
            training: whether it is to be trained; an extraction has no views.

        Raises:
            UserError: the loss cannot be trained with them.
        """
        if not training:
            return
        name = config.LOSS.name
        try:
            options = cls.resolved(config.LOSS.get(name, {}))
        except ValueError as error:
            raise UserError(f"config.LOSS.{name}: {error}") from None
        if len(config.MODEL.HEAD.PARAMS) != 2:
            raise UserError(
                f"config.LOSS.name={name} needs two heads in config.MODEL.HEAD.PARAMS, the teacher's first, "
                f"got {len(config.MODEL.HEAD.PARAMS)}"
            )
        check_batches(config)
        teacher, student = _views(config, name, config.MODEL.get("MULTI_RES_SPLIT_CROPS", WHOLE))
        wanted = cls.teacher_views(options)
        if teacher != wanted:
            raise UserError(
                f"config.LOSS.name={name} takes {wanted} views for the teacher, but the teacher head gets {teacher}; "
                "see config.DATA.TRAIN.TRANSFORMS and config.MODEL.MULTI_RES_SPLIT_CROPS"
            )
        if student < max(2, teacher) or (cls.same_views and student != teacher):
            raise UserError(
                f"config.LOSS.name={name} cannot have {student} views for the student and {teacher} teacher's"
            )

    @classmethod
    def resolved(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The options, checked and completed.

        Raises:
            ValueError: a key is unknown, or its value of another kind or out of range.
        """
        given = {key: value for key, value in config.items() if key != "name"}
        for key in given:
            if key not in cls.defaults:
                raise ValueError(f"there is no key {key!r}; known are {', '.join(sorted(cls.defaults))}")
        options = {**cls.defaults, **given}
        for key, value in options.items():
            _check_number(key, value)
        return options

    @classmethod
    def teacher_views(cls, options: Mapping[str, Any]) -> int:
        """How many views the teacher head sees."""
        raise NotImplementedError

    def split(self, output: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The views of the two heads' outputs.

        Raises:
            ValueError: there are not two outputs, or their rows are no whole numbers of views.
        """
        if not isinstance(output, list | tuple) or len(output) != 2:
            raise ValueError("this loss needs the outputs of two heads, the teacher's first")
        teacher, student = output
        views = self.teacher_views(self.options)
        rows = len(teacher) // views
        if not rows or len(teacher) % views or len(student) % rows:
            raise ValueError(
                f"{len(teacher)} rows of the teacher head and {len(student)} of the student head are no whole numbers "
                f"of views, where the teacher sees {views}"
            )
        return list(teacher.split(rows)), list(student.split(rows))


def _views(config: Any, name: str, groups: list[Any]) -> tuple[int, int]:
    """How many views the teacher head and the student head get."""
    counts = [count for _, count in resolutions(config.DATA.TRAIN.TRANSFORMS)]
    trunk = config.MODEL.TRUNK
    large_and_small(config)  # the teacher's views are the first
    if config.DATA.TRAIN.COLLATE_FUNCTION == "multicrop_collator":
        if len(groups) != 2:
            raise UserError(
                f"config.LOSS.name={name} with multicrop_collator needs a group of resolutions for each head, "
                f"config.MODEL.MULTI_RES_SPLIT_CROPS=[[0,1],[0,null]], got {groups}"
            )
        teacher, student = (sum(counts[start:end]) for start, end in groups)
        return teacher, student
    keys = trunk.get("OUT_FEATURE_KEYS") or []
    if len(keys) != 2 and not trunk.RESNETS.get("IS_SKIP_RESIZER", False):
        raise UserError(
            f"config.LOSS.name={name} with simclr_collator needs a feature for each head, "
            f"config.MODEL.TRUNK.OUT_FEATURE_KEYS=[flatten,flatten], got {list(keys)}"
        )
    return sum(counts), sum(counts)


def _check_number(key: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key.startswith(("temperature", "beta")):
        least = "above 0" if key.startswith("temperature") else "at least 0"
        if not number or not 0 <= value < math.inf or (value == 0 and key.startswith("temperature")):
            raise ValueError(f"{key} must be a finite number {least}, got {value!r}")
    elif key.startswith("warmup") and value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"{key} must be a number of steps or null, got {value!r}")


def _are_crops(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(crop) is int for crop in value)


@register_loss("dstl_issl_loss")
class DstlISSLLoss(ForkLoss):
    """``plugins.losses.dissl_loss`` on both heads' logits, with the warm-ups of the fork and the alarm at a stall.

    Keys: ``temperature_assign`` τ_t and ``temperature_pred`` τ_s, > 0; ``beta_pM_unif`` λ and ``beta_H_MlZ`` β, ≥ 0;
    ``crops_for_teacher``, the first T crops; ``warmup_beta_CE_iter``, steps or null.

    Buffers:
        num_iteration: ``[1]``, the steps done; with it a resumed run goes on in its warm-ups. The fork's checkpoints,
            which call it ``dstl_criterion.num_iteration``, are taken too.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "n_Mx": 16384,
        "num_crops": 2,
        "temperature_assign": 0.5,
        "temperature_pred": 1.0,
        "crops_for_teacher": [0, 1],
        "beta_pM_unif": 2.3,
        "beta_H_MlZ": 0.6,
        "warmup_beta_CE_iter": None,
    }
    num_iteration: Tensor

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.register_buffer("num_iteration", torch.zeros(1, dtype=torch.long))
        self.alarm = StallAlarm(2, after=(self.options["warmup_beta_CE_iter"] or 0) + _PATIENCE)

    @classmethod
    def resolved(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """See ``ForkLoss.resolved``."""
        options = super().resolved(config)
        crops = options["crops_for_teacher"]
        if not _are_crops(crops) or not crops or sorted(crops) != list(range(len(crops))):
            raise ValueError(f"crops_for_teacher must be the first crops, such as [0, 1], got {crops}")
        return options

    @classmethod
    def teacher_views(cls, options: Mapping[str, Any]) -> int:
        """T."""
        return len(options["crops_for_teacher"])

    def forward(self, output: list[Tensor], target: Tensor) -> Tensor:
        """Loss of the joined batch.

        Args:
            output: of the teacher head ``[T·B, C]`` and of the student head ``[S·B, C]``.
            target: labels; not used.
        """
        teacher, student = self.split(output)
        options = self.options
        if self.training:
            self.num_iteration += 1
        weights = dissl_warmup(
            self.num_iteration[0],
            lambda_maximality=options["beta_pM_unif"],
            beta_det_inv=options["beta_H_MlZ"],
            warmup_beta=options["warmup_beta_CE_iter"] or 0,
        )
        terms = dissl_terms(
            teacher,
            student,
            **weights._asdict(),
            tau_teacher=options["temperature_assign"],
            tau_student=options["temperature_pred"],
            comm=WORLD,
        )
        self.metrics = {name: value.detach() for name, value in terms._asdict().items()}
        if self.training:
            self._watch(terms, teacher[0].shape[1])
        return terms.loss

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        theirs = f"{prefix}dstl_criterion.num_iteration"
        if theirs in state_dict:
            state_dict[f"{prefix}num_iteration"] = state_dict.pop(theirs)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _watch(self, terms: DISSLTerms, classes: int) -> None:
        """Ring at a stall; log at the steps at which the fork does."""
        self.alarm.classes = max(classes, 2)  # n_Mx does not follow the heads
        self.alarm(terms.H_Mlz, self.num_iteration)
        step = self.alarm.steps
        if (step in (1, 10, 20, 50, 100, 150) or step % 200 == 0) and is_primary():
            logging.info(
                f"step {step}: H[M] {float(terms.H_M):.4f}, H[M|Z] {float(terms.H_Mlz):.4f}, "
                f"distillation {float(terms.distillation):.4f}, invariance {float(terms.invariance):.4f}"
            )


@register_loss("cntr_issl_loss")
class CntrISSLLoss(ForkLoss):
    """``plugins.losses.cissl_loss`` of two teacher views, or more views of the student head.

    Keys: ``temperature`` τ > 0.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"temperature": 0.1, "buffer_params": {}}
    positives: ClassVar[str] = "all"

    @classmethod
    def resolved(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """See ``ForkLoss.resolved``."""
        options = super().resolved(config)
        buffer = options["buffer_params"]
        if not isinstance(buffer, Mapping) or not set(buffer) <= _BUFFER:
            raise ValueError(f"buffer_params must have entries of {', '.join(sorted(_BUFFER))}, got {buffer!r}")
        return options

    @classmethod
    def teacher_views(cls, options: Mapping[str, Any]) -> int:
        """Two."""
        return 2

    def forward(self, output: list[Tensor], target: Tensor) -> Tensor:
        """Loss of the joined batch.

        Args:
            output: of the teacher head, whose rows are the columns of the softmax, and of the student head, each
                ``[2B, D]``.
            target: labels; not used.
        """
        teacher, student = self.split(output)
        terms: CISSLTerms = cissl_terms(
            student, teacher, temperature=self.options["temperature"], positives=self.positives, comm=WORLD
        )
        self.metrics = {name: value.detach() for name, value in terms._asdict().items()}
        return terms.loss


@register_loss("simple_cntr_issl_loss")
class SimpleCntrISSLLoss(CntrISSLLoss):
    """The same with SimCLR's positives: the other view alone, the row's own view is no column."""

    positives = "other"
    same_views = True


LOSSES: Mapping[str, type[ForkLoss]] = {
    "dstl_issl_loss": DstlISSLLoss,
    "cntr_issl_loss": CntrISSLLoss,
    "simple_cntr_issl_loss": SimpleCntrISSLLoss,
}
