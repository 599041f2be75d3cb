"""VISSL's training task with what our methods and a machine without apex need.

It takes the place of ``self_supervision_task``, so that stock configurations train with it. For a stock loss it differs
in three things: LARC works without apex, the loss scale of PyTorch's mixed precision is in the checkpoint, and all
processes begin with the same model and the same state of the loss.
"""

from typing import Any

import torch
from classy_vision.losses import LOSS_REGISTRY
from classy_vision.optim.param_scheduler import ClassyParamScheduler, ConstantParamScheduler, UpdateInterval
from classy_vision.tasks import TASK_REGISTRY
from classy_vision.tasks.classification_task import AmpType
from vissl.optimizers import get_optimizer_param_groups
from vissl.trainer.train_task import SelfSupervisionTask

from plugins.distributed import LOCAL
from plugins.methods import METHODS
from plugins.tools.command import UserError
from vissl_ext.compat.broadcasts import as_in_the_first
from vissl_ext.compat.rank_states import KEY, RankStates, restore_rank_state
from vissl_ext.hooks import MetricsHook, extra_hooks
from vissl_ext.labels import check_labels_of, takes_classes
from vissl_ext.larc import needs_plain_larc, plain_larc
from vissl_ext.methods import HEAD, TeacherLoss, method_options
from vissl_ext.model import check_groups
from vissl_ext.transforms import tell_epoch
from vissl_ext.trunks import check_trunk, trunk_width
from vissl_ext.views import check_batches, large_and_small

_OF_TASK = {"method", "options", "views", "large"}
"""What the task writes beside ``in_dim`` into the configuration of the head."""


def check_config(config: Any, *, training: bool = True) -> None:
    """Refuse what the method cannot be trained with.

    Args:
        config: VISSL's configuration, below ``config``.
        training: whether it is to be trained; an extraction of its projections has no views.

    Raises:
        UserError: one sentence that says what is wrong and what is allowed.
    """
    check_trunk(config.MODEL)
    check_groups(config.MODEL)
    check_run = getattr(LOSS_REGISTRY.get(config.LOSS.name), "check_run", None)
    if check_run is not None:
        check_run(config, training=training)
    if config.OPTIMIZER.use_larc and config.OPTIMIZER.name != "sgd":
        raise UserError(f"config.OPTIMIZER.use_larc=true works with the optimiser sgd, got {config.OPTIMIZER.name}")
    name = config.LOSS.name
    heads = [head[0] for head in config.MODEL.HEAD.PARAMS]
    if name not in METHODS:
        if HEAD in heads:
            raise UserError(f"{HEAD} needs a config.LOSS.name of {', '.join(sorted(METHODS))}, got {name}")
        return
    try:
        method_options(name, config.LOSS.get(name, {}))
    except ValueError as error:
        raise UserError(f"config.LOSS.{name}: {error}") from None
    if heads != [HEAD]:
        raise UserError(
            f"config.LOSS.name={name} needs config.MODEL.HEAD.PARAMS=[[{HEAD},{{in_dim:...}}]], got the heads {heads}"
        )
    _check_head(config, name)
    if not training:
        return
    if config.TEST_MODEL:
        raise UserError(f"config.LOSS.name={name} is for training alone: set config.TEST_MODEL=false")
    large, small = large_and_small(config)
    if large + small < 2:
        raise UserError(
            f"config.LOSS.name={name} needs two views of each image: put ImgPilToMultiCrop or ImgReplicatePil into "
            "config.DATA.TRAIN.TRANSFORMS, and collate them with multicrop_collator or simclr_collator"
        )
    try:
        METHODS[name].check_views(large, small)
    except ValueError as error:
        raise UserError(f"config.DATA.TRAIN.TRANSFORMS: {error}") from None
    check_batches(config)


def _check_head(config: Any, name: str) -> None:
    """Refuse options of the head, of the parts that it is made of and of the loss that nothing can be made with."""
    given = config.MODEL.HEAD.PARAMS[0][1:]
    if len(given) != 1 or not isinstance(given[0], dict) or set(given[0]) - _OF_TASK != {"in_dim"}:
        raise UserError(f"{HEAD} takes in_dim and nothing else: [[{HEAD},{{in_dim:512}}]], got {list(given)}")
    width = given[0]["in_dim"]
    trunk = trunk_width(config.MODEL)
    if type(width) is not int or width < 1 or trunk not in (None, width):
        raise UserError(
            f"in_dim of {HEAD} is the width of the trunk's features, {trunk or 'a whole number above 0'}, got {width!r}"
        )
    spec, options = METHODS[name], method_options(name, config.LOSS.get(name, {}))[0]
    try:
        with torch.device("meta"):
            spec.head(width, options)
            if spec.predictor is not None:
                spec.predictor(options, LOCAL)
            spec.loss(options, LOCAL)
    except (ValueError, TypeError) as error:
        raise UserError(f"config.LOSS.{name}: {error}") from None


class ScaledScheduler(ClassyParamScheduler):
    """A schedule times a number.

    Args:
        scheduler: the schedule.
        factor: what its values are multiplied by.
    """

    def __init__(self, scheduler: Any, factor: float) -> None:
        super().__init__(scheduler.update_interval)
        self.scheduler, self.factor = scheduler, factor

    def __call__(self, where: float) -> float:
        """The value at a fraction of the training in [0, 1)."""
        return self.factor * self.scheduler(where)


