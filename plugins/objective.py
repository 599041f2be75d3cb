"""The part of a training step that all frameworks share: embeddings, loss and logged statistics."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugins.checks import NotFiniteError, check_result
from plugins.clock import Clock, Feed, Stepped
from plugins.distributed import LOCAL, Collective
from plugins.heads import MapHead, SharedHead, StackHead, TwoBranchHead
from plugins.losses import ETFMonitor
from plugins.metrics import QualityMonitor
from plugins.metrics.monitor import check_width
from plugins.patches import patch_stack
from plugins.predictors import RunningMoment
from plugins.spec import Embeddings, Hints, MethodSpec, Terms
from plugins.spelling import counted
from plugins.taps import FeatureTaps, map_channels
from plugins.targets import update_teacher

PATIENCE = 1000
"""Number of micro-batches in one optimiser step after which a warning says that the step was not ended."""


def encode(backbone: Callable[[Tensor], Tensor], view: Tensor) -> Tensor:
    """Compute the features of one view.

    Args:
        backbone: images ``[B, 3, H, W]`` → features, ``[B, F]`` or ``[B, F, 1, 1]``.
        view: images ``[B, 3, H, W]``, or a stack of P patches of each image, ``[B, P, 3, h, w]``.

    Returns:
        ``[B, F]``, or ``[B, P, F]`` for a stack.
    """
    if view.ndim == 5:
        return backbone(view.flatten(0, 1)).flatten(1).unflatten(0, view.shape[:2])
    return backbone(view).flatten(1)


def encode_image(backbone: Callable[[Tensor], Tensor], images: Tensor, patches: tuple[int, int] | None) -> Tensor:
    """Compute the features of images in evaluation.

    Args:
        backbone: as of ``encode``.
        images: ``[B, 3, H, W]``.
        patches: the method's ``eval_patches``, of its options.

    Returns:
        ``[B, F]``: the features of the whole images, or the means over their patches.
    """
    return encode(backbone, images) if patches is None else encode(backbone, patch_stack(images, *patches)).mean(1)


def encode_views(
    backbone: nn.Module, views: Sequence[Tensor], taps: Mapping[str, int | None]
) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
    """Compute the features of each view, and the maps of each view that the method taps.

    Args:
        backbone: as of ``encode``.
        views: as of ``encode``.
        taps: the method's ``taps``, of its options.
    """
    with FeatureTaps(backbone, taps) as tapped:
        features = [encode(backbone, view) for view in views]
        return features, tapped.take([view.shape[:-3] for view in views])


def connect(head: nn.Module, backbone: nn.Module, taps: Mapping[str, int | None]) -> None:
    """Make the layers of a new head for the maps of a backbone. Does nothing for a method without ``taps``.

    Args:
        head: the method's head.
        backbone: images → features.
        taps: the method's ``taps``, of its options.

    Raises:
        ValueError: the backbone has no such modules, cannot be tapped, or the head takes no maps.
    """
    if not taps:
        return
    if not isinstance(head, MapHead):
        raise ValueError(f"the method compares feature maps: the head must be a MapHead, got a {type(head).__name__}")
    try:
        channels = map_channels(backbone, taps)
    except ValueError as error:
        raise ValueError(f"{error}; {head.advice}" if head.advice else str(error)) from None
    head.build(channels)


def project(projector: nn.Module, features: list[Tensor]) -> list[Tensor]:
    """Project the features of each view. Each view has its own batch statistics, except in a SharedHead."""
    return projector.views(features) if isinstance(projector, SharedHead) else [projector(h) for h in features]


def embed(
    features: list[Tensor],
    projector: nn.Module,
    predict: Callable[[list[Tensor]], list[Tensor]] | None = None,
    target: list[Tensor] | None = None,
    *,
    large: int = 2,
    index: Tensor | None = None,
    maps: Sequence[tuple[Tensor, ...]] = (),
) -> Embeddings:
    """Compute the input of the loss. Each view has its own batch statistics, except in a SharedHead.

    Args:
        features: features of the backbone, ``[B, features_dim]`` for each view, large views first. Stacks of patches
            have ``[B, P, features_dim]`` and come last.
        projector: the method's head.
        predict: function from the projections of all views to their predictions; None if p = z.
        target: the teacher's projections of the large views; None without a teacher.
        large: number of large views, which are the ones with targets.
        index: position of each image in the training set, ``[B]``.
        maps: of each view, as ``FeatureTaps.take`` returns them. Only a MapHead projects them; a StackHead projects the
            features of stacks.
    """
    z = project(projector, features)
    p = z if predict is None else predict(z)
    seen = [h.detach() for h in features[: large or None]]
    if isinstance(projector, TwoBranchHead):
        shown = features[:large]
        targets, detached = [projector.teacher(h) for h in shown], [h.detach() for h in shown]
        return Embeddings(z, p, targets, detached, index, backbone=seen)
    local: list[tuple[Tensor, ...]] = []
    if isinstance(projector, MapHead) and any(maps):
        local = [projector.project_maps(view) for view in maps]
    if isinstance(projector, StackHead):
        local = [projector.project_stack(h) if h.ndim == 3 else () for h in features]
    target = [view.detach() for view in z[:large]] if target is None else target
    return Embeddings(z, p, target, (), index, local, seen)


def _by_view(embeddings: Embeddings) -> dict[str, Tensor]:
    """Return the embeddings by the names in which error messages show them."""
    parts = {"z": embeddings.z, "p": embeddings.p, "target": embeddings.target}
    if embeddings.p is embeddings.z:
        del parts["p"]
    named = {f"{name} of view {number}": view for name, views in parts.items() for number, view in enumerate(views)}
    for number, maps in enumerate(embeddings.maps):
        named |= {f"map {place} of view {number}": map_ for place, map_ in enumerate(maps)}
    return named


class ParameterGroup(NamedTuple):
    """Parameters of a method that the optimiser treats alike."""

    name: str
    """"projector", "predictor" or "loss", or the key of the method's hints for a part of one of them."""
    parameters: dict[str, nn.Parameter]
    """The parameters by their names within "projector", "predictor" or "loss"."""
    hints: Hints


