"""MethodSpec: the loss, head, predictor, teacher, views and options of a method.

An adapter builds any method from its SPEC alone::

    options = spec.resolve(user_options)                # unknown names are errors, aliases are translated
    spec.prepare(options, backbone)                     # a few methods change its first layer
    projector = spec.head(features_dim, options)
    connect(projector, backbone, spec.taps(options))    # for the few methods that compare feature maps
    predictor = spec.predictor(options, comm)           # an nn.Module with predict(list of z) → list of p
    objective = Objective(spec, options, comm, predictor, projector)
    ...
    features, maps = encode_views(backbone, views, spec.taps(options))  # one matrix, one tuple of maps per view
    e = embed(features, projector, predictor.predict, target, maps=maps)        # target: of the teacher
    terms = objective(e);  terms.loss.backward()

A training loop calls the life cycle of the objective (:class:`plugins.objective.Objective`): ``start_epoch``,
``before_step``, ``after_backward`` and ``after_step``. The functions are in :mod:`plugins.objective` too.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from plugins.checks import check_range
from plugins.distributed import Collective
from plugins.patches import Patches
from plugins.spelling import counted, did_you_mean


class Embeddings(NamedTuple):
    """The input of a loss: one matrix ``[B, D]`` per view in each list."""

    z: list[Tensor]
    """Projections, with gradient."""
    p: list[Tensor]
    """Predictions, with gradient; the projections if the method has no predictor."""
    target: list[Tensor]
    """Targets of the large views: the teacher's projections, the outputs of a second branch (with gradient), or the
    detached projections."""
    features: Sequence[Tensor] = ()
    """Detached features of the large views, for logging; empty unless the head has two branches."""
    index: Tensor | None = None
    """Position of each image in the training set, ``[B]``, int64; None unless the method is ``indexed``."""
    maps: Sequence[tuple[Tensor, ...]] = ()
    """Projected feature maps of each view, with gradient, as ``MapHead.project_maps`` or ``StackHead.project_stack``
    returns them; empty unless the method has ``taps`` or such a head."""
    backbone: Sequence[Tensor] = ()
    """Detached features of the large views, those of stacks patch by patch, for the option ``log_quality``."""


def large_views(sizes: Sequence[int | tuple[int, int]]) -> int:
    """Count the large views of an image: the leading views that have the size of the first one.

    A teacher or a second branch computes targets of the large views only. In all frameworks large views come first and
    small crops after them.

    Args:
        sizes: size of each view in the order of the model's input: the side, or (height, width), in pixels.

    Raises:
        ValueError: there is no view, or a view after the leading ones is at least as large as the first.

    >>> large_views([224, 224, 96, 96, 96])
    2
    """
    if not sizes:
        raise ValueError("the list of views must have at least one entry, got none")
    areas = [size**2 if isinstance(size, int) else size[0] * size[1] for size in sizes]
    large = next((index for index, size in enumerate(sizes) if size != sizes[0]), len(sizes))
    if any(area >= areas[0] for area in areas[large:]):
        raise ValueError(
            f"large views come first, small crops after them: put the largest first, got views of sizes {[*sizes]}"
        )
    return large


class Terms(Protocol):
    """The output of a loss: a NamedTuple of scalars. ``loss`` is the one to minimise."""

    @property
    def loss(self) -> Tensor: ...
    def _asdict(self) -> dict[str, Tensor]: ...


class UnknownOptionError(ValueError):
    """A method has no option of a given name.

    Args:
        method: what has no such option, such as "method isoloss".
        key: the given name.
        known: the names of the options.
        advice: what to do, in place of the most similar name.
    """

    def __init__(self, method: str, key: str, known: Iterable[str], advice: str = "") -> None:
        self.method, self.key, self.known = method, key, sorted(known)
        end = f"; {advice}" if advice else did_you_mean(key, self.known)
        super().__init__(f"{method} has no option {key!r}; known options: {', '.join(self.known)}{end}")


@dataclass(frozen=True)
class Option:
    """One entry of a method's options (``method_kwargs`` in solo-learn).

    Args:
        default: the value if the user gives none. A given value must have the same type, or that of a choice.
        help: one line with meaning, range and unit.
        aliases: other names, used by the forks, each with a function that converts the value (None: no conversion).
        choices: the allowed values, or None.
        low: the smallest allowed value of a number. Every number has one; it is 1e-6 if the value must exceed 0.
        high: the largest allowed value.
    """

    default: Any
    help: str
    aliases: Mapping[str, Callable[[Any], Any] | None] = field(default_factory=dict)
    choices: tuple[Any, ...] | None = None
    low: float | None = None
    high: float = math.inf


LOG_QUALITY = Option(
    False,
    "log the quality of features and projections, measured without labels, once an epoch; or of one of the two",
    choices=(False, True, "features", "projections"),
)
"""The option ``log_quality``, which every method has."""


@dataclass(frozen=True)
class Hints:
    """How the optimiser treats some parameters of a method.

    Args:
        lr_scale: learning rate divided by that of the backbone, > 0.
        lr_constant: the learning rate is constant instead of scheduled.
        momentum: 0.0 trains them without momentum; None uses the momentum of the optimiser.
        no_decay: they have no weight decay.
        frozen_steps: number of steps at the start of the run in which they do not change.
        frozen_epochs: number of epochs at the start of the run in which they do not change.

    Raises:
        ValueError: a value is out of range.
    """

    lr_scale: float = 1.0
    lr_constant: bool = False
    momentum: float | None = None
    no_decay: bool = False
    frozen_steps: int = 0
    frozen_epochs: int = 0

    def __post_init__(self) -> None:
        check_range("lr_scale", self.lr_scale, low=1e-12)
        check_range("frozen_steps", self.frozen_steps, low=0)
        check_range("frozen_epochs", self.frozen_epochs, low=0)
        if self.momentum not in (None, 0.0):
            raise ValueError(f"momentum must be None (that of the optimiser) or 0, got {self.momentum!r}")

    def group_options(self, betas: tuple[float, float] | None = None) -> dict[str, Any]:
        """Return the entries of a parameter group of an optimiser for ``momentum`` and ``no_decay``.

        Args:
            betas: those of an optimiser such as Adam; None for an optimiser with ``momentum``.
        """
        options: dict[str, Any] = {"weight_decay": 0.0} if self.no_decay else {}
        if self.momentum is not None:
            options |= {"momentum": self.momentum} if betas is None else {"betas": (self.momentum, betas[1])}
        return options


def predictor_hints(options: Mapping[str, Any]) -> Mapping[str, Hints]:
    """Return the hints of methods whose options scale the learning rate of the predictor, or keep it constant."""
    scale, constant = options.get("pred_lr_scale", 1.0), options.get("pred_lr_constant", False)
    return {"predictor": Hints(lr_scale=scale, lr_constant=constant)}


def unchanged(options: Mapping[str, Any], backbone: nn.Module) -> nn.Module:
    """Return the backbone as it is: the ``prepare`` of most methods."""
    return backbone


def whole_images(options: Mapping[str, Any]) -> None:
    """Return the ``eval_patches`` of a method whose backbone is evaluated on whole images."""


def any_number(options: Mapping[str, Any]) -> None:
    """Return the ``patches`` of a method whose head takes stacks of any number of patches."""


def no_taps(options: Mapping[str, Any]) -> Mapping[str, int | None]:
    """Return the ``taps`` of a method that compares no feature maps."""
    return {}


class Paper(NamedTuple):
    """Title and reference of the paper of a method."""

    title: str
    """The method's name in tables and figures."""
    reference: str
    """Authors, year, arXiv number, and equation."""


