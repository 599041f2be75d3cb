"""Table of the suite self_supervised_vision: ``python -m plugins.experiments.report_ssv FOLDER``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from plugins.experiments.published import BEST_ON_TEST, BEST_ON_TEST_SOURCE
from plugins.experiments.results import MISSING, Row, format_number, markdown_table, notes, read_rows, score
from plugins.experiments.suites import ssv
from plugins.tools.command import Parser, UserError, exit_on_user_error

SCORES = {
    "neighbors_head": "neighbours, head (%)",
    "neighbors": "neighbours, trunk (%)",
    "knn": "kNN (%)",
    "linear": "linear (%)",
}
"""Key in result.json → title of the column."""


def split_label(row: Row) -> tuple[str, str, str]:
    """Return the algorithm, the network and the data set of a row."""
    algo, _, rest = row.method.partition("-")
    dataset = next((name for name in ssv.DATA if rest.endswith(f"_{name}")), "cifar10")
    return algo, rest.removesuffix(f"_{dataset}"), dataset


def ordered_rows(folder: Path) -> list[Row]:
    """Return the rows of the suite, sorted by data set, algorithm and network, in the order of the suite."""
    places = (ssv.DATA, ssv.ALGORITHMS, ssv.ARCHS)

    def place(row: Row) -> list[int]:
        algo, arch, dataset = split_label(row)
        return [
            names.index(name) if name in names else len(names)
            for names, name in zip(places, (dataset, algo, arch), strict=True)
        ]

    return sorted(read_rows(folder), key=place)


def make_table(rows: Sequence[Row]) -> str:
    """Return the table in Markdown, with an explanation of its columns.

    Args:
        rows: the rows of the suite.

    Returns:
        Text that ends with a newline.
    """
    head = ["data set", "method", "network", "epochs", *SCORES.values(), "published, best on test", "hours"]
    body = []
    for row in rows:
        algo, arch, dataset = split_label(row)
        known, seconds = BEST_ON_TEST.get(algo) if dataset == "cifar10" else None, row.mean("seconds")
        body.append(
            [
                *(dataset, algo, arch + ("" if row.results else ": missing"), format_number(row.mean("epochs"))),
                *(score(row, key, None) for key in SCORES),
                "" if known is None else f"{known:.2f}",
                MISSING if seconds is None else f"{seconds / 3600:.2f}",
            ]
        )
    lines = [
        *markdown_table(head, body, words=3),
        "",
        "Our numbers are those of the last epoch in evaluation mode, on test images (digits: validation).",
        "Neighbours: mean share of the 20 nearest other test images that have the class of an image, for the output of",
        "the head and for the features of the trunk; 10.0 is chance for ten classes. kNN: weighted votes of the 20",
        "nearest training images. Linear: a linear classifier. Both see the features of the trunk.",
        "Hours: duration of pre-training.",
        f"Published, best on test: {BEST_ON_TEST_SOURCE}.",
    ]
    return "\n".join([*lines, *notes(rows)]) + "\n"


def write(folder: Path) -> str:
    """Write table.md of the suite.

    Args:
        folder: folder of the results.

    Returns:
        The table.

    Raises:
        UserError: the folder contains no runs.
    """
    rows = ordered_rows(folder) if folder.is_dir() else []
    if not rows:
        raise UserError(f"no runs in {folder}; expected folders solo/<algo>-<arch>/seed<n> there")
    table = make_table(rows)
    (folder / "table.md").write_text(table)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    parser: argparse.ArgumentParser = Parser(
        prog="python -m plugins.experiments.report_ssv", description="Table of the suite self_supervised_vision."
    )
    parser.add_argument("folder", type=Path, help="results of the suite: results/self_supervised_vision")
    with exit_on_user_error():
        folder = parser.parse_args(argv).folder
        print(f"\n{write(folder)}\nwritten: {folder / 'table.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
