"""Tables and figures of DISSL's and CISSL's suites: ``python -m plugins.experiments.report_dissl results/dissl_fig7a``.

The command writes ``table.md`` and ``summary.csv`` (mean and standard error of each probe over seeds) and, for the
suites of figures, ``fig7a`` or ``fig7c`` as PDF and PNG. The name of the folder selects the suite.
"""

import csv
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plugins.experiments.published import PUBLISHED
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
)
from plugins.experiments.suites import dissl
from plugins.tools.command import Parser, UserError, exit_on_user_error

FIGURES = {"dissl_fig7a": "fig7a", "dissl_fig7c": "fig7c"}
"""Suite → name of its figure."""
FIGURE_WEIGHT_DECAY = 1e-6
"""Weight decay of the probes of figure 7a, as published. The smallest fraction, with one label per class, is too small
to choose one."""

DIFFERENCES = """\
Differences to the published runs: backbone and heads of DISSL and CISSL process each view separately, so that each view
has separate batch statistics; the incomplete last batch of an epoch is dropped."""
"""Differences between solo-learn and the published code, for tables with published numbers."""


class Score(NamedTuple):
    """A probe of a run, aggregated over seeds.

    Args:
        dataset, method, title, epochs: data set, method, published name and number of epochs of the run.
        kind, dim, fraction, labels: kind of the probe, width of the representation, fraction and number of labels.
        select: images for the choice of the weight decay: "validation", "test", or None without a choice.
        weight_decay: the chosen values over seeds, in ascending order.
        seeds: number of seeds.
        mean, sem: test accuracy in per cent and its standard error, which is None for one seed.
        best_on_test: largest mean test accuracy over weight decays, as published.
    """

    dataset: str
    method: str
    title: str
    epochs: float | None
    kind: str
    dim: int
    fraction: float
    labels: int
    select: str | None
    weight_decay: tuple[float, ...]
    seeds: int
    mean: float
    sem: float | None
    best_on_test: float


def standard_error(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation divided by the root of the number of values; None for fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def scores(row: Row, title: str) -> list[Score]:
    """Aggregate the probes of a run over its seeds.

    Args:
        row: the run, with the name ``<method>_<data set>``.
        title: name in the publication.

    Raises:
        UserError: the seeds have different probes.
    """
    method, _, dataset = row.method.rpartition("_")
    ways = [[_probe_settings(probe) for probe in result["probes"]] for result in row.results]
    if any(way != ways[0] for way in ways):
        places = ", ".join(map(str, row.folders))
        raise UserError(
            f"the seeds of {row.method} have different probes; delete result.json in {places}, repeat their "
            "probe commands, which --dry-run prints, and then the suite"
        )
    found = []
    for probes in zip(*(result["probes"] for result in row.results), strict=True):
        first, values = probes[0], [probe["acc1"] for probe in probes]
        grid = zip(*(probe["grid"] for probe in probes), strict=True)
        found.append(
            Score(
                *(dataset, method, title, row.mean("epochs")),
                *(first[key] for key in ("kind", "dim", "fraction", "labels", "select")),
                weight_decay=tuple(sorted({probe["weight_decay"] for probe in probes})),
                seeds=len(values),
                mean=statistics.fmean(values),
                sem=standard_error(values),
                best_on_test=max(statistics.fmean(entry["acc1"] for entry in entries) for entries in grid),
            )
        )
    return found


def _probe_settings(probe: dict[str, Any]) -> tuple[Any, ...]:
    """Return the settings that must be equal for all seeds."""
    described = (probe[key] for key in ("kind", "dim", "fraction", "labels", "select"))
    return (*described, *(entry["weight_decay"] for entry in probe["grid"]))


def ordered(folder: Path, suite: str) -> list[tuple[Row, str]]:
    """Return the rows of a suite that have a folder, with their titles, by data set in the order of the suite."""
    rows = {row.method: row for row in read_rows(folder)}
    return [
        (rows[label], variant.title)
        for dataset, sweep in dissl.SWEEPS.items()
        for variant in dissl.VARIANTS[suite](sweep)
        if (label := f"{variant.name}_{dataset}") in rows
    ]


# ------------------------------------------------------------------------------------------------------------ table


def make_table(suite: str, rows: Sequence[tuple[Row, str]]) -> str:
    """Return the table in Markdown, with an explanation of its columns.

    Args:
        suite: name of the suite.
        rows: the result of :func:`ordered`.

    Returns:
        Text that ends with a newline.
    """
    known = PUBLISHED.get(suite, {})
    head = ["data set", "run", "method", "epochs", "z", "probe", "labels", "accuracy (%)", "best on test (%)"]
    head += [*(["published (%)"] if known else []), "hours"]
    body = []
    for row, title in rows:
        start = [row.method.rpartition("_")[2], row.method.rpartition("_")[0], title, format_number(row.mean("epochs"))]
        seconds = row.mean("seconds")
        hours = MISSING if seconds is None else f"{seconds / 3600:.2f}"
        theirs = [f"{known[row.method].top1:.1f}" if row.method in known else ""] if known else []
        if not row.results:
            body.append([*start, *[MISSING] * 5, *theirs, MISSING])
        for score in scores(row, title):
            accuracy = f"{score.mean:.1f}" + ("" if score.sem is None else f" ± {score.sem:.1f}")
            probe = f"{score.kind} {'/'.join(f'{value:.0e}' for value in score.weight_decay)}"
            numbers = [str(score.dim), probe, str(score.labels), accuracy, f"{score.best_on_test:.1f}"]
            body.append([*start, *numbers, *theirs, hours])
    lines = [
        *markdown_table(head, body, words=3),
        "",
        "Accuracy: probes of the frozen backbone on the validation images, which are the test images here. z: width",
        "of the representation. Probe: kind and weight decay; one of several was chosen on a held-out part of the",
        "training labels. Best on test: the weight decay was chosen on the test images, as in the published numbers.",
        "Hours: duration of pre-training.",
    ]
    if known:
        lines.append(f"Published: {'; '.join(sorted({entry.source for entry in known.values()}))}.")
        lines += DIFFERENCES.splitlines()
    lines += notes([row for row, _ in rows], spread="standard error")
    return "\n".join(lines) + "\n"


def write_summary(found: Sequence[Score], file: Path) -> None:
    """Write every score as a row of a CSV file."""
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, Score._fields)
        writer.writeheader()
        for score in found:
            writer.writerow({**score._asdict(), "weight_decay": "/".join(map(str, score.weight_decay))})


