"""Table and figure of a suite: ``python -m plugins.experiments.report results/digits``.

The command reads ``result.json`` in the folders ``<framework>/<method>/seed<n>/``, and ``metrics.csv`` and
``eigenvalues.csv`` for the curves. It writes ``table.md``, ``figure.png`` and ``figure.pdf`` into the given folder. A
run without a result is shown as missing.
"""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plugins.experiments import report_datasets
from plugins.experiments.results import (
    ACCENT,
    FAINT,
    INK,
    LOSSES,
    SECOND,
    Row,
    drawn,
    format_number,
    markdown_table,
    notes,
    read_rows,
    score,
    untrained,
)

SCORES = {"knn": "kNN", "linear": "linear", "linear_5": "5 labels"}
SMALLEST = 1e-8
"""Eigenvalues below this fraction of the largest are rounding noise and not drawn."""
COLUMNS = 7
"""Largest number of columns of panels in the figure."""


def titles(rows: Sequence[Row]) -> list[str]:
    """Return the titles for table and figure, followed by the framework if there is more than one."""
    from plugins.methods import METHODS

    several = len({row.framework for row in rows}) > 1
    names = [METHODS[row.method].title if row.method in METHODS else row.method for row in rows]
    return [f"{name} ({row.framework})" if several else name for name, row in zip(names, rows, strict=True)]


# ------------------------------------------------------------------------------------------------------- table


def make_table(rows: Sequence[Row]) -> str:
    """Return the table in Markdown, with an explanation of its columns.

    Args:
        rows: the rows of the suite.

    Returns:
        Text that ends with a newline.
    """
    head = ["method", "epochs", *(f"{title} (%)" for title in SCORES.values()), "seconds", "images/s"]
    body = [
        [
            (f"*{title}* (baseline)" if row.baseline else title) + ("" if row.results else ": missing"),
            format_number(row.mean("epochs")),
            *(score(row, key, None if row.baseline else untrained(rows, row.framework, key)) for key in SCORES),
            format_number(row.mean("seconds")),
            format_number(row.mean("images_per_second")),
        ]
        for row, title in zip(rows, titles(rows), strict=True)
    ]
    lines = [
        *markdown_table(head, body),
        "",
        "kNN and linear evaluation use all training labels, the third column 5 per class. The backbone is frozen,",
        "except in the supervised row. Accuracies are those of the last epoch on the validation images, with the",
        "difference to the untrained backbone in brackets. Seconds and images/s: training of the backbone.",
    ]
    return "\n".join([*lines, *notes(rows)]) + "\n"


# ------------------------------------------------------------------------------------------------------ figure


def read_losses(run: Path) -> tuple[list[float], list[float]]:
    """Read the training loss of each epoch from metrics.csv.

    Args:
        run: folder of the run.

    Returns:
        Epochs, from 1, and losses; two empty lists if there are none.
    """
    epochs, losses = [], []
    for line in _read_csv(run, "metrics.csv"):
        epoch = _float(line.get("epoch"))
        loss = next((_float(line[name]) for name in LOSSES if name in line), None)
        if epoch is not None and loss is not None:
            epochs.append(epoch + 1)
            losses.append(loss)
    return epochs, losses


def read_spectrum(run: Path) -> tuple[list[float], list[list[float]]]:
    """Read the eigenvalues of the covariance of the representation after each epoch from eigenvalues.csv.

    Args:
        run: folder of the run.

    Returns:
        Epochs, from 1, and the eigenvalues of each epoch, largest first; two empty lists if there are none.
    """
    epochs, spectra = [], []
    for line in _read_csv(run, "eigenvalues.csv"):
        epoch = _float(line.get("epoch"))
        values = [_float(value) for name, value in line.items() if name and name.startswith("eigval_")]
        if epoch is not None and values:
            epochs.append(epoch + 1)
            spectra.append([math.nan if value is None else value for value in values])
    return epochs, spectra