@dataclass(frozen=True)
class MethodSpec:
    """One self-supervised method.

    Args:
        name: key in METHODS, in YAML and on the command line; lowercase snake case.
        loss: (options, comm) → nn.Module that maps Embeddings to Terms. It may contain a :class:`plugins.clock.Clock`
            to count the steps of a warm-up.
        head: (features_dim, options) → projection head, an nn.Module ``[B, features_dim] → [B, D]``; a TwoBranchHead
            if a second branch computes the targets.
        predictor: (options, comm) → predictor, an nn.Module with ``predict``; None if p = z.
        teacher: whether an exponential moving average of backbone and head computes the targets.
        views: number of views that the loss compares, all of one size; None means two or more views of any size. 0
            means stacks of patches only; what a framework computes of a view, such as the loss of an online classifier,
            it computes of the mean features of the first stack.
        large: least number of large views, which have targets; only used if ``views`` is None.
        stacks: number of further views that are stacks of patches, ``[B, P, 3, h, w]``. The head maps the features of
            their patches, ``[B, P, features_dim]``, to ``[B, D]``.
        patches: options → what each stack consists of, or None if any number of patches is allowed.
        indexed: whether the loss reads ``Embeddings.index``, the positions of the images in the training set.
        options: all options of the method; ``log_quality`` is added.
        paper: title and reference.
        width: name of the option that is the output width of the head; None if several options make it.
        hints: options → how the optimiser treats the method's own parameters. A key is a prefix of their names:
            "projector", "predictor" or "loss", or one with a submodule's name, such as "projector.last_layer".
        taps: options → name of a submodule of the backbone → largest side of its feature map, or None, as
            :class:`plugins.taps.FeatureTaps` takes them. The head must be a :class:`plugins.heads.MapHead`, which
            projects the maps of each view of the student; a teacher has no maps.
        prepare: (options, backbone) → the same backbone, which the method changes in place before it is trained, such
            as its first layer or its normalisation. It draws no random numbers, so that a teacher's backbone stays a
            copy. Evaluations recognise a changed backbone by the names of its weights: see
            :func:`plugins.sobel.restore_sobel_` and :func:`plugins.norms.fit_norms_`.
        eval_patches: options → (side of a patch, distance of neighbouring patches) in pixels, if the features of an
            image in evaluation are the mean over its patches; None if the backbone sees the whole image.
        unbounded: whether the loss grows with the scale of the embedding, so that SGD at a usual learning rate diverges
            with a usual head.
        teacher_init: initialises the teacher's head, in place; None if the teacher begins as a copy of the student.
        fork_names: further names of the method, in the configurations of its forks.
        log_name: further name of the loss in solo-learn's logs, by solo-learn itself or by a fork.
    """

    name: str
    loss: Callable[[Mapping[str, Any], Collective], nn.Module]
    head: Callable[[int, Mapping[str, Any]], nn.Module]
    predictor: Callable[[Mapping[str, Any], Collective], nn.Module] | None
    teacher: bool
    views: int | None
    options: Mapping[str, Option]
    paper: Paper
    width: str | None = "proj_output_dim"
    large: int = 1
    stacks: int = 0
    patches: Callable[[Mapping[str, Any]], Patches | None] = any_number
    indexed: bool = False
    hints: Callable[[Mapping[str, Any]], Mapping[str, Hints]] = predictor_hints
    taps: Callable[[Mapping[str, Any]], Mapping[str, int | None]] = no_taps
    prepare: Callable[[Mapping[str, Any], nn.Module], nn.Module] = unchanged
    eval_patches: Callable[[Mapping[str, Any]], tuple[int, int] | None] = whole_images
    unbounded: bool = False
    teacher_init: Callable[[nn.Module], Any] | None = None
    fork_names: tuple[str, ...] = ()
    log_name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", {**self.options, "log_quality": LOG_QUALITY})

    @property
    def only_stacks(self) -> bool:
        """Whether the loss sees stacks of patches and no views beside them."""
        return self.views == 0

    @property
    def title(self) -> str:
        """Name of the method in tables and figures."""
        return self.paper.title

    @property
    def reference(self) -> str:
        """Authors, year, arXiv number, and equation."""
        return self.paper.reference

    def check_views(self, large: int, small: int = 0, stacks: int = 0) -> None:
        """Check that the loss can compare the views of the augmentations.

        Args:
            large: number of large views per image.
            small: number of small crops per image.
            stacks: number of stacks of patches per image.

        Raises:
            ValueError: the method needs another number of views.
        """
        method, views = f"method {self.name}", large + small
        if stacks != self.stacks:
            raise ValueError(
                f"{method} needs {counted(self.stacks, 'stack')} of patches per image, got {stacks or 'none'}"
            )
        got = f"got {counted(large, 'large view')}" + (f" and {counted(small, 'small crop')}" if small else "")
        if self.views is not None:
            if (large, small) != (self.views, 0):
                if self.views == 0:
                    raise ValueError(f"{method} compares patches and needs no view beside them, {got}; remove it")
                size = "" if self.views == 1 else " of one size"
                raise ValueError(f"{method} needs {counted(self.views, 'large view')}{size}, {got}")
        elif views < 2:
            raise ValueError(f"{method} needs at least two views, got {views or 'none'}")
        elif large < self.large:
            raise ValueError(f"{method} needs at least {counted(self.large, 'large view')}, {got}")

    def check_patches(self, options: Mapping[str, Any], patches: Patches) -> None:
        """Check that the method can take the stacks of the augmentations.

        Args:
            options: the result of ``resolve``.
            patches: of a stack.

        Raises:
            ValueError: the options say another number, size or distance.
        """
        wanted = self.patches(options)
        if wanted is not None and not wanted.fits(patches):
            raise ValueError(
                f"method {self.name} needs stacks of {wanted} with these options, got stacks of {patches}; change the "
                "options or the augmentations"
            )

    def resolve(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Validate the user's options, translate aliases and fill in defaults.

        Args:
            given: the user's options, by name or alias.

        Returns:
            A value for every option, read-only.

        Raises:
            UnknownOptionError: a name is unknown.
            ValueError: a name is given twice under two aliases, or a value has the wrong type, is not among the
                choices, or is out of range.
        """
        names: dict[str, tuple[str, Callable[[Any], Any] | None]] = {name: (name, None) for name in self.options}
        for name, option in self.options.items():
            names.update({alias: (name, translate) for alias, translate in option.aliases.items()})
        resolved = {name: option.default for name, option in self.options.items()}
        origin: dict[str, str] = {}
        for key, value in given.items():
            if key not in names:
                raise UnknownOptionError(f"method {self.name}", key, names)
            name, translate = names[key]
            if name in origin:
                raise ValueError(f"method {self.name}: {origin[name]!r} and {key!r} are names of the same option")
            origin[name] = key
            resolved[name] = self._checked(name, key, value if translate is None else translate(value))
        return MappingProxyType(resolved)

    def _checked(self, name: str, key: str, value: Any) -> Any:
        option = self.options[name]
        kind = type(option.default)
        kinds = {kind, *map(type, option.choices or ())}
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) not in kinds:
            allowed = " or ".join(sorted(one.__name__ for one in kinds))
            raise ValueError(f"method {self.name}: {key} must be a {allowed}, got {value!r}")
        if option.low is not None:
            check_range(f"method {self.name}: {key}", value, low=option.low, high=option.high)
        if option.choices is not None and value not in option.choices:
            allowed = ", ".join(str(choice) for choice in option.choices)
            raise ValueError(f"method {self.name}: {key} must be one of {allowed}, got {value!r}")
        return value
