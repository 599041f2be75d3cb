"""Griffe extension of the site: docstrings are reStructuredText-flavoured for the terminal and Markdown on the site."""

import re

import griffe

ROLE = re.compile(r":(?:func|class|mod|meth|attr):`~?([^`]+)`")
DOCTEST = re.compile(r"^([ ]*)>>> .*(?:\n\1\S.*)*", re.MULTILINE)


def _fence(match: re.Match[str]) -> str:
    indent = match[1]
    return f"\n{indent}```pycon\n{match[0]}\n{indent}```"


class Docstrings(griffe.Extension):
    """Roles become code, doctests become fenced blocks: a printed list in one would count as a link."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(_fence, ROLE.sub(r"`\1`", obj.docstring.value))
