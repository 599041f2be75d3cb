"""Overrides ``key=value`` on Hydra's command line: check whether Hydra can parse them, and quote their values.

Hydra is imported only to parse: the suites quote values before the environment exists.
"""

import re
from collections.abc import Sequence
from typing import Any


def hydra_value(value: Any) -> str:
    r"""Format a value so that Hydra reads it as one string, number or truth value.

    Args:
        value: any value; its text is put in quotes unless it is a plain word, number or path.

    >>> hydra_value(0.1), hydra_value("runs/a.ckpt"), hydra_value("runs/a-ep=9.ckpt")
    ('0.1', 'runs/a.ckpt', "'runs/a-ep=9.ckpt'")
    """
    text = str(value)
    if re.fullmatch(r"[\w./+-]+", text, re.ASCII):
        return text
    # Hydra reads a backslash as an escape only before a quote
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + found[2].replace("'", r"\'"), text) + "'"


def quote_override(override: str) -> str:
    """Put quotes around a value that Hydra cannot parse without them, such as a path with ``=``, ``~`` or a blank.

    An override that Hydra can parse is returned unchanged. So is one that Hydra cannot parse with quotes either.

    Args:
        override: ``key=value`` as the user typed it; the value may be a list of paths.

    >>> quote_override("pretrained_feature_extractor=runs/a-ep=9.ckpt")
    "pretrained_feature_extractor='runs/a-ep=9.ckpt'"
    >>> quote_override("paths=[~/a, /b=c]")
    "paths=['~/a','/b=c']"
    >>> quote_override("optimizer.lr=0.1"), quote_override("optimizer.lr=[1")
    ('optimizer.lr=0.1', 'optimizer.lr=[1')
    """
    key, equals, value = override.partition("=")
    if not equals or is_valid_override(override):
        return override
    if match := re.fullmatch(r"\[([^][{}()'\"$]*)\]", value):
        parts = [part.strip() for part in match[1].split(",")]
        better = (
            f"{key}=[{','.join(part if is_valid_override(f'key={part}') else hydra_value(part) for part in parts)}]"
        )
    elif value.startswith(("'", '"', "[", "{")):
        return override
    else:
        better = f"{key}={hydra_value(value)}"
    return better if is_valid_override(better) else override


def list_mistake(error: TypeError, overrides: Sequence[str]) -> str | None:
    """Explain Hydra's TypeError for an override that addresses an element of a list.

    Args:
        error: the TypeError.
        overrides: the overrides of the command line.

    Returns:
        The error message, or None if the error has another cause.

    >>> list_mistake(TypeError("list indices must be integers or slices, not str"), ["a=1", "~views.1"])
    '~views.1: an element of a list cannot be removed by an override; remove it in the file, or write views=[...]'
    """
    if "list indices must be integers" in str(error):
        for word in overrides:
            if match := re.fullmatch(r"~(.+)\.\d+(=.*)?", word):
                instead = f"remove it in the file, or write {match[1]}=[...]"
                return f"{word}: an element of a list cannot be removed by an override; {instead}"
    if "list indices must be integers" in str(error) or str(error).endswith("is not an int"):
        return f"elements of a list are numbers, as in KEY.0=VALUE: {error}"
    return None


def is_valid_override(override: str) -> bool:
    """Return whether Hydra can parse an override."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True
