"""MethodSpec: which loss, head, predictor, teacher and views make a method, and which options it has.

An adapter builds any method from its SPEC alone::

    options = spec.resolve(user_options)                # unknown names are errors, aliases are translated
    projector = spec.head(features_dim, options)
    predictor = spec.predictor(options, comm)           # an nn.Module with predict(list of z) → list of p
    objective = Objective(spec, options, comm, predictor, projector)
    ...
    e = embed(features, projector, predictor.predict, target)   # one matrix of features per view; a teacher's output
    terms = objective(e);  terms.loss.backward()

Where an optimiser step accumulates the gradients of several micro-batches, ``objective.before_step()`` comes before the
first and ``objective.after_step()`` after the step. ``Objective`` and ``embed`` are in :mod:`plugins.objective`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from plugins.checks import check_range
from plugins.distributed import Collective


class Embeddings(NamedTuple):
    """What a loss may look at: one matrix ``[B, D]`` per view in each list."""

    z: list[Tensor]
    """Projections, with gradient."""
    p: list[Tensor]
    """Predictions, with gradient; the projections themselves where a method has no predictor."""
    target: list[Tensor]
    """Of the large views alone: the teacher's projections; or the outputs of the head's second branch, with gradient;
    or the detached projections."""
    features: Sequence[Tensor] = ()
    """Of the large views, detached, for the log; where the head has two branches."""


def large_views(sizes: Sequence[int | tuple[int, int]]) -> int:
    """How many views of an image are large: as many as begin the list and are of the size of the first.

    A teacher, or a second branch, makes targets of the large views, and of these alone. Which they are is told by their
    place, the same in all frameworks: large views first, small crops after them.

    Args:
        sizes: of each view, in the order in which the model gets them: the side or (height, width), in pixels.

    Raises:
        ValueError: there is no view; after a small crop, or in place of one, comes a view at least as large as the
            first.

    >>> large_views([224, 224, 96, 96, 96])
    2
    """
    if not sizes:
        raise ValueError("a list of views must hold some, got none")
    areas = [size**2 if isinstance(size, int) else size[0] * size[1] for size in sizes]
    large = next((index for index, size in enumerate(sizes) if size != sizes[0]), len(sizes))
    if any(area >= areas[0] for area in areas[large:]):
        raise ValueError(
            f"large views come first, small crops after them: put the largest first, got views of sizes {[*sizes]}"
        )
    return large


class Terms(Protocol):
    """What a loss returns: a NamedTuple of scalars, of which ``loss`` is the one to minimise."""

    @property
    def loss(self) -> Tensor: ...
    def _asdict(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Option:
    """One entry of a method's options (``method_kwargs`` in solo-learn).

    Args:
        default: its value when the user gives none. Its type is the type that a given value must have.
        help: one line: meaning, range, unit.
        aliases: other names for it, those of the forks, each with a translation of the value (None: taken as it is).
        choices: the allowed values, where they are few.
        low: the least allowed value of a number; every number has one, 1e-6 where 0 itself is none.
        high: the largest.
    """

    default: Any
    help: str
    aliases: Mapping[str, Callable[[Any], Any] | None] = field(default_factory=dict)
    choices: tuple[Any, ...] | None = None
    low: float | None = None
    high: float = math.inf


class Paper(NamedTuple):
    """Where a method comes from."""

    title: str
    """The method's name in tables and figures."""
    reference: str
    """Authors, year, arXiv number, and equation."""


@dataclass(frozen=True)
class MethodSpec:
    """One self-supervised method.

    Args:
        name: its key in METHODS, in YAML and on the command line; lowercase snake case.
        loss: (options, comm) → nn.Module of Embeddings → Terms. A :class:`plugins.clock.Clock` in it counts steps for
            a warm-up.
        head: (features_dim, options) → projection head, an nn.Module ``[B, features_dim] → [B, D]``; a TwoBranchHead
            where a second branch makes the targets.
        predictor: (options, comm) → predictor, an nn.Module with ``predict``; None where p = z.
        teacher: whether an exponential-moving-average copy of backbone and head makes the targets.
        views: how many views of an image it compares; None is two or more, small crops among them.
        options: every option that it understands.
        paper: its title and reference.
        width: which of the options is the number of the head's columns.
    """

    name: str
    loss: Callable[[Mapping[str, Any], Collective], nn.Module]
    head: Callable[[int, Mapping[str, Any]], nn.Module]
    predictor: Callable[[Mapping[str, Any], Collective], nn.Module] | None
    teacher: bool
    views: int | None
    options: Mapping[str, Option]
    paper: Paper
    width: str = "proj_output_dim"

    @property
    def title(self) -> str:
        """Its name in tables and figures."""
        return self.paper.title

    @property
    def reference(self) -> str:
        """Authors, year, arXiv number, and equation."""
        return self.paper.reference

    def check_views(self, large: int, small: int = 0) -> None:
        """Refuse views that the loss cannot compare.

        Args:
            large: how many views of the full size the augmentations make of an image.
            small: how many small crops besides.

        Raises:
            ValueError: the method compares another number.
        """
        made = f"the augmentations make {large} large and {small} small ones"
        if self.views is None:
            if large < 2:
                raise ValueError(f"method {self.name} compares two or more large views, {made}")
        elif (large, small) != (self.views, 0):
            raise ValueError(f"method {self.name} compares {self.views} views of one size, {made}")

    def resolve(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Options with their defaults filled in and aliases translated.

        Args:
            given: what the user wrote, by name or alias.

        Returns:
            A value for every option, read-only.

        Raises:
            ValueError: an unknown name, a name given twice under two aliases, a value of another type, outside of the
                choices or out of range.
        """
        names: dict[str, tuple[str, Callable[[Any], Any] | None]] = {name: (name, None) for name in self.options}
        for name, option in self.options.items():
            names.update({alias: (name, translate) for alias, translate in option.aliases.items()})
        resolved = {name: option.default for name, option in self.options.items()}
        origin: dict[str, str] = {}
        for key, value in given.items():
            if key not in names:
                raise ValueError(f"method {self.name} has no option {key!r}; it knows {', '.join(sorted(names))}")
            name, translate = names[key]
            if name in origin:
                raise ValueError(f"method {self.name}: {origin[name]!r} and {key!r} are two names of one option")
            origin[name] = key
            resolved[name] = self._checked(name, key, value if translate is None else translate(value))
        return MappingProxyType(resolved)

    def _checked(self, name: str, key: str, value: Any) -> Any:
        option = self.options[name]
        kind = type(option.default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"method {self.name}: {key} must be a {kind.__name__}, got {value!r}")
        if option.choices is not None and value not in option.choices:
            allowed = ", ".join(str(choice) for choice in option.choices)
            raise ValueError(f"method {self.name}: {key} must be one of {allowed}, got {value!r}")
        if option.low is not None:
            check_range(f"method {self.name}: {key}", value, low=option.low, high=option.high)
        return value
