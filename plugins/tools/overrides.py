"""Overrides on Hydra's command line, ``key=value``: which of them Hydra can parse, and how values are quoted.

Hydra is imported only to parse: the suites quote values before the environment exists.
"""

import re
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


def quoted(word: str) -> str:
    """Put quotes around a value that Hydra cannot parse without them, such as a path with ``=``, ``~`` or a blank.

    A word that Hydra can parse is returned as it is, and so is one that quotes would not help.

    Args:
        word: one override, as the user typed it; the value may be a list of paths.

    >>> quoted("pretrained_feature_extractor=runs/a-ep=9.ckpt")
    "pretrained_feature_extractor='runs/a-ep=9.ckpt'"
    >>> quoted("paths=[~/a, /b=c]")
    "paths=['~/a','/b=c']"
    >>> quoted("optimizer.lr=0.1"), quoted("optimizer.lr=[1")
    ('optimizer.lr=0.1', 'optimizer.lr=[1')
    """
    key, equals, value = word.partition("=")
    if not equals or parses(word):
        return word
    if match := re.fullmatch(r"\[([^][{}()'\"$]*)\]", value):
        parts = [part.strip() for part in match[1].split(",")]
        better = f"{key}=[{','.join(part if parses(f'key={part}') else hydra_value(part) for part in parts)}]"
    elif value.startswith(("'", '"', "[", "{")):
        return word
    else:
        better = f"{key}={hydra_value(value)}"
    return better if parses(better) else word


def parses(word: str) -> bool:
    """Return whether Hydra can parse an override."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True