# ----------------------------------------------------------------------------------------------------------- figures


class Curve(NamedTuple):
    """A curve of a figure: its name, and its points as (x, accuracy, standard error)."""

    name: str
    points: list[tuple[float, float, float]]


def curves(suite: str, found: Sequence[Score], select: str) -> dict[str, list[Curve]]:
    """Return the curves of the figure of a suite.

    Args:
        suite: a key of FIGURES.
        found: the scores of its runs.
        select: "validation" selects the accuracies that the probes report, "test" the best on the test images.

    Returns:
        The curves of each data set. Figure 7a has a curve for each augmentation strength, over the number of labels;
        figure 7c has a curve for each kind of heads and probes, over the width of the representation.
    """
    lines: dict[str, dict[str, Curve]] = {}
    for score in found:
        if suite == "dissl_fig7a" and score.weight_decay != (FIGURE_WEIGHT_DECAY,):
            continue
        x = score.labels if suite == "dissl_fig7a" else score.dim
        y = score.best_on_test if select == "test" else score.mean
        line = lines.setdefault(score.dataset, {}).setdefault(score.title, Curve(score.title, []))
        line.points.append((x, y, score.sem or 0.0))
    for line in (line for each in lines.values() for line in each.values()):
        line.points.sort()
    return {dataset: list(each.values()) for dataset, each in lines.items()}


def make_figure(suite: str, lines: dict[str, list[Curve]], files: Sequence[Path]) -> None:
    """Draw the figure of a suite, with a panel for each data set.

    Args:
        suite: a key of FIGURES.
        lines: the result of :func:`curves`.
        files: files to write; the suffix selects the format.
    """
    label, base = ("number of labels", 10) if suite == "dissl_fig7a" else ("width of the representation", 2)
    with drawn((3.6 * max(len(lines), 1), 3.0), files) as figure:
        panels = figure.subplots(1, len(lines), squeeze=False)[0]
        for ax, (dataset, each) in zip(panels, lines.items(), strict=True):
            looks = [(ACCENT, "o", "-"), (SECOND, "s", "--"), (INK, "^", ":"), (FAINT, "D", "-.")]
            for line, (colour, marker, dashes) in zip(each, looks, strict=False):
                x, y, error = zip(*line.points, strict=True)
                error = error if any(error) else None
                look = {"color": colour, "marker": marker, "linestyle": dashes, "ms": 5, "capsize": 2.5}
                ax.errorbar(x, y, yerr=error, label=line.name, **look)
            ax.set_xscale("log", base=base)
            ticks = sorted({point[0] for line in each for point in line.points})
            ax.set_xticks(ticks, [f"{tick:g}" if tick < 1e4 else f"{tick / 1e3:g}k" for tick in ticks])
            ax.minorticks_off()
            ax.set_title(dataset, loc="left")
            ax.set_xlabel(label)
            ax.grid(axis="y", color="#eeeeee")
            ax.set_axisbelow(True)
            ax.legend(frameon=False, fontsize=8)
        panels[0].set_ylabel("accuracy (%)")


# ------------------------------------------------------------------------------------------------------ command line


def write(folder: Path, select: str = "validation") -> list[Path]:
    """Write the table, the summary and the figure of a suite.

    Args:
        folder: folder of the results, with the name of the suite.
        select: accuracies that the figure shows: see :func:`curves`.

    Returns:
        The files that were written.

    Raises:
        UserError: the folder has the name of another suite, or contains no runs.
    """
    suite = folder.resolve().name
    if suite not in dissl.VARIANTS:
        raise UserError(f"{folder} must be a folder with the name of one of the suites {', '.join(dissl.VARIANTS)}")
    rows = ordered(folder, suite) if folder.is_dir() else []
    if not rows:
        raise UserError(f"no runs in {folder}; expected folders solo/<method>_<data set>/seed<n> there")
    found = [score for row, title in rows for score in scores(row, title)]
    files = [folder / "table.md", folder / "summary.csv"]
    files[0].write_text(make_table(suite, rows))
    write_summary(found, files[1])
    if suite in FIGURES and found:
        drawn = [folder / f"{FIGURES[suite]}.{suffix}" for suffix in ("pdf", "png")]
        make_figure(suite, curves(suite, found, select), drawn)
        files += drawn
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    parser = Parser(
        prog="python -m plugins.experiments.report_dissl", description="Tables and figures of DISSL's suites."
    )
    parser.add_argument("folder", type=Path, help="results of a suite, such as results/dissl_fig7a")
    held = "accuracies in the figure: weight decay chosen on held-out training images, or on the test images"
    parser.add_argument("--select", choices=["validation", "test"], default="validation", help=held)
    with exit_on_user_error():
        options = parser.parse_args(argv)
        files = write(options.folder, options.select)
        print(f"\n{files[0].read_text()}")
        print("written: " + ", ".join(map(str, files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
