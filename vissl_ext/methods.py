"""Generic adapter: each MethodSpec as a loss and a head of VISSL.

The user's configuration names the loss, with the options of the method, and a head, with the width of the trunk::

    LOSS:
      name: isoloss
      isoloss: {proj_hidden_dim: 2048, alpha: 0.5, base_tau: 0.99, final_tau: 1.0}
    MODEL:
      HEAD:
        PARAMS: [["method_head", {in_dim: 512}]]

Methods with an EMA teacher also have the options ``base_tau`` and ``final_tau``. The task (``vissl_ext.task``) passes
the options to the head. The head contains the projector and the predictor, so VISSL optimises, wraps in
DistributedDataParallel and checkpoints them like any head. The loss contains the teacher; VISSL checkpoints the state
of the loss too.
"""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from classy_vision.losses import ClassyLoss, register_loss
from torch import Tensor, nn
from vissl.models.heads import register_model_head

from plugins.clock import Clock
from plugins.distributed import WORLD
from plugins.heads import StackHead, TwoBranchHead
from plugins.methods import METHODS
from plugins.objective import Objective, embed
from plugins.predictors import RunningMoment
from plugins.spec import Embeddings, MethodSpec, UnknownOptionError
from plugins.targets import EMATeacher, cosine_tau, needs_teacher
from plugins.tools.command import UserError

HEAD = "method_head"
TAUS = {"base_tau": 0.99, "final_tau": 1.0}
"""Momentum of the teacher at the first and at the last update; between them it follows BYOL's cosine schedule."""


def method_options(name: str, given: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[float, float]]:
    """Validate the section ``LOSS.<name>`` and add the defaults.

    Args:
        name: a key of METHODS.
        given: options of the method; with a teacher also ``base_tau`` and ``final_tau``.

    Returns:
        The options of the MethodSpec, and (base τ, final τ), which is (0, 0) if the method has no teacher.

    Raises:
        ValueError: an option is unknown, has the wrong type or is out of range.
    """
    spec = METHODS[name]
    given = {key: value for key, value in given.items() if key != "name"}
    if not spec.teacher:
        return spec.resolve(given), (0.0, 0.0)
    taus = {key: given.pop(key, default) for key, default in TAUS.items()}
    try:
        options = spec.resolve(given)
    except UnknownOptionError as error:
        raise UnknownOptionError(error.method, error.key, [*error.known, *TAUS]) from None
    for key, value in taus.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"method {name}: {key} must be a float, got {value!r}")
    base, final = (float(value) for value in taus.values())
    try:
        cosine_tau(0, 1, base, final)  # checks the ranges
    except ValueError as error:
        raise ValueError(f"method {name}: base_tau, final_tau: {error}") from None
    return options, (base, final)


