"""Losses of DISSL's fork of VISSL under their original names and options, computed by ``plugins.losses``.

The model returns two outputs, first that of the teacher head, each with the rows of one view after another; the number
of views is inferred from the number of rows. The options ``n_Mx``, ``num_crops`` and ``buffer_params`` are accepted and
ignored, because their values follow from the outputs, and the fork's own files contain other values.
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
from vissl_ext.parts import is_number
from vissl_ext.views import check_batches, large_and_small, resolutions

_PATIENCE = 1000
"""Steps after the warm-up until the assignments are first checked for a stall."""
_BUFFER = {"embedding_dim", "world_size", "effective_batch_size"}


class ForkLoss(ClassyLoss):
    """Base class of the losses on the outputs of a teacher head and a student head.

    Args:
        config: the section ``LOSS.<name>``.

    Raises:
        ValueError: see ``check_config``.
    """

    defaults: ClassVar[Mapping[str, Any]]
    """The options and their defaults."""
    same_views: ClassVar[bool] = False
    """Whether student and teacher must have the same number of views."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.options = self.resolved(config)
        self.metrics: dict[str, Tensor] = {}
        self.moment = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ForkLoss":
        """Create the loss from the section ``LOSS.<name>``."""
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
            training: whether the model will be trained. An extraction of features has no views.

        Raises:
            UserError: the numbers of heads or views do not fit the loss.
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
                f"config.LOSS.name={name} requires two heads in config.MODEL.HEAD.PARAMS, the teacher's first, "
                f"got {len(config.MODEL.HEAD.PARAMS)}"
            )
        check_batches(config)
        teacher, student = _views(config, name, config.MODEL.get("MULTI_RES_SPLIT_CROPS", WHOLE))
        wanted = cls.teacher_views(options)
        if teacher != wanted:
            raise UserError(
                f"config.LOSS.name={name} requires {wanted} views for the teacher head, got {teacher}; change "
                "config.DATA.TRAIN.TRANSFORMS or config.MODEL.MULTI_RES_SPLIT_CROPS"
            )
        if student < max(2, teacher) or (cls.same_views and student != teacher):
            allowed = f"{teacher}" if cls.same_views else f"at least {max(2, teacher)}"
            raise UserError(f"config.LOSS.name={name} requires {allowed} views for the student head, got {student}")

    @classmethod
    def resolved(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Validate the options and add the defaults.

        Raises:
            ValueError: an option is unknown, has the wrong type or is out of range.
        """
        given = {key: value for key, value in config.items() if key != "name"}
        for key in given:
            if key not in cls.defaults:
                raise ValueError(f"{key!r} is unknown; allowed: {', '.join(sorted(cls.defaults))}")
        options = {**cls.defaults, **given}
        for key, value in options.items():
            _check_number(key, value)
        return options

    @classmethod
    def teacher_views(cls, options: Mapping[str, Any]) -> int:
        """Return the number of views of the teacher head."""
        raise NotImplementedError

    def split(self, output: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Split the outputs of the two heads into views.

        Raises:
            ValueError: there are not two outputs, or their numbers of rows are not multiples of the batch size.
        """
        if not isinstance(output, list | tuple) or len(output) != 2:
            raise ValueError("the loss requires the outputs of two heads, the teacher's first")
        teacher, student = output
        views = self.teacher_views(self.options)
        rows = len(teacher) // views
        if not rows or len(teacher) % views or len(student) % rows:
            raise ValueError(
                f"the outputs must consist of views of equal size, {views} of them for the teacher head, got "
                f"{len(teacher)} rows of the teacher head and {len(student)} of the student head"
            )
        return list(teacher.split(rows)), list(student.split(rows))


def _views(config: Any, name: str, groups: list[Any]) -> tuple[int, int]:
    """Return the numbers of views of the teacher head and of the student head."""
    counts = [count for _, count in resolutions(config.DATA.TRAIN.TRANSFORMS)]
    trunk = config.MODEL.TRUNK
    large_and_small(config)  # raises an error unless the large views are the first
    if config.DATA.TRAIN.COLLATE_FUNCTION == "multicrop_collator":
        if len(groups) != 2:
            raise UserError(
                f"config.LOSS.name={name} with multicrop_collator requires a group of resolutions for each head, "
                f"config.MODEL.MULTI_RES_SPLIT_CROPS=[[0,1],[0,null]], got {groups}"
            )
        teacher, student = (sum(counts[start:end]) for start, end in groups)
        return teacher, student
    keys = trunk.get("OUT_FEATURE_KEYS") or []
    if len(keys) != 2 and not trunk.RESNETS.get("IS_SKIP_RESIZER", False):
        raise UserError(
            f"config.LOSS.name={name} with simclr_collator requires a feature for each head, "
            f"config.MODEL.TRUNK.OUT_FEATURE_KEYS=[flatten,flatten], got {list(keys)}"
        )
    return sum(counts), sum(counts)


def _check_number(key: str, value: Any) -> None:
    if key.startswith(("temperature", "beta")):
        least = "above 0" if key.startswith("temperature") else "at least 0"
        if not is_number(value) or not 0 <= value < math.inf or (value == 0 and key.startswith("temperature")):
            raise ValueError(f"{key} must be a finite number {least}, got {value!r}")
    elif key.startswith("warmup") and value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"{key} must be a number of steps or null, got {value!r}")


