"""VISSL's training task, extended for the methods of ``plugins`` and for machines without apex.

It replaces ``self_supervision_task``, so stock configurations use it too. With a stock loss it differs from VISSL's
task in three points: LARC works without apex, checkpoints contain the loss scale of PyTorch's mixed precision, and all
processes start with the same model and the same state of the loss.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from classy_vision.losses import LOSS_REGISTRY
from classy_vision.optim.param_scheduler import ClassyParamScheduler, ConstantParamScheduler, UpdateInterval
from classy_vision.tasks import TASK_REGISTRY
from classy_vision.tasks.classification_task import AmpType
from vissl.optimizers import get_optimizer_param_groups
from vissl.trainer.train_task import SelfSupervisionTask

from plugins.distributed import LOCAL
from plugins.heads import MapHead
from plugins.methods import METHODS
from plugins.objective import Objective, ParameterGroup
from plugins.spec import Hints
from plugins.tools.command import UserError
from plugins.tools.stacks import SHARED_COLOURS
from plugins.tools.stems import stem_record
from vissl_ext.compat.broadcasts import broadcast_from_rank_zero
from vissl_ext.compat.rank_states import KEY, RankStates, restore_rank_state
from vissl_ext.hooks import MetricsHook, extra_hooks
from vissl_ext.labels import add_label_check, uses_class_labels
from vissl_ext.larc import PlainLARC, needs_plain_larc
from vissl_ext.life_cycle import LifeCycleHook
from vissl_ext.methods import HEAD, MethodLoss, method_options
from vissl_ext.model import check_adaptation, check_groups
from vissl_ext.transforms import set_epoch
from vissl_ext.trunks import check_trunk, trunk_width
from vissl_ext.views import check_batches, large_and_small, patches_of, shares_colours, stack_count

_SET_BY_TASK = {"method", "options", "views", "large", "stacks"}
"""Arguments of the head that the task adds to the user's ``in_dim``."""


def check_config(config: Any, *, training: bool = True) -> None:
    """Validate the model, the loss and the views of a configuration.

    Args:
        config: VISSL's configuration, below ``config``.
        training: whether the model will be trained. An extraction of features has no views, which are not checked then.

    Raises:
        UserError: a setting is invalid.
    """
    check_trunk(config.MODEL)
    check_adaptation(config.MODEL)
    check_groups(config.MODEL)
    check_run = getattr(LOSS_REGISTRY.get(config.LOSS.name), "check_run", None)
    if check_run is not None:
        check_run(config, training=training)
    if config.OPTIMIZER.use_larc and config.OPTIMIZER.name != "sgd":
        raise UserError(f"config.OPTIMIZER.use_larc=true requires OPTIMIZER.name=sgd, got {config.OPTIMIZER.name}")
    name = config.LOSS.name
    heads = [head[0] for head in config.MODEL.HEAD.PARAMS]
    if name not in METHODS:
        if HEAD in heads:
            raise UserError(f"{HEAD} requires config.LOSS.name to be one of {', '.join(sorted(METHODS))}, got {name}")
        return
    try:
        taps = METHODS[name].taps(method_options(name, config.LOSS.get(name, {}))[0])
    except ValueError as error:
        raise UserError(f"config.LOSS.{name}: {error}") from None
    if taps and config.MODEL.ACTIVATION_CHECKPOINTING.USE_ACTIVATION_CHECKPOINTING:
        raise UserError(
            f"config.LOSS.name={name} compares feature maps, which lose their gradients with activation checkpointing: "
            "set config.MODEL.ACTIVATION_CHECKPOINTING.USE_ACTIVATION_CHECKPOINTING=false"
        )
    if heads != [HEAD]:
        raise UserError(
            f"config.LOSS.name={name} requires config.MODEL.HEAD.PARAMS=[[{HEAD},{{in_dim:...}}]], got heads {heads}"
        )
    _check_head(config, name)
    if not training:
        return
    if config.TEST_MODEL:
        raise UserError(f"config.LOSS.name={name} has no test phase: set config.TEST_MODEL=false")
    large, small = large_and_small(config)
    stacks = stack_count(config.DATA.TRAIN.TRANSFORMS)
    if large + small < 2 and METHODS[name].views not in (0, 1):
        raise UserError(
            f"config.LOSS.name={name} requires two views of each image: add ImgPilToMultiCrop or ImgReplicatePil to "
            "config.DATA.TRAIN.TRANSFORMS, and collate the views with multicrop_collator or simclr_collator"
        )
    try:
        METHODS[name].check_views(large, small, stacks)
    except ValueError as error:
        raise UserError(f"config.DATA.TRAIN.TRANSFORMS: {error}") from None
    check_batches(config, views=large + small, stacks=stacks)
    if shares_colours(config.DATA.TRAIN.TRANSFORMS):
        warnings.warn(f"config.DATA.TRAIN.TRANSFORMS: {SHARED_COLOURS}", stacklevel=2)