class Objective(nn.Module):
    """The loss of a method, its clock and its running statistics; everything except the networks.

    The state is identical on all processes and must be saved in the checkpoint.

    Life cycle, in the order of a run:

    1. ``allocate(n)``, once, with the number of training images;
    2. ``start_epoch(epoch, feed)`` at the start of each epoch;
    3. ``before_step()`` before the first micro-batch of a step;
    4. forward and backward pass of each micro-batch;
    5. ``after_backward()``, which freezes parameters, after the gradients have been reduced over the processes;
    6. ``after_step(tau)`` after the step of the optimiser, which also moves the teacher.

    All calls are optional, unless a method says otherwise. The micro-batches between ``before_step`` and
    ``after_step`` count as one step of a warm-up and as one batch of the running statistics, also of the closed-form
    predictor. Without these calls each batch in training mode is one step.

    Args:
        spec: the method.
        options: the result of ``spec.resolve``.
        comm: the processes that share a batch.
        predictor: the method's predictor. A closed-form predictor tracks the second moment of the projections. With any
            other predictor and the option ``log_eigvals``, this object tracks it for logging.
        projector: the method's head. If it has two branches, the cosines of the features are tracked for logging.

    Raises:
        ValueError: the key of a hint is not a prefix of a parameter's name.
    """

    def __init__(
        self,
        spec: MethodSpec,
        options: Mapping[str, Any],
        comm: Collective = LOCAL,
        predictor: nn.Module | None = None,
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.comm = comm
        self.criterion = spec.loss(options, comm)
        self.etf: ETFMonitor | None = None
        if isinstance(projector, TwoBranchHead):
            self.etf = ETFMonitor(projector.features_dim, comm=comm)
        self.embedding_moment: RunningMoment | None = None
        if spec.width and options.get("log_eigvals", False) and not isinstance(predictor, RunningMoment):
            self.embedding_moment = RunningMoment(options[spec.width], rho=0.99, comm=comm)
        self.quality: QualityMonitor | None = None
        if where := options.get("log_quality", False):
            self.quality = QualityMonitor(where, comm)
            if spec.width and "projections" in self.quality.kinds:
                check_width(options[spec.width], "projections")
        # in lists: the networks must not be registered as submodules
        self._heads = [projector, predictor]
        self._teacher: tuple[list[nn.Module], list[nn.Module]] = ([], [])
        self._hints = dict(spec.hints(options))
        self._must_freeze = False
        named = {group.name for group in self.groups}
        freezing = {name: hints for name, hints in self._hints.items() if hints.frozen_steps or hints.frozen_epochs}
        self._freezing = {name: hints for name, hints in freezing.items() if name in named}
        missing = [key for key in self._hints if "." in key and key not in named and projector is not None]
        if missing:
            raise ValueError(f"method {spec.name} gives hints for {', '.join(missing)}, which have no parameters")
        # the clock of the loss, whose count is in the checkpoint, or a new one for the adapters
        clocks = [module for module in self.criterion.modules() if isinstance(module, Clock)]
        self._own_clock = None if clocks else Clock(persistent=bool(self._freezing))
        roots = [self] if predictor is None else [self, predictor]
        self._stepped = [part for root in roots for part in root.modules() if isinstance(part, Stepped)]
        if self.quality is not None:
            self._stepped.append(self.quality)
        for part in self._stepped:
            part.attach(predictor, projector)
        self._micro_batches = 0

    @property
    def groups(self) -> list[ParameterGroup]:
        """The present parameters of projector, predictor and loss, by their hints; without those that are not trained.

        They are looked up at each call, because a parameter can be replaced: ``load_state_dict(..., assign=True)`` and
        ``to_empty`` do so.
        """
        parts = dict(zip(("projector", "predictor"), self._heads, strict=True)) | {"loss": self.criterion}
        groups = {name: ParameterGroup(name, {}, self._hints.get(name, Hints())) for name in (*parts, *self._hints)}
        for name, part in parts.items():
            for path, parameter in () if part is None else part.named_parameters():
                whole = f"{name}.{path}"
                prefixes = [key for key in groups if whole == key or whole.startswith(f"{key}.")]
                if parameter.requires_grad:
                    groups[max(prefixes, key=len)].parameters[whole] = parameter
        return [group for group in groups.values() if group.parameters]

    @property
    def clock(self) -> Clock:
        """The count of optimiser steps."""
        return next(part for part in self._stepped if isinstance(part, Clock))

    @property
    def stepping(self) -> bool:
        """Whether a step is open: ``before_step`` has been called, but ``after_step`` has not."""
        return self.clock.stepping

    def allocate(self, size: int) -> None:
        """Allocate the memory of images, if the method has one. A memory that a checkpoint has filled is kept.

        Args:
            size: number of training images.

        Raises:
            ValueError: the checkpoint is that of another number of images.
        """
        for part in self._stepped:
            part.allocate(size)

    def set_teacher(self, teacher: Iterable[nn.Module], student: Iterable[nn.Module]) -> None:
        """Set the networks that ``after_step`` averages: modules of the teacher, and those of the student in order."""
        self._teacher = ([*teacher], [*student])

    def start_epoch(self, epoch: int, feed: Feed | None = None) -> list[nn.Parameter]:
        """Start an epoch of the method.

        Args:
            epoch: number of the epoch, from 0.
            feed: function that passes over the training set, called only if the method needs it.

        Returns:
            The parameters that have been initialised anew. The caller drops their state from the optimiser.
        """
        return [parameter for part in self._stepped for parameter in part.start_epoch(epoch, feed)]

    def before_step(self) -> None:
        """Open an optimiser step: all batches until ``after_step`` are its micro-batches. Idempotent."""
        for part in self._stepped:
            part.before_step()

    def after_backward(self) -> None:
        """Freeze parameters: remove their gradients, so that the optimiser changes neither them nor its state of them.

        Call it between the last backward pass of a step and the step of the optimiser. It is needed by methods whose
        hints freeze parameters, and does nothing for others. It follows the reduction of the gradients over the
        processes, because DistributedDataParallel waits for the gradients of all parameters.
        """
        frozen = [name for name, hints in self._freezing.items() if self._is_frozen(name, hints)]
        for group in self.groups if frozen else []:
            if group.name in frozen:
                for parameter in group.parameters.values():
                    parameter.grad = None
        self._must_freeze = False

    def _is_frozen(self, name: str, hints: Hints) -> bool:
        """Return whether the parameters of a group are frozen in the present step."""
        if self.clock.count <= hints.frozen_steps:
            return True
        if not hints.frozen_epochs:
            return False
        epochs = self.clock.epochs()
        if epochs is None:
            frozen = counted(hints.frozen_epochs, "epoch")
            raise ValueError(
                f"{name} is frozen for {frozen}, but the number of the epoch is unknown; "
                "call start_epoch at the start of each epoch"
            )
        return epochs < hints.frozen_epochs

    def after_step(self, tau: float | None = None) -> None:
        """End the optimiser step. Call it after the optimiser. Without ``tau`` it does nothing if no step is open.

        Args:
            tau: τ in [0, 1], with which the teacher moves, θ_t ← τ θ_t + (1 − τ) θ; None does not move it.
        """
        if tau is not None:
            update_teacher(*self._teacher, tau)
        for part in self._stepped:
            part.after_step()
        self._micro_batches = 0

    def discard_step(self) -> None:
        """Forget the open step, of a run that was cut off within it; no state moves."""
        for part in self._stepped:
            part.discard_step()
        self._micro_batches = 0

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.discard_step()

    def forward(self, embeddings: Embeddings) -> Terms:
        """Return the loss and its parts, a NamedTuple of scalars. Only ``loss`` has a gradient.

        Raises:
            NotFiniteError: (on the CPU) an embedding holds NaN or inf; the message names the view.
        """
        if self.training and self.stepping and not torch.compiler.is_compiling():
            self._micro_batches += 1
            if self._micro_batches == PATIENCE:
                warnings.warn(
                    f"{PATIENCE} batches belong to one optimizer step so far, so warm-ups and the running second "
                    "moment do not advance; call after_step (update_momentum in lightly_ext) after each optimizer step",
                    stacklevel=3,
                )
        if self._own_clock is not None:
            self._own_clock()
        terms = self._terms(embeddings)
        if self._freezing and self.clock.first and self.training and torch.is_grad_enabled():
            self._check_frozen()
        return terms

    def _check_frozen(self) -> None:
        """Warn if the parameters of the step before this one have not been frozen."""
        if self._must_freeze:
            warnings.warn(
                "parameters that the method freezes at first have been trained; call after_backward between backward "
                "and the step of the optimizer",
                stacklevel=4,
            )
        self._must_freeze = any(self._is_frozen(name, hints) for name, hints in self._freezing.items())

    def _terms(self, embeddings: Embeddings) -> Terms:
        if self.embedding_moment is not None and self.training:
            self.embedding_moment.micro_batch()
            for view in embeddings.z:
                self.embedding_moment.update(view)
        if self.quality is not None and self.training:
            large = len(embeddings.target) or None  # without large views, the stacks
            features = [h.mean(1) if h.ndim == 3 else h for h in embeddings.backbone]
            self.quality.update(features=features, projections=embeddings.z[:large])
        try:
            terms = self.criterion(embeddings)
        except NotFiniteError:
            unknown = torch.full((), torch.nan)
            check_result("the loss", unknown, self.comm, **_by_view(embeddings))
            raise
        check_result("the loss", terms.loss, self.comm, **_by_view(embeddings))
        return terms

    def tracked_moment(self, predictor: nn.Module | None) -> RunningMoment | None:
        """Return the running second moment of the projections, or None if the method does not track it."""
        return predictor if isinstance(predictor, RunningMoment) else self.embedding_moment

    def epoch_quality(self) -> dict[str, Tensor]:
        """Return the quality of features and projections since the last call, and start anew. Call it once an epoch.

        The names are ``quality/features/rankme``, ``quality/projections/lidar``, ..., see
        :class:`plugins.metrics.Quality`. The values are the same on all processes, which must all call it. The result
        is {} without the option ``log_quality``.
        """
        return {} if self.quality is None else self.quality.values()

    @torch.no_grad()
    def statistics(self, terms: Terms, embeddings: Embeddings) -> dict[str, Tensor]:
        """Return what every framework logs per step: the detached terms of the loss, and statistics of the embeddings.

        ``z_std`` is the standard deviation of the normalised projections over rows, averaged over columns and large
        views: 1 / sqrt(D) if they are isotropic, 0 if they have collapsed. Heads with two branches add ``cosine_pos``,
        ``cosine_neg`` and ``dist_to_etf`` of the features, see :class:`plugins.losses.ETFMonitor`.
        """
        found = {name: value.detach() for name, value in terms._asdict().items()}
        # without large views, those of the stacks
        units = F.normalize(torch.stack([z.detach() for z in embeddings.z[: len(embeddings.target) or None]]), dim=-1)
        # a sum of squares: torch's std over rows takes several times as long
        centred = units - units.mean(1, keepdim=True)
        found["z_std"] = (centred.square().sum(1) / (units.shape[1] - 1)).sqrt().mean()
        if self.etf is not None and len(embeddings.features) > 1:
            found.update(self.etf(*embeddings.features[:2])._asdict())
        return found
