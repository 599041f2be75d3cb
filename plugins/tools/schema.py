"""Parts of typed schemas: entries with a meaning and a range in words, and the tables made from them.

:mod:`solo_ext.schema` and :mod:`lightly_ext.benchmarks.schema` are built of them. Needs pydantic, but not torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict
from pydantic.fields import FieldInfo

from plugins.tools.command import home

SECTION = "a section with entries of its own"
"""The allowed values of an entry that is a section."""


class Allowed(NamedTuple):
    """The allowed values of an entry, in words.

    Args:
        words: the text after "must be".
    """

    words: str


class Section(BaseModel):
    """A section of a schema; an unknown entry is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def _from_word(value: Any) -> Any:
    """Convert a string to a number: YAML reads 1e-5 as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _to_word(value: Any) -> Any:
    """Convert a number to a string: YAML reads the names 3 and 2024 as numbers."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def whole(least: int, most: int | None = None) -> Any:
    """Return the type of a whole number.

    Args:
        least: smallest allowed value.
        most: largest allowed value; None: no limit.
    """
    words = f"a whole number, at least {least}" if most is None else f"a whole number in [{least}, {most}]"
    return Annotated[int, Strict(), Field(ge=least, le=most), Allowed(words)]


def number(allowed: str, **limits: Any) -> Any:
    """Return the type of a finite number.

    Args:
        allowed: the allowed values, in words.
        limits: gt, ge, lt or le of pydantic.
    """
    return Annotated[
        float, BeforeValidator(_from_word), Strict(), Field(allow_inf_nan=False, **limits), Allowed(allowed)
    ]


def three(allowed: str, **limits: Any) -> Any:
    """Return the type of three finite numbers, one for each channel of an image.

    Args:
        allowed: the allowed values, in words.
        limits: of each number: gt, ge, lt or le of pydantic.
    """
    element = Annotated[float, Strict(), Field(allow_inf_nan=False, **limits)]
    return Annotated[list[element], Field(min_length=3, max_length=3), Allowed(f"three numbers, {allowed}")]


Switch = Annotated[bool, Strict(), Allowed("true or false")]
Positive = number("a number, at least 0", ge=0)
Share = number("in [0, 1]", ge=0, le=1)
Word = Annotated[str, BeforeValidator(_to_word), Strict(), Field(min_length=1), Allowed("a string")]
Place = Annotated[Word, AfterValidator(lambda text: str(home(Path(text))) if text.startswith("~") else text)]
"""A path; a ``~`` at its start is the home folder."""


def entry(meaning: str, default: Any = ..., *, optional: bool = False) -> Any:
    """Define an entry.

    Args:
        meaning: meaning and unit.
        default: default value; Ellipsis means that the entry is required.
        optional: whether a missing entry stays missing in the validated configuration.
    """
    return Field(None if optional else default, description=meaning, json_schema_extra={"optional": optional})


def is_optional(field: FieldInfo) -> bool:
    """Return whether a missing entry stays missing."""
    return bool((field.json_schema_extra or {}).get("optional"))  # type: ignore[union-attr]


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section class in an annotation, also inside a list; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def words(field: Any) -> str:
    """Return the allowed values of a field or an annotation, as the text after "must be"."""
    if isinstance(field, FieldInfo):
        found = [one.words for one in field.metadata if isinstance(one, Allowed)]
        return found[-1] if found else words(field.annotation)
    if get_origin(field) is Literal:
        return " or ".join(get_args(field))
    if found := [one.words for one in getattr(field, "__metadata__", ()) if isinstance(one, Allowed)]:
        return found[-1]
    if section_of(field):
        return SECTION
    return next((words(part) for part in get_args(field)), str(field))


class Row(NamedTuple):
    """A row of the tables.

    Args:
        path: the entry, such as ``augmentations[].rrc.enabled``.
        words: its allowed values.
        default: its default; "needed" if it is required, "-" if it is optional.
        meaning: its meaning.
    """

    path: str
    words: str
    default: str
    meaning: str


def rows(section: type[Section], above: str = "") -> Iterator[Row]:
    """Yield the entries of a section, then those of its subsections."""
    inner = []
    for name, field in section.model_fields.items():
        below = section_of(field.annotation)
        if below is not None:
            brackets = "[]" if get_origin(field.annotation) is list else ""
            inner.append((below, f"{above}{name}{brackets}."))
            continue
        if field.is_required():
            default = "needed"
        elif is_optional(field):
            default = "-"
        else:
            default = str(field.get_default(call_default_factory=True))
            default = {"None": "null", "True": "true", "False": "false"}.get(default, default)
        yield Row(above + name, words(field), default, field.description or "")
    for below, path in inner:
        yield from rows(below, path)


def table(columns: Sequence[str], lines: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a Markdown table.

    >>> table(["entry", "default"], [["dir", "<none>"]])
    ['| entry | default |', '|---|---|', '| dir | \\\\<none> |']
    """
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return head + [f"| {' | '.join(line)} |".replace("<", r"\<") for line in lines]


def together(mistakes: Sequence[str]) -> str:
    """Join several messages, one per line, aligned after "error: "."""
    return "\n       ".join(dict.fromkeys(mistakes))