def _read_csv(run: Path, name: str) -> list[dict[str, Any]]:
    """Read the rows of a file of the pre-training, in the run's folder or in a subfolder (VISSL, lightly)."""
    places = (run / name, run / "pretrain" / name, run / run.parent.name / name)
    file = next((file for file in places if file.is_file()), run / name)
    try:
        with file.open(newline="") as lines:
            return list(csv.DictReader(lines))
    except (OSError, csv.Error, UnicodeDecodeError):
        return []


def _float(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def make_figure(rows: Sequence[Row], files: Sequence[Path]) -> None:
    """Draw accuracy, loss and spectrum.

    Args:
        rows: the rows of the suite.
        files: files to write; the suffix selects the format.
    """
    names = dict(zip(((row.framework, row.method) for row in rows), titles(rows), strict=True))
    methods = [(names[row.framework, row.method], row) for row in rows if not row.baseline]
    columns = min(COLUMNS, max(len(methods), 3))
    bands = math.ceil(max(len(methods), 1) / columns)
    heights = [1.3 + 0.3 * max(len(methods), 1), 0.5 + 1.6 * bands, 0.9 + 1.8 * bands]
    size = max(1.75 * columns, 9), sum(heights)
    style = {"axes.titlesize": 9, "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK}
    with drawn(size, files, style) as figure:
        top, middle, bottom = figure.subfigures(3, 1, squeeze=False, height_ratios=heights).ravel()
        _draw_accuracy(top, methods, rows)
        _draw_losses(middle, methods, bands, columns)
        _draw_spectra(bottom, methods, bands, columns)


def _draw_accuracy(figure: Any, methods: Sequence[tuple[str, Row]], rows: Sequence[Row]) -> None:
    """Draw a panel for each evaluation, with a point for each method and lines for the baselines."""
    axes = figure.subplots(1, len(SCORES), sharey=True)
    figure.suptitle("Accuracy on the validation images (%)", x=0.01, ha="left", fontweight="bold")
    frameworks = sorted({row.framework for row in rows})
    for ax, (key, title) in zip(axes, SCORES.items(), strict=True):
        ax.set_title(title, pad=18)
        for place, (_, row) in enumerate(methods):
            mean, start = row.mean(key), untrained(rows, row.framework, key)
            if mean is None:
                ax.text(0.02, place, "missing", transform=ax.get_yaxis_transform(), va="center", color=SECOND, size=8)
                continue
            if start is not None:
                ax.plot([start, mean], [place, place], color=ACCENT, alpha=0.35, lw=2, solid_capstyle="butt", zorder=2)
            ax.errorbar(mean, place, xerr=row.deviation(key), fmt="o", color=ACCENT, ms=5.5, capsize=2.5, zorder=3)
            ax.annotate(f"{mean:.1f}", (mean, place), (0, 5), textcoords="offset points", ha="center", size=7.5)
        for row in rows:
            mean = row.mean(key)
            if not row.baseline or mean is None:
                continue
            supervised = row.method == "supervised"
            ax.axvline(mean, color=SECOND if supervised else FAINT, lw=1.2, ls="--" if supervised else "-", zorder=1)
            if row.framework == frameworks[0]:
                ax.annotate(
                    f"{row.method}\n{mean:.1f}",
                    (mean, 1),
                    (0, 2),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    size=7,
                    linespacing=0.9,
                    color=SECOND if supervised else INK,
                )
        ax.margins(x=0.12)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", color="#eeeeee", zorder=0)
    axes[0].set_yticks(range(len(methods)), [name for name, _ in methods])
    axes[0].set_ylim(len(methods) - 0.4, -0.7)


def _panels(figure: Any, count: int, bands: int, columns: int) -> list[Any]:
    """Create one panel for each method and hide the remaining ones."""
    axes = figure.subplots(bands, columns, squeeze=False, sharex=True).ravel().tolist()
    for ax in axes[count:]:
        ax.set_visible(False)
    return axes[:count]


def _draw_losses(figure: Any, methods: Sequence[tuple[str, Row]], bands: int, columns: int) -> None:
    """Draw a panel for each method, since the losses have different scales, with a line for each seed."""
    figure.suptitle("Training loss per epoch (each method has its own scale)", x=0.01, ha="left", fontweight="bold")
    for ax, (name, row) in zip(_panels(figure, len(methods), bands, columns), methods, strict=True):
        curves = [read_losses(run) for run in [*row.folders, *row.missing]]
        for epochs, losses in curves:
            ax.plot(epochs, losses, color=ACCENT, lw=1.4, alpha=0.8)
        _finish_panel(ax, name, "" if any(epochs for epochs, _ in curves) else "missing")


def _draw_spectra(figure: Any, methods: Sequence[tuple[str, Row]], bands: int, columns: int) -> None:
    """Draw a panel for each method: the eigenvalues number 1, 2, 4, 8, … of its first seed over the epochs."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullLocator

    figure.suptitle(
        "Eigenvalue spectrum of the representation per epoch (eigenvalue number 1, 2, 4, 8, …)",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    panels = _panels(figure, len(methods), bands, columns)
    spectra = [
        next((s for s in map(read_spectrum, [*row.folders, *row.missing]) if s[0]), ([], [])) for _, row in methods
    ]
    most = max((len(line) for _, lines in spectra for line in lines), default=2)
    norm = LogNorm(1, max(most, 2))
    colours = colormaps["viridis_r"]
    for ax, (name, row), (epochs, lines) in zip(panels, methods, spectra, strict=True):
        largest = max((value for line in lines for value in line if value > 0), default=None)
        if largest is not None:
            width = min(len(line) for line in lines)
            for index in (2**power for power in range(width.bit_length())):
                values = [line[index - 1] for line in lines]
                shown = [value if value > largest * SMALLEST else math.nan for value in values]
                ax.plot(epochs, shown, color=colours(norm(index)), lw=1.2)
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(numticks=5))
            ax.yaxis.set_minor_locator(NullLocator())
        # DISSL and CISSL do not track a spectrum
        _finish_panel(ax, name, "" if largest is not None else "not tracked" if row.results else "missing")
    for ax in panels[-columns:]:
        ax.set_xlabel("epoch")
    if panels:
        ticks = [4**power for power in range(6) if 4**power <= most]
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=panels, ticks=ticks, pad=0.01, aspect=25, shrink=0.9)
        bar.ax.set_yticks(ticks, [str(tick) for tick in ticks])
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
        bar.set_label("number of the eigenvalue", size=8)


def _finish_panel(ax: Any, name: str, instead: str) -> None:
    """Set the title and the ticks of a panel; if it has no curve, show the text ``instead``."""
    ax.set_title(name, loc="left")
    ax.tick_params(labelsize=7.5, length=2)
    if instead:
        ax.text(0.5, 0.5, instead, transform=ax.transAxes, ha="center", va="center", color=SECOND)
        ax.set_yticks([])


# ------------------------------------------------------------------------------------------------ command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m plugins.experiments.report", description="Table and figure of a suite."
    )
    parser.add_argument("folder", type=Path, help="results of a suite, such as results/digits")
    parser.add_argument(
        "--by-dataset", action="store_true", help="for a suite with several data sets: one row per data set and method"
    )
    options = parser.parse_args(argv)
    table = report_datasets.write(options.folder) if options.by_dataset else _write(options.folder)
    if table is None:
        print(
            f"error: no runs in {options.folder}; expected folders <framework>/<method>/seed<n> there", file=sys.stderr
        )
        return 2
    print(f"\n{table}")
    print("written: " + ", ".join(str(options.folder / name) for name in ("table.md", "figure.png", "figure.pdf")))
    return 0


def _write(folder: Path) -> str | None:
    rows = read_rows(folder) if folder.is_dir() else []
    if not rows:
        return None
    table = make_table(rows)
    (folder / "table.md").write_text(table)
    make_figure(rows, [folder / "figure.png", folder / "figure.pdf"])
    return table


if __name__ == "__main__":
    sys.exit(main())
