"""What a configuration of the fork must be, said before anything is started."""

from typing import Any

from classy_vision.losses import LOSS_REGISTRY

from plugins.tools.command import UserError
from vissl_ext.dissl.losses import ForkLoss, SimpleCntrISSLLoss
from vissl_ext.dissl.model import WHOLE
from vissl_ext.views import check_batches, large_and_small, resolutions


def check_fork(config: Any, *, training: bool) -> None:
    """Refuse groups of resolutions that are none, and heads and views that a loss of the fork cannot be made with.

    Args:
        config: VISSL's configuration, below ``config``.
        training: whether it is to be trained.

    Raises:
        UserError: one sentence that says what is wrong and what is allowed.
    """
    groups = config.MODEL.get("MULTI_RES_SPLIT_CROPS", WHOLE)
    _check_groups(groups)
    name = config.LOSS.name
    kind = LOSS_REGISTRY.get(name, object)
    if not issubclass(kind, ForkLoss) or not training:
        return
    try:
        options = kind.resolved(config.LOSS.get(name, {}))
    except ValueError as error:
        raise UserError(f"config.LOSS.{name}: {error}") from None
    if len(config.MODEL.HEAD.PARAMS) != 2:
        raise UserError(
            f"config.LOSS.name={name} needs two heads in config.MODEL.HEAD.PARAMS, the teacher's first, "
            f"got {len(config.MODEL.HEAD.PARAMS)}"
        )
    check_batches(config)
    teacher, student = _views(config, name, groups)
    wanted = kind.teacher_views(options)
    if teacher != wanted:
        raise UserError(
            f"config.LOSS.name={name} takes {wanted} views for the teacher, but the teacher head gets {teacher}; see "
            "config.DATA.TRAIN.TRANSFORMS and config.MODEL.MULTI_RES_SPLIT_CROPS"
        )
    if student < max(2, teacher) or (issubclass(kind, SimpleCntrISSLLoss) and student != teacher):
        raise UserError(f"config.LOSS.name={name} cannot have {student} views for the student and {teacher} teacher's")


def _check_groups(groups: Any) -> None:
    key = "config.MODEL.MULTI_RES_SPLIT_CROPS"
    pairs = isinstance(groups, list) and groups and all(isinstance(group, list) and len(group) == 2 for group in groups)
    ends = [end for group in groups for end in group] if pairs else ["none"]
    if any(end is not None and (type(end) is not int or end < 0) for end in ends):
        raise UserError(f"{key} has for each head its first resolution and the end, [[0,1],[0,null]], got {groups}")


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