@register_model_head(HEAD)
class MethodHead(nn.Module):
    """Projector and predictor of a method.

    In training the input contains the features of all views, one view after another, large views first. The output is a
    list with the projections of each view, then the predictions of each view (if the method has a predictor), then, for
    a head of two branches, the targets and the detached features of each large view. Stacks of patches are the last
    views. Batch statistics are computed per view. In evaluation the output contains the projections only.

    With the option ``log_quality`` of features the detached features of the large views come before all of these. For a
    method with ``taps`` the model appends the projected feature maps, view after view. A head that projects each
    patch appends what it makes of each stack.

    Args:
        model_config: VISSL's MODEL section.
        in_dim: width of the trunk's features.
        method: a key of METHODS. The task sets this argument and the following ones.
        options: the section ``LOSS.<method>``.
        views: number of views of each image in a batch, without stacks.
        large: number of large views among them.
        stacks: number of stacks of patches of each image in a batch.

    Raises:
        ValueError: the method is unknown; ``in_dim`` is not the width of the features; the number of rows is not a
            multiple of the number of views; the number of stacks is wrong.
    """

    def __init__(
        self,
        model_config: Any,
        in_dim: int,
        method: str | None = None,
        options: Mapping[str, Any] | None = None,
        views: int = 2,
        large: int = 2,
        stacks: int = 0,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            allowed = ", ".join(sorted(METHODS))
            raise ValueError(f"{HEAD} requires LOSS.name to be one of {allowed}, got {method}")
        spec = self.spec = METHODS[method]
        self.in_dim, self.views, self.large, self.stacks = in_dim, views, large, stacks
        # a dict and not a mapping proxy, because the teacher is a deep copy of the head
        self.options = dict(method_options(method, options or {})[0])
        self.projector = spec.head(in_dim, self.options)
        self.predictor = spec.predictor(self.options, WORLD) if spec.predictor else None
        self.taps = dict(spec.taps(self.options))
        self.shown = (large or stacks) if self.options["log_quality"] in (True, "features") else 0

    def prepare(self, trunk: nn.Module) -> None:
        """Change the trunk in place, as the method's options say."""
        self.spec.prepare(self.options, trunk)

    def forward(self, features: Tensor | list[Tensor]) -> list[Tensor]:
        """Map features to the list that the class describes.

        Args:
            features: ``[V·B, in_dim]``, trailing axes of size 1 allowed; with stacks a list of these, unless there are
                no views, and of the features of each stack, ``[B, P, in_dim]``.
        """
        parts = features if isinstance(features, list) else [features.flatten(1)]
        for part in parts:
            if part.shape[-1] != self.in_dim:
                raise ValueError(f"{HEAD} has in_dim={self.in_dim}, but the trunk's features have {part.shape[-1]}")
        if not self.training:
            return [self.projector(parts[0])]
        of_views, stacks = (parts[:1], parts[1:]) if self.views else ([], parts)
        if any(part.shape[0] % self.views for part in of_views):
            rows = of_views[0].shape[0]
            raise ValueError(f"{HEAD} needs a multiple of {self.views} rows, one per view, got {rows}")
        if len(stacks) != self.stacks:
            raise ValueError(f"{HEAD} needs {self.stacks} stacks of patches per image, got {len(stacks)}")
        predict = self.predictor.predict if self.predictor is not None else None
        views = [view for part in of_views for view in part.flatten(1).chunk(self.views)]
        e = embed([*views, *stacks], self.projector, predict, large=self.large)
        predictions = e.p if self.predictor is not None else []
        maps = [map_ for view in e.maps for map_ in view]
        return [*e.backbone[: self.shown], *e.z, *predictions, *(e.target if e.features else []), *e.features, *maps]


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model. It shares the process groups of SyncBatchNorm, which cannot be copied."""
    groups = [getattr(module, "process_group", None) for module in model.modules()]
    return copy.deepcopy(model, {id(group): group for group in groups if group is not None})


class MethodLoss(ClassyLoss):
    """Loss of a method. For each entry of METHODS a subclass that sets ``spec`` is registered below.

    The task calls ``attach`` after it has built the model and before it loads a checkpoint; the teacher is a submodule
    and therefore part of the checkpoint. ``EMATeacherHook`` sets ``teacher_output`` before each loss and calls
    ``after_step`` after each optimiser step. If both momenta are 0, there is no teacher and ``teacher_output`` stays
    None.

    Args:
        config: the section ``LOSS.<name>``.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    spec: ClassVar[MethodSpec]

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.options, (self.base_tau, self.final_tau) = method_options(self.spec.name, config)
        self.teacher: EMATeacher | None = None
        self.teacher_output: Any = None
        self.objective = Objective(self.spec, self.options, WORLD)
        self.large = 2
        self.views = 2
        self.own_targets = self.shown = 0
        self.without_maps = self.with_maps = 0
        self.index: Tensor | None = None
        self.predictor: list[nn.Module | None] = [None]  # in a list, so that it is not a submodule of the loss
        self.metrics: dict[str, Tensor] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "MethodLoss":
        """Create the loss from the section ``LOSS.<name>``."""
        return cls(config)

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """Raise a ValueError if ``LOSS.<name>`` is invalid."""
        method_options(cls.spec.name, config)

    @classmethod
    def option_names(cls) -> set[str]:
        """Return the keys that are allowed below ``LOSS.<name>``."""
        return {*cls.spec.options, *(TAUS if cls.spec.teacher else ())}

    def attach(self, model: nn.Module) -> None:
        """Read the number of views and the predictor from the head, and create the teacher."""
        (head,) = model.heads
        self.predictor = [head.predictor]
        self.large, self.views, self.shown = head.large, head.views + head.stacks, head.shown
        self.own_targets = head.large if isinstance(head.projector, TwoBranchHead) else 0
        if head.taps:
            self.with_maps = self.views
        elif isinstance(head.projector, StackHead):
            self.without_maps, self.with_maps = head.views, head.stacks
        self.objective = Objective(self.spec, self.options, WORLD, head.predictor, head.projector)
        if needs_teacher(self.base_tau, self.final_tau):
            student, copied = self.teacher_pair(model)
            self.teacher = EMATeacher(student, copied, base=self.base_tau, final=self.final_tau)
            self.objective.set_teacher([self.teacher.module], [self.teacher.student])

    def has_learned_parameters(self) -> bool:
        """Return False: ``LifeCycleHook`` averages the gradients of the loss's parameters over the processes.

        Otherwise Classy Vision would wrap the loss in DistributedDataParallel, which broadcasts all buffers, such as a
        memory bank, in each step, and adds "module." to the names in a checkpoint.
        """
        return False

    def allocate(self, size: int) -> None:
        """Allocate the memory of images, if the method has one and no checkpoint has filled it.

        Args:
            size: number of training images.

        Raises:
            UserError: the checkpoint is that of another number of images.
        """
        try:
            self.objective.allocate(size)
        except ValueError as error:
            raise UserError(f"config.DATA.TRAIN: {error}") from None

    def set_index(self, sample: Mapping[str, Any]) -> None:
        """Set the positions of a batch's images in the training set, if the method reads them.

        Args:
            sample: what VISSL's training step makes of a batch. ``data_idx`` has the positions view after view.
        """
        if self.spec.indexed:
            positions = torch.cat([*sample["data_idx"]])
            self.index = positions[: len(positions) // self.views]

    def after_step(self, step: int, total: int) -> None:
        """End an optimiser step of the method, which also updates the teacher, and set ``tau``, the τ of the update.

        Args:
            step: number of earlier steps.
            total: number of steps of the run.
        """
        if self.teacher is None:
            self.objective.after_step()
        else:
            self.tau = cosine_tau(step, total, self.base_tau, self.final_tau)
            self.objective.after_step(self.tau)

    @property
    def clock(self) -> Clock:
        """The count of optimiser steps."""
        return self.objective.clock

    @property
    def moment(self) -> RunningMoment | None:
        """The running second moment of the embedding, or None if the method does not track it."""
        return self.objective.tracked_moment(self.predictor[0])

    def teacher_pair(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Return the modules whose weights the teacher averages, and the copy that becomes the teacher.

        The teacher averages trunk and projector. The copy has no predictor.
        """
        copied = copy_model(model)
        for head in copied.heads:
            head.predictor, head.views, head.stacks, head.taps, head.shown = None, head.large, 0, {}, 0
            if self.spec.teacher_init is not None:
                self.spec.teacher_init(head.projector)
        return nn.ModuleList([model.trunk, *(head.projector for head in model.heads)]), copied

    def teacher_input(self, images: Any) -> Any:
        """Return the large views, the teacher's input. If a batch is a single tensor, all its views are large."""
        return images[: self.large] if isinstance(images, list) else images

    def forward(self, output: list[Tensor], target: Tensor) -> Tensor:
        """Return the loss of the joined batch.

        Args:
            output: output of MethodHead.
            target: labels; not used.
        """
        maps: list[tuple[Tensor, ...]] = []
        backbone, output = output[: self.shown], output[self.shown :]
        if self.with_maps:
            own = self.views * (1 if self.spec.predictor is None else 2)
            per_view = (len(output) - own) // self.with_maps
            maps = [tuple(output[start : start + per_view]) for start in range(own, len(output), per_view)]
            maps = [()] * self.without_maps + maps
            output = output[:own]
        if self.own_targets:
            ends = len(output) - 2 * self.own_targets, len(output) - self.own_targets
            z = output[: ends[0]]
            embeddings = Embeddings(z, z, output[ends[0] : ends[1]], output[ends[1] :])
        else:
            half = len(output) if self.spec.predictor is None else len(output) // 2
            z, p = output[:half], output[-half:]
            detached = [view.detach() for view in z[: self.large]]
            embeddings = Embeddings(z, p, detached if self.teacher is None else self.teacher_output)
        if self.index is not None:
            embeddings = embeddings._replace(index=self.index.to(z[0].device))
        if maps:
            embeddings = embeddings._replace(maps=maps)
        terms = self.objective(embeddings._replace(backbone=backbone))
        self.metrics = self.objective.statistics(terms, embeddings)
        return terms.loss


def register_method(spec: MethodSpec) -> None:
    """Register the loss of an entry of METHODS with VISSL, under its name."""
    register_loss(spec.name)(type(f"MethodLoss_{spec.name}", (MethodLoss,), {"spec": spec, "__module__": __name__}))


for _spec in METHODS.values():
    register_method(_spec)