def _check_head(config: Any, name: str) -> None:
    """Check the options of the head, and construct the head, the predictor and the loss on the meta device."""
    given = config.MODEL.HEAD.PARAMS[0][1:]
    if len(given) != 1 or not isinstance(given[0], dict) or set(given[0]) - _SET_BY_TASK != {"in_dim"}:
        raise UserError(f"{HEAD} has exactly one option, in_dim: [[{HEAD},{{in_dim:512}}]], got {list(given)}")
    width = given[0]["in_dim"]
    trunk = trunk_width(config.MODEL)
    if type(width) is not int or width < 1 or trunk not in (None, width):
        raise UserError(
            f"in_dim of {HEAD} must be the width of the trunk's features, {trunk or 'at least 1'}, got {width!r}"
        )
    spec, options = METHODS[name], method_options(name, config.LOSS.get(name, {}))[0]
    try:
        with torch.device("meta"):
            predictor = None if spec.predictor is None else spec.predictor(options, LOCAL)
            head = spec.head(width, options)
            if isinstance(head, MapHead):  # the trunk does not exist yet: any channels
                head.build([1] * len(spec.taps(options)))
            Objective(spec, options, LOCAL, predictor, head)
        patches = patches_of(config.DATA.TRAIN.TRANSFORMS)
        if spec.stacks and patches is not None:
            spec.check_patches(options, patches)
    except (ValueError, TypeError) as error:
        raise UserError(f"config.LOSS.{name}: {error}") from None


class ScaledScheduler(ClassyParamScheduler):
    """A schedule multiplied by a constant factor.

    Args:
        scheduler: the schedule.
        factor: the factor, dimensionless.
    """

    def __init__(self, scheduler: Any, factor: float) -> None:
        super().__init__(scheduler.update_interval)
        self.scheduler, self.factor = scheduler, factor

    def __call__(self, where: float) -> float:
        """Return the value at a fraction of the training in [0, 1)."""
        return self.factor * self.scheduler(where)


