"""Building blocks of typed schemas: types with a description of their range, and tables of the entries.

:mod:`solo_ext.schema` and :mod:`lightly_ext.benchmarks.schema` use them. This module needs pydantic, but not torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict
from pydantic.fields import FieldInfo

from plugins.tools.command import home

SECTION = "a mapping"
"""The description of the allowed values of an entry that is a section."""


class Allowed(NamedTuple):
    """A description of the allowed values of an entry.

    Args:
        text: the text after "must be" in an error message.
    """

    text: str


class Section(BaseModel):
    """A section of a schema; an unknown entry is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def _to_number(value: Any) -> Any:
    """Convert a string to a number, since YAML reads 1e-5 as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _to_string(value: Any) -> Any:
    """Convert a number to a string, since YAML reads the names 3 and 2024 as numbers."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def integer(least: int, most: int | None = None) -> Any:
    """Return the type of an integer in a range.

    Args:
        least: smallest allowed value.
        most: largest allowed value; None means no limit.
    """
    text = f"an integer, at least {least}" if most is None else f"an integer in [{least}, {most}]"
    return Annotated[int, Strict(), Field(ge=least, le=most), Allowed(text)]


def real_number(allowed: str, **limits: Any) -> Any:
    """Return the type of a finite number in a range.

    Args:
        allowed: description of the range, for tables and error messages.
        limits: gt, ge, lt or le of pydantic.
    """
    return Annotated[
        float, BeforeValidator(_to_number), Strict(), Field(allow_inf_nan=False, **limits), Allowed(allowed)
    ]


def triple(allowed: str, **limits: Any) -> Any:
    """Return the type of a list of three finite numbers, one for each channel of an image.

    Args:
        allowed: description of the range, for tables and error messages.
        limits: gt, ge, lt or le of pydantic, applied to each number.
    """
    element = Annotated[float, Strict(), Field(allow_inf_nan=False, **limits)]
    return Annotated[list[element], Field(min_length=3, max_length=3), Allowed(f"three numbers, {allowed}")]


Boolean = Annotated[bool, Strict(), Allowed("true or false")]
NonNegative = real_number("a number, at least 0", ge=0)
Fraction = real_number("in [0, 1]", ge=0, le=1)
String = Annotated[str, BeforeValidator(_to_string), Strict(), Field(min_length=1), Allowed("a string")]
PathString = Annotated[String, AfterValidator(lambda text: str(home(Path(text))) if text.startswith("~") else text)]
"""A path as a string; a ``~`` at its start is replaced by the home folder."""


def entry(meaning: str, default: Any = ..., *, optional: bool = False) -> Any:
    """Define an entry.

    Args:
        meaning: meaning and unit.
        default: default value; Ellipsis means that the entry is required.
        optional: whether a missing entry stays missing in the validated configuration.
    """
    return Field(None if optional else default, description=meaning, json_schema_extra={"optional": optional})


def is_optional(field: FieldInfo) -> bool:
    """Return whether a missing entry stays missing in the validated configuration."""
    return bool((field.json_schema_extra or {}).get("optional"))  # type: ignore[union-attr]


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section class in an annotation or in the type of its elements, or None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def allowed_values(field: Any) -> str:
    """Describe the allowed values of a field or an annotation, as the text after "must be"."""
    if isinstance(field, FieldInfo):
        found = [one.text for one in field.metadata if isinstance(one, Allowed)]
        return found[-1] if found else allowed_values(field.annotation)
    if get_origin(field) is Literal:
        return " or ".join(get_args(field))
    if found := [one.text for one in getattr(field, "__metadata__", ()) if isinstance(one, Allowed)]:
        return found[-1]
    if section_of(field):
        return SECTION
    return next((allowed_values(part) for part in get_args(field)), str(field))


class Row(NamedTuple):
    """An entry of a schema as a row of a table.

    Args:
        path: path of the entry, such as ``augmentations[].rrc.enabled``.
        values: its allowed values.
        default: its default; "required" if it has none, "-" if it is optional.
        meaning: its meaning.
    """

    path: str
    values: str
    default: str
    meaning: str


def rows(section: type[Section], above: str = "") -> Iterator[Row]:
    """Yield a row for each entry of a section, then for each entry of its subsections."""
    subsections = []
    for name, field in section.model_fields.items():
        below = section_of(field.annotation)
        if below is not None:
            brackets = "[]" if get_origin(field.annotation) is list else ""
            subsections.append((below, f"{above}{name}{brackets}."))
            continue
        if field.is_required():
            default = "required"
        elif is_optional(field):
            default = "-"
        else:
            default = str(field.get_default(call_default_factory=True))
            default = {"None": "null", "True": "true", "False": "false"}.get(default, default)
        yield Row(above + name, allowed_values(field), default, field.description or "")
    for below, path in subsections:
        yield from rows(below, path)


def table(columns: Sequence[str], lines: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a Markdown table.

    >>> table(["entry", "default"], [["dir", "<none>"]])
    ['| entry | default |', '|---|---|', '| dir | \\\\<none> |']
    """
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return head + [f"| {' | '.join(line)} |".replace("<", r"\<") for line in lines]


def join_messages(messages: Sequence[str]) -> str:
    """Join error messages without duplicates, one per line and indented by the width of "error: "."""
    return "\n       ".join(dict.fromkeys(messages))
