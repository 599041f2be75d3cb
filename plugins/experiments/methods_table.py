"""Generate the README's table of methods: ``python -m plugins.experiments.methods_table --write README.md``."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from plugins.distributed import LOCAL
from plugins.heads import TwoBranchHead
from plugins.methods import METHODS
from plugins.predictors import Prototypes, RunningMoment
from plugins.spec import MethodSpec

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- methods: made by python -m plugins.experiments.methods_table --write README.md -->"
END = "<!-- end of methods -->"


class Facts(NamedTuple):
    """The cells of a method in the tables."""

    predictor: str
    teacher: str
    year: str
    reference: str
    """The reference, with the arXiv number as a link."""


def facts(spec: MethodSpec) -> Facts:
    """Derive the cells of a method from its SPEC."""
    options = spec.resolve({})
    predictor = "none"
    with torch.device("meta"):
        branches = isinstance(spec.head(8, options), TwoBranchHead)
        if spec.predictor is not None:
            made = spec.predictor(options, LOCAL)
            kinds = {RunningMoment: "closed form", Prototypes: "prototypes"}
            predictor = next((name for kind, name in kinds.items() if isinstance(made, kind)), "MLP")
    teacher = "EMA" if spec.teacher else "second head" if branches else "none"
    year = re.search(r"\b(?:19|20)\d\d\b", spec.reference)
    link = re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", spec.reference)
    return Facts(predictor, teacher, year.group() if year else "", link)


def method_table() -> str:
    """Return a Markdown table with one row per method, between the lines BEGIN and END.

    The title links to the method's page, if it has one.
    """
    rows = ["| method | `method:` | predictor | teacher | reference |", "|---|---|---|---|---|"]
    for name, spec in METHODS.items():
        found = facts(spec)
        page = f"docs/methods/{name}.md"
        title = f"[{spec.title}]({page})" if (ROOT / page).is_file() else spec.title
        rows.append(f"| {title} | `{name}` | {found.predictor} | {found.teacher} | {found.reference} |")
    return "\n".join([BEGIN, *rows, END])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, or replace it in a file."""
    parser = argparse.ArgumentParser(prog="python -m plugins.experiments.methods_table", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the table in this file")
    options = parser.parse_args(argv)
    if options.write is None:
        print(method_table())
        return
    text = options.write.read_text()
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        parser.error(f"{options.write} must contain the line {BEGIN!r} and, after it, {END!r}")
    options.write.write_text(before + method_table() + after)


if __name__ == "__main__":
    main()