def hinted_groups(
    groups: list[dict[str, Any]],
    owned: list[ParameterGroup],
    main: Mapping[str, Any],
    without_momentum: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Add parameters to VISSL's parameter groups, and move those with hints to separate groups.

    Args:
        groups: result of ``get_optimizer_param_groups``; ``lr`` of a group is a schedule. Changed in place.
        owned: the parameter groups of the objective.
        main: learning rate and weight decay of parameters that are not in VISSL's groups, such as those of the loss.
        without_momentum: the settings of an optimiser's group that turn its momentum off.

    Returns:
        All groups, the separate ones last.
    """
    for group in groups:  # the weight of a layer with torch's parametrizations is computed
        group["params"] = [parameter for parameter in group["params"] if parameter.is_leaf]
    known = {id(parameter) for group in groups for parameter in group["params"]}
    every = [parameter for part in owned for parameter in part.parameters.values() if parameter.requires_grad]
    unknown = [parameter for parameter in every if id(parameter) not in known]
    groups = [*groups, {**main, "params": unknown}] if unknown else groups
    own = []
    for _, parameters, hints in owned:
        if replace(hints, frozen_steps=0, frozen_epochs=0) == Hints():
            continue
        ids = {id(parameter) for parameter in parameters.values()}
        settings = {
            **(without_momentum if hints.momentum == 0 else {}),
            **({"weight_decay": 0.0} if hints.no_decay else {}),
        }
        for group in groups:
            inside = [parameter for parameter in group["params"] if id(parameter) in ids]
            if not inside:
                continue
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
            schedule = group["lr"]
            if hints.lr_constant:
                schedule = ConstantParamScheduler(max(schedule(step / 4096) for step in range(4096)))
                schedule.update_interval = UpdateInterval.STEP
            own.append({**group, **settings, "params": inside, "lr": ScaledScheduler(schedule, hints.lr_scale)})
    return [*groups, *own]


class PluginTask(SelfSupervisionTask):
    """VISSL's SelfSupervisionTask for stock losses and for the methods of ``plugins``."""

    loss_of_ranks: list[dict[str, torch.Tensor]] | None = None
    """Tensors of the loss that differ between the processes; see ``RankStates``."""
    started_epoch: int | None = None
    """Number of the epoch that the method has started last; None before the first one."""

    @property
    def method(self) -> str | None:
        """The key of METHODS that is trained, or None if the loss is not one of METHODS."""
        return self.config.LOSS.name if self.config.LOSS.name in METHODS else None

    @property
    def epoch(self) -> int:
        """Number of the present epoch, from 0. With VISSL's public data sets it has one training phase."""
        return self.train_phase_idx // self.num_train_phases_per_epoch

    def set_hooks(self, hooks: list[Any]) -> Any:
        """Set the given hooks and those that the loss requires, which VISSL's own launcher does not pass."""
        names = {type(hook) for hook in hooks}
        hooks = [*hooks, *(hook for hook in (*extra_hooks(), RankStates()) if type(hook) not in names)]
        # the row of an epoch is written before its checkpoint: a run that is killed in between writes the row again
        first = LifeCycleHook | MetricsHook | RankStates
        return super().set_hooks(sorted(hooks, key=lambda hook: not isinstance(hook, first)))

    def prepare(self, pin_memory: bool = False) -> Any:
        """Validate the configuration and build data, model, loss and optimiser."""
        check_config(self.config)
        task = super().prepare(pin_memory=pin_memory)
        if isinstance(self.base_loss, MethodLoss):
            # after a checkpoint, which fills the memory of images, has been loaded
            self.base_loss.allocate(len(self.datasets["train"]))
        return task

    def _build_model(self) -> Any:
        if self.method:
            check_config(self.config, training=False)
            given = {key: value for key, value in self.config.LOSS[self.method].items() if key != "name"}
            large, small = large_and_small(self.config)
            stacks = stack_count(self.config.DATA.TRAIN.TRANSFORMS)
            self.config.MODEL.HEAD.PARAMS[0][1].update(
                method=self.method, options=given, views=large + small, large=large, stacks=stacks
            )
        model = super()._build_model()
        broadcast_from_rank_zero(model)
        return model

    def _attached_loss(self) -> Any:
        loss = super()._build_loss()
        if isinstance(loss, MethodLoss):
            # before the checkpoint, which contains the teacher, is loaded
            loss.attach(self.base_model)
        broadcast_from_rank_zero(loss)
        return loss

    def _build_loss(self) -> Any:
        # a method's loss exists already, because the optimiser trains its parameters
        loss = self.base_loss if isinstance(self.base_loss, MethodLoss) else self._attached_loss()
        name = self.config.LOSS.name
        if uses_class_labels(name):
            add_label_check(loss, self, (self.config.LOSS.get(name) or {}).get("ignore_index", -100))
        if self.checkpoint:
            restore_rank_state(self.checkpoint, loss)
        return loss

    def _build_optimizer(self) -> Any:
        if needs_plain_larc(self.config.OPTIMIZER):
            return PlainLARC.from_config(self.config.OPTIMIZER)
        return super()._build_optimizer()

    def prepare_optimizer(self) -> None:
        """Create VISSL's parameter groups, and separate ones for the parts in the method's hints and for the loss."""
        if not self.method:
            super().prepare_optimizer()
            return
        self.base_loss = self._attached_loss().to(self.device)
        groups = get_optimizer_param_groups(
            model=self.base_model,
            model_config=self.config.MODEL,
            optimizer_config=self.config.OPTIMIZER,
            optimizer_schedulers=self.optimizer_schedulers,
        )
        owned, main = self.base_loss.objective.groups, {key: groups[0][key] for key in ("lr", "weight_decay")}
        betas = getattr(self.optimizer, "_betas", None)  # of Adam, whose first one is the momentum
        still = {"momentum": 0.0} if betas is None else {"betas": ConstantParamScheduler((0.0, betas[1]))}
        self.optimizer.set_param_groups(hinted_groups(groups, owned, main, still))

    def set_epoch(self, phase_type: str, epoch: int, start_iter: int, train_phase_idx: int) -> None:
        """Set the epoch in the sampler and in the transforms, before the data loader starts its workers."""
        super().set_epoch(phase_type, epoch, start_iter, train_phase_idx)
        if phase_type == "train":
            set_epoch(getattr(self.datasets[phase_type], "transform", None), train_phase_idx)

    def get_classy_state(self, deep_copy: bool = False) -> dict[str, Any]:
        """Return VISSL's state, the stem, the method's epoch, the loss tensors of each process, and the loss scale.

        classy_vision/tasks/classification_task.py:968 saves the loss scale only if ``amp_args`` are set, which VISSL
        does for apex only.
        """
        state = super().get_classy_state(deep_copy=deep_copy)
        state.update(stem_record(self.base_model.trunk))
        if self.amp_grad_scaler is not None:
            state["amp"] = self.amp_grad_scaler.state_dict()
        if self.loss_of_ranks is not None:
            state[KEY] = self.loss_of_ranks
        if self.started_epoch is not None:
            state["started_epoch"] = self.started_epoch
        return state

    def _set_classy_state(self, state: dict[str, Any]) -> None:
        self.started_epoch = state.get("started_epoch")
        usable = self.amp_grad_scaler is not None and "scale" in state.get("amp", {})
        if not usable and self.amp_type != AmpType.APEX:
            # the run that wrote it used apex or another precision
            state = {key: value for key, value in state.items() if key != "amp"}
        super()._set_classy_state(state)


def replace_task() -> None:
    """Register PluginTask as ``self_supervision_task``."""
    TASK_REGISTRY["self_supervision_task"] = PluginTask
