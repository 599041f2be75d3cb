"""Overrides of Hydra's command line: ``key=value``."""

import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException


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
        better = f"{key}=[{','.join(part if parses(f'key={part}') else _in_quotes(part) for part in parts)}]"
    elif value.startswith(("'", '"', "[", "{")):
        return word
    else:
        better = f"{key}={_in_quotes(value)}"
    return better if parses(better) else word


def parses(word: str) -> bool:
    """Return whether Hydra can parse an override."""
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _in_quotes(text: str) -> str:
    # Hydra reads a backslash as an escape only in front of a quote
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + found[2].replace("'", r"\'"), text) + "'"