def predictor_groups(groups: list[dict[str, Any]], predictor: list[Any], scale: float, constant: bool) -> list[Any]:
    """VISSL's parameter groups with the predictor's parameters in groups of their own.

    Args:
        groups: of ``get_optimizer_param_groups``; their ``lr`` is a schedule.
        predictor: the predictor's parameters.
        scale: its learning rate over that of its group.
        constant: it keeps the highest learning rate that the schedule takes.
    """
    ids = {id(parameter) for parameter in predictor}
    own = []
    for group in groups:
        inside = [parameter for parameter in group["params"] if id(parameter) in ids]
        if not inside:
            continue
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        schedule = group["lr"]
        if constant:
            schedule = ConstantParamScheduler(max(schedule(step / 4096) for step in range(4096)))
            schedule.update_interval = UpdateInterval.STEP
        own.append({**group, "params": inside, "lr": ScaledScheduler(schedule, scale)})
    return [*groups, *own]


class PluginTask(SelfSupervisionTask):
    """SelfSupervisionTask for stock losses and ours."""

    loss_of_ranks: list[dict[str, torch.Tensor]] | None = None
    """See ``RankStates``."""

    @property
    def method(self) -> str | None:
        """The key of METHODS that is trained, if one is."""
        return self.config.LOSS.name if self.config.LOSS.name in METHODS else None

    def set_hooks(self, hooks: list[Any]) -> Any:
        """The given hooks and those that the loss needs, which a launcher that does not know us leaves out."""
        names = {type(hook) for hook in hooks}
        hooks = [*hooks, *(hook for hook in (*extra_hooks(), RankStates()) if type(hook) not in names)]
        # an epoch's row is written before its checkpoint: a run that is killed between the two writes it again
        return super().set_hooks(sorted(hooks, key=lambda hook: not isinstance(hook, MetricsHook | RankStates)))

    def prepare(self, pin_memory: bool = False) -> Any:
        """Everything that a training needs; refuses what cannot be trained."""
        check_config(self.config)
        return super().prepare(pin_memory=pin_memory)

    def _build_model(self) -> Any:
        if self.method:
            check_config(self.config, training=False)
            given = {key: value for key, value in self.config.LOSS[self.method].items() if key != "name"}
            large, small = large_and_small(self.config)
            self.config.MODEL.HEAD.PARAMS[0][1].update(
                method=self.method, options=given, views=large + small, large=large
            )
        model = super()._build_model()
        as_in_the_first(model)
        return model

    def _build_loss(self) -> Any:
        loss = super()._build_loss()
        as_in_the_first(loss)
        if isinstance(loss, TeacherLoss):
            # before the checkpoint is read, which holds the teacher
            loss.attach(self.base_model)
        name = self.config.LOSS.name
        if takes_classes(name):
            check_labels_of(loss, self, (self.config.LOSS.get(name) or {}).get("ignore_index", -100))
        if self.checkpoint:
            restore_rank_state(self.checkpoint, loss)
        return loss

    def _build_optimizer(self) -> Any:
        if needs_plain_larc(self.config.OPTIMIZER):
            return plain_larc(self.config.OPTIMIZER)
        return super()._build_optimizer()

    def prepare_optimizer(self) -> None:
        """Parameter groups as VISSL makes them; a predictor with a learning rate of its own gets its own groups."""
        head = self.base_model.heads[0] if self.method else None
        parameters = list(head.predictor.parameters()) if head is not None and head.predictor is not None else []
        scale = head.options.get("pred_lr_scale", 1.0) if parameters else 1.0
        constant = head.options.get("pred_lr_constant", False) if parameters else False
        if not parameters or (scale == 1.0 and not constant):
            super().prepare_optimizer()
            return
        groups = get_optimizer_param_groups(
            model=self.base_model,
            model_config=self.config.MODEL,
            optimizer_config=self.config.OPTIMIZER,
            optimizer_schedulers=self.optimizer_schedulers,
        )
        self.optimizer.set_param_groups(predictor_groups(groups, parameters, scale, constant))

    def set_epoch(self, phase_type: str, epoch: int, start_iter: int, train_phase_idx: int) -> None:
        """Tell sampler and transforms which epoch begins; the processes that load its data are started after this."""
        super().set_epoch(phase_type, epoch, start_iter, train_phase_idx)
        if phase_type == "train":
            tell_epoch(getattr(self.datasets[phase_type], "transform", None), train_phase_idx)

    def get_classy_state(self, deep_copy: bool = False) -> dict[str, Any]:
        """VISSL's state, the tensors of each process's loss, and the loss scale of PyTorch's mixed precision.

        classy_vision/tasks/classification_task.py:968 saves it where there are ``amp_args``, which VISSL has for apex
        alone.
        """
        state = super().get_classy_state(deep_copy=deep_copy)
        if self.amp_grad_scaler is not None:
            state["amp"] = self.amp_grad_scaler.state_dict()
        if self.loss_of_ranks is not None:
            state[KEY] = self.loss_of_ranks
        return state

    def _set_classy_state(self, state: dict[str, Any]) -> None:
        ours = self.amp_grad_scaler is not None and "scale" in state.get("amp", {})
        if not ours and self.amp_type != AmpType.APEX:
            # of a run with apex, or in another precision
            state = {key: value for key, value in state.items() if key != "amp"}
        super()._set_classy_state(state)


def replace_task() -> None:
    """Let VISSL build this task where a configuration says ``self_supervision_task``."""
    TASK_REGISTRY["self_supervision_task"] = PluginTask
