"""Table and figure of the suite self_supervised_vision: ``python -m plugins.experiments.report_ssv FOLDER``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plugins.experiments.published import BEST_ON_TEST, BEST_ON_TEST_SOURCE
from plugins.experiments.results import (
    ACCENT,
    FAINT,
    INK,
    MISSING,
    SECOND,
    Row,
    drawn,
    format_number,
    markdown_table,
    notes,
    read_rows,
    score,
)
from plugins.experiments.suites import ssv
from plugins.tools.command import Parser, UserError, exit_on_user_error

SCORES = {
    "neighbors_head": "neighbours, head (%)",
    "neighbors": "neighbours, trunk (%)",
    "knn": "kNN (%)",
    "linear": "linear (%)",
}
"""Key in result.json → title of the column."""
MARKS = {
    "knn": ("^", ACCENT, "kNN"),
    "linear": ("s", INK, "linear"),
    "neighbors_head": ("o", FAINT, "neighbours, head"),
}
"""Key in result.json → mark, colour and name in the figure."""


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
        known, seconds = published(algo, dataset), row.mean("seconds")
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


def published(algo: str, dataset: str) -> float | None:
    """Return the published number of an algorithm on a data set in per cent, or None."""
    return BEST_ON_TEST.get(algo) if dataset == "cifar10" else None


def make_figure(rows: Sequence[Row], files: Sequence[Path]) -> None:
    """Draw a panel for each data set and network, with the methods on the x axis and the accuracies on the y axis.

    The published number is drawn in the panels of all networks, because its source does not name the network.

    Args:
        rows: the rows of the suite.
        files: files to write; the suffix selects the format.
    """
    cells = {split_label(row): row for row in rows}
    algos, archs, datasets = (list(dict.fromkeys(each)) for each in zip(*cells, strict=True))
    size = 1.2 + len(archs) * (1.0 + 0.28 * len(algos)), 0.6 + 2.4 * len(datasets)
    with drawn(size, files) as figure:
        panels = figure.subplots(len(datasets), len(archs), sharex=True, sharey="row", squeeze=False)
        for axes, dataset in zip(panels, datasets, strict=True):
            axes[0].set_ylabel(f"{dataset}: accuracy (%)")
            for ax, arch in zip(axes, archs, strict=True):
                _draw_panel(ax, [(cells.get((algo, arch, dataset)), published(algo, dataset)) for algo in algos])
                ax.set_xticks(range(len(algos)), algos, rotation=60, ha="right", rotation_mode="anchor")
                ax.set_xlim(-0.5, len(algos) - 0.5)
        for ax, arch in zip(panels[0], archs, strict=True):
            ax.set_title(arch, loc="left")
        handles = {
            name: handle for ax in figure.axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False)


def _draw_panel(ax: Any, methods: Sequence[tuple[Row | None, float | None]]) -> None:
    """Draw the runs of a network on a data set, each with its published number, at x = 0, 1, …"""
    for place, (row, known) in enumerate(methods):
        for key, (mark, colour, name) in MARKS.items():
            mean = None if row is None else row.mean(key)
            if row is not None and mean is not None:
                look = {"fmt": mark, "color": colour, "ms": 5, "capsize": 2.5}
                ax.errorbar(place, mean, yerr=row.deviation(key), label=name, **look)
        if row is not None and known is not None:
            ax.plot(place, known, "x", color=SECOND, ms=7, mew=1.8, label="published, best on test")
    ax.grid(axis="y", color="#eeeeee")
    ax.set_axisbelow(True)


def write(folder: Path) -> str:
    """Write table.md, figure.png and figure.pdf of the suite.

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
    make_figure(rows, [folder / "figure.png", folder / "figure.pdf"])
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    parser: argparse.ArgumentParser = Parser(
        prog="python -m plugins.experiments.report_ssv",
        description="Table and figure of the suite self_supervised_vision.",
    )
    parser.add_argument("folder", type=Path, help="results of the suite: results/self_supervised_vision")
    with exit_on_user_error():
        folder = parser.parse_args(argv).folder
        print(
            f"\n{write(folder)}\nwritten: "
            + ", ".join(str(folder / f) for f in ("table.md", "figure.png", "figure.pdf"))
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
