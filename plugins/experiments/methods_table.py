"""Make the README's table of methods: ``python -m plugins.experiments.methods_table --write README.md``."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

BEGIN = "<!-- methods: made by python -m plugins.experiments.methods_table --write README.md -->"
END = "<!-- end of methods -->"


def method_table() -> str:
    """A markdown table, one row per method, between two marks."""
    import torch

    from plugins.heads import TwoBranchHead
    from plugins.methods import METHODS

    rows = ["| method | `method:` | predictor | teacher | reference |", "|---|---|---|---|---|"]
    for name, spec in METHODS.items():
        closed_form = "alpha" in spec.options
        predictor = "none" if spec.predictor is None else "closed form" if closed_form else "MLP"
        link = re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", spec.reference)
        with torch.device("meta"):
            branches = isinstance(spec.head(8, spec.resolve({})), TwoBranchHead)
        teacher = "EMA" if spec.teacher else "second head" if branches else "none"
        rows.append(f"| {spec.title} | `{name}` | {predictor} | {teacher} | {link} |")
    return "\n".join([BEGIN, *rows, END])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, or put it in its place in a file."""
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
        parser.error(f"{options.write} has no line {BEGIN!r} with {END!r} after it")
    options.write.write_text(before + method_table() + after)


if __name__ == "__main__":
    main()