def _are_crops(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(crop) is int for crop in value)


@register_loss("dstl_issl_loss")
class DstlISSLLoss(ForkLoss):
    """``plugins.losses.dissl_loss`` on the logits of both heads, with the fork's warm-up and the alarm for a stall.

    Options: ``temperature_assign`` τ_t and ``temperature_pred`` τ_s, > 0; ``beta_pM_unif`` λ and ``beta_H_MlZ`` β, ≥ 0;
    ``crops_for_teacher``, indices of the first T crops; ``warmup_beta_CE_iter``, number of steps or null.

    Buffers:
        num_iteration: ``[1]``, number of training steps, so that a resumed run continues the warm-up. Checkpoints of
            the fork, in which its name is ``dstl_criterion.num_iteration``, can be loaded too.
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
            raise ValueError(f"crops_for_teacher must be the indices of the first crops, such as [0, 1], got {crops}")
        return options

    @classmethod
    def teacher_views(cls, options: Mapping[str, Any]) -> int:
        """Return T, the number of crops for the teacher."""
        return len(options["crops_for_teacher"])

    def forward(self, output: list[Tensor], target: Tensor) -> Tensor:
        """Return the loss of the joined batch.

        Args:
            output: logits of the teacher head ``[T·B, C]`` and of the student head ``[S·B, C]``.
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
        name_in_fork = f"{prefix}dstl_criterion.num_iteration"
        if name_in_fork in state_dict:
            state_dict[f"{prefix}num_iteration"] = state_dict.pop(name_in_fork)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _watch(self, terms: DISSLTerms, classes: int) -> None:
        """Warn about a stall, and log the terms at the same steps as the fork."""
        self.alarm.classes = max(classes, 2)  # n_Mx may differ from the width of the heads
        self.alarm(terms.H_Mlz, self.num_iteration)
        step = self.alarm.steps
        if (step in (1, 10, 20, 50, 100, 150) or step % 200 == 0) and is_primary():
            logging.info(
                f"step {step}: H[M] {float(terms.H_M):.4f}, H[M|Z] {float(terms.H_Mlz):.4f}, "
                f"distillation {float(terms.distillation):.4f}, invariance {float(terms.invariance):.4f}"
            )


@register_loss("cntr_issl_loss")
class CntrISSLLoss(ForkLoss):
    """``plugins.losses.cissl_loss`` of two views of the teacher head and two or more of the student head.

    Options: ``temperature`` τ > 0.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"temperature": 0.1, "buffer_params": {}}
    positives: ClassVar[str] = "all"

    @classmethod
    def resolved(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """See ``ForkLoss.resolved``."""
        options = super().resolved(config)
        buffer = options["buffer_params"]
        if not isinstance(buffer, Mapping) or not set(buffer) <= _BUFFER:
            raise ValueError(
                f"buffer_params must be a mapping with the keys {', '.join(sorted(_BUFFER))}, got {buffer!r}"
            )
        return options

    @classmethod
    def teacher_views(cls, options: Mapping[str, Any]) -> int:
        """Return 2."""
        return 2

    def forward(self, output: list[Tensor], target: Tensor) -> Tensor:
        """Return the loss of the joined batch.

        Args:
            output: embeddings of the teacher head ``[2·B, D]``, the columns of the softmax, and of the student head
                ``[S·B, D]``.
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
    """CntrISSLLoss with SimCLR's positives: only the other view is positive, and a row's own view is left out."""

    positives = "other"
    same_views = True
