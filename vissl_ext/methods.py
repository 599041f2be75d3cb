"""The generic adapter: any MethodSpec as a loss and a head of VISSL.

What the user writes is the loss, with the method's options, and a head that knows the trunk's width alone::

    LOSS:
      name: isoloss
      isoloss: {proj_hidden_dim: 2048, alpha: 0.5, base_tau: 0.99, final_tau: 1.0}
    MODEL:
      HEAD:
        PARAMS: [["method_head", {in_dim: 512}]]

``base_tau`` and ``final_tau`` belong to the methods with a teacher. The task (``vissl_ext.task``) hands the options to
the head. Projector and predictor are in the head, hence in the model: VISSL's optimiser, DistributedDataParallel and
checkpoint know them like any head; C and W of a closed-form predictor are buffers there. The teacher is in the loss,
whose state VISSL checkpoints too.
"""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

from classy_vision.losses import ClassyLoss, register_loss
from torch import Tensor, nn
from vissl.models.heads import register_model_head

from plugins.clock import Clock
from plugins.distributed import WORLD
from plugins.heads import TwoBranchHead
from plugins.methods import METHODS
from plugins.objective import Objective, embed
from plugins.predictors import RunningMoment
from plugins.spec import Embeddings, MethodSpec
from plugins.targets import EMATeacher, cosine_tau, needs_teacher

HEAD = "method_head"
TAUS = {"base_tau": 0.99, "final_tau": 1.0}
"""Momentum of the teacher: of the first update and at the end, with BYOL's cosine in between."""


def method_options(name: str, given: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[float, float]]:
    """What stands below ``LOSS.<name>``, checked and completed.

    Args:
        name: a key of METHODS.
        given: the method's options, and ``base_tau`` and ``final_tau`` where it has a teacher.

    Returns:
        The options of the MethodSpec, and (base τ, final τ); (0, 0) where the method has no teacher.

    Raises:
        ValueError: an unknown name, a value of another type or out of range.
    """
    spec = METHODS[name]
    given = {key: value for key, value in given.items() if key != "name"}
    if not spec.teacher:
        return spec.resolve(given), (0.0, 0.0)
    taus = {key: given.pop(key, default) for key, default in TAUS.items()}
    try:
        options = spec.resolve(given)
    except ValueError as error:
        also = f"; and of the teacher {', '.join(TAUS)}" if " has no option " in str(error) else ""
        raise ValueError(f"{error}{also}") from None
    for key, value in taus.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"method {name}: {key} must be a float, got {value!r}")
    base, final = (float(value) for value in taus.values())
    try:
        cosine_tau(0, 1, base, final)  # the ranges
    except ValueError as error:
        raise ValueError(f"method {name}: base_tau, final_tau: {error}") from None
    return options, (base, final)


@register_model_head(HEAD)
class MethodHead(nn.Module):
    """Projector and predictor of a method.

    In training it takes the features of all views, view after view, the large ones first, and gives the projections of
    each view, then the predictions of each, where the method has a predictor; of a head of two branches then the
    targets that the second makes of each large view, and the features of each, detached. Each view has its own batch
    statistics. In evaluation it gives the projections alone.

    Args:
        model_config: VISSL's MODEL section.
        in_dim: width of the trunk's features.
        method: a key of METHODS; the task writes it here, and the next three.
        options: its options, as VISSL's configuration has them.
        views: how many views of each image a batch holds.
        large: how many of them are no small crops.

    Raises:
        ValueError: ``in_dim`` is not the width of the features; the rows are no multiple of the views.
    """

    def __init__(
        self,
        model_config: Any,
        in_dim: int,
        method: str | None = None,
        options: Mapping[str, Any] | None = None,
        views: int = 2,
        large: int = 2,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            known = ", ".join(sorted(METHODS))
            raise ValueError(f"{HEAD} belongs to a loss that is one of our methods ({known}), got LOSS.name={method}")
        spec = METHODS[method]
        self.in_dim, self.views, self.large = in_dim, views, large
        # a plain dict: the teacher is a deep copy
        self.options = dict(method_options(method, options or {})[0])
        self.projector = spec.head(in_dim, self.options)
        self.predictor = spec.predictor(self.options, WORLD) if spec.predictor else None

    def forward(self, features: Tensor) -> list[Tensor]:
        """``[V·B, in_dim]`` (or with trailing axes of one) → V projections ``[B, D]``, V predictions, own targets."""
        features = features.flatten(1)
        if features.shape[1] != self.in_dim:
            raise ValueError(f"{HEAD} has in_dim={self.in_dim}, but the trunk's features have {features.shape[1]}")
        if not self.training:
            return [self.projector(features)]
        if features.shape[0] % self.views:
            raise ValueError(f"{features.shape[0]} rows are no whole number of {self.views} views")
        predict = self.predictor.predict if self.predictor is not None else None
        e = embed(list(features.chunk(self.views)), self.projector, predict, large=self.large)
        predictions = e.p if self.predictor is not None else []
        return [*e.z, *predictions, *(e.target if e.features else []), *e.features]


class TeacherLoss(ClassyLoss):
    """A loss that may have an exponential-moving-average teacher; derive from it for one of your own.

    The task calls ``attach`` once the model is built, before a checkpoint is read; the teacher is a submodule, so that
    it is in the checkpoint. ``EMATeacherHook`` sets ``teacher_output`` before each forward, and moves the teacher after
    each optimiser step. With both momenta 0 there is no teacher, and ``teacher_output`` stays None.

    Args:
        base_tau: τ of the first update, in [0, 1].
        final_tau: τ at the end, in [0, 1].
    """

    def __init__(self, base_tau: float, final_tau: float) -> None:
        super().__init__()
        self.base_tau, self.final_tau = base_tau, final_tau
        self.teacher: EMATeacher | None = None
        self.teacher_output: Any = None

    def attach(self, model: nn.Module) -> None:
        """Make the teacher of a model: a copy of the whole model, unless ``teacher_pair`` selects a part."""
        if needs_teacher(self.base_tau, self.final_tau):
            student, copied = self.teacher_pair(model)
            self.teacher = EMATeacher(student, copied, base=self.base_tau, final=self.final_tau)

    def teacher_pair(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Return the modules whose weights the teacher averages, and the copy that becomes the teacher."""
        return model, copy_model(model)

    def teacher_input(self, images: Any) -> Any:
        """Select the part of a batch's input that the teacher sees: all of it."""
        return images


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy that shares the process groups of SyncBatchNorm, which cannot be copied."""
    groups = [getattr(module, "process_group", None) for module in model.modules()]
    return copy.deepcopy(model, {id(group): group for group in groups if group is not None})


class MethodLoss(TeacherLoss):
    """The loss of any method; a class for each of METHODS, told apart by ``spec`` alone, is registered below.

    Args:
        config: what stands below ``LOSS.<name>``.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    spec: ClassVar[MethodSpec]

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.options, taus = method_options(self.spec.name, config)
        super().__init__(*taus)
        self.objective = Objective(self.spec, self.options, WORLD)
        self.large = 2
        self.own_targets = 0
        self.predictor: list[nn.Module | None] = [None]  # in a list: the model's, not ours to save
        self.metrics: dict[str, Tensor] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "MethodLoss":
        """The loss that ``LOSS.<name>`` describes."""
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
        """Learn what the head gives, and make the teacher."""
        (head,) = model.heads
        self.predictor = [head.predictor]
        self.large = head.large
        self.own_targets = head.large if isinstance(head.projector, TwoBranchHead) else 0
        self.objective = Objective(self.spec, self.options, WORLD, head.predictor, head.projector)
        super().attach(model)

    @property
    def clock(self) -> Clock:
        """The count of optimiser steps."""
        return self.objective.clock

    @property
    def moment(self) -> RunningMoment | None:
        """The running second moment of the embedding, or None if the method does not track it."""
        return self.objective.tracked_moment(self.predictor[0])

    def teacher_pair(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Return the trunk and the projector. The predictor has no teacher."""
        copied = copy_model(model)
        for head in copied.heads:
            head.predictor, head.views = None, head.large
        return nn.ModuleList([model.trunk, *(head.projector for head in model.heads)]), copied

    def teacher_input(self, images: Any) -> Any:
        """Select the large views. A collator that gives one tensor has views of one size, which are all large."""
        return images[: self.large] if isinstance(images, list) else images

    def forward(self, output: list[Tensor], target: Tensor) -> Tensor:
        """Loss of the joined batch.

        Args:
            output: of MethodHead.
            target: labels; not used.
        """
        if self.own_targets:
            ends = len(output) - 2 * self.own_targets, len(output) - self.own_targets
            z = output[: ends[0]]
            embeddings = Embeddings(z, z, output[ends[0] : ends[1]], output[ends[1] :])
        else:
            half = len(output) if self.spec.predictor is None else len(output) // 2
            z, p = output[:half], output[-half:]
            detached = [view.detach() for view in z[: self.large]]
            embeddings = Embeddings(z, p, detached if self.teacher is None else self.teacher_output)
        terms = self.objective(embeddings)
        self.metrics = self.objective.statistics(terms, embeddings)
        return terms.loss


for _name, _spec in METHODS.items():
    register_loss(_name)(type(f"MethodLoss_{_name}", (MethodLoss,), {"spec": _spec, "__module__": __name__}))
