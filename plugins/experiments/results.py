"""Results of a suite: rows of finished runs, and how reports format their numbers."""

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plugins.tools.records import read_json

BASELINES = ("untrained", "supervised")
"""Rows of baselines: the first is at the top of the table, the second at the bottom."""
MISSING = "–"
"""The cell of a missing number."""
LOSSES = ("train_ssl_loss_epoch", "loss")
"""Columns of metrics.csv with the mean loss of an epoch: in solo-learn, and in lightly and VISSL."""
ACCURACY = "val_acc1"
"""Column of solo-learn's metrics.csv with the accuracy of the online classifier on the validation images."""
INK, FAINT, ACCENT, SECOND = "#222222", "#9a9a9a", "#1f6fb4", "#c8553d"


@dataclass
class Row:
    """One method in one framework: its results, the folders of its finished runs, and those of its missing runs."""

    framework: str
    method: str
    results: list[dict[str, Any]] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    missing: list[Path] = field(default_factory=list)

    @property
    def baseline(self) -> bool:
        """Whether the row is a baseline."""
        return self.method in BASELINES

    def values(self, key: str) -> list[float]:
        """Return the finite numbers of the runs under a key."""
        found = [result.get(key) for result in self.results]
        return [float(value) for value in found if isinstance(value, int | float) and math.isfinite(value)]

    def mean(self, key: str) -> float | None:
        """Return the mean over seeds, or None if no run has the number."""
        values = self.values(key)
        return statistics.fmean(values) if values else None

    def deviation(self, key: str) -> float | None:
        """Return the sample standard deviation over seeds, or None for fewer than two."""
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else None


def read_rows(folder: Path) -> list[Row]:
    """Collect the runs of a suite.

    Args:
        folder: folder of the results of the suite.

    Returns:
        A row for each framework and method that has a folder of runs. The rows are sorted by framework, with the
        untrained backbone first and the supervised one last.
    """
    rows: dict[tuple[str, str], Row] = {}
    for run in sorted(folder.glob("*/*/seed*"), key=lambda path: (path.parts[:-1], _natural(path.name))):
        if not run.is_dir():
            continue
        framework, method = run.parts[-3:-1]
        row = rows.setdefault((framework, method), Row(framework, method))
        result = _read_result(run / "result.json")
        if result is None:
            row.missing.append(run)
        else:
            row.results.append(result)
            row.folders.append(run)
    return sorted(rows.values(), key=lambda row: (row.framework, _rank(row.method), row.method))


def _rank(method: str) -> int:
    return {"untrained": 0, "supervised": 2}.get(method, 1)


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _read_result(file: Path) -> dict[str, Any] | None:
    try:
        result = read_json(file)
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]], *, words: int = 1) -> list[str]:
    """Return the lines of a Markdown table with padded cells.

    Args:
        head: titles of the columns.
        body: rows of cells.
        words: number of left-aligned columns, from the left; the others are right-aligned.
    """
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]

    def text(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ("-" if i < words else ":") for i, width in enumerate(widths)) + "|"
    return [text(head), rule, *map(text, body)]


@contextmanager
def drawn(size: tuple[float, float], files: Sequence[Path], style: Mapping[str, Any] | None = None) -> Iterator[Any]:
    """Yield an empty figure of matplotlib in the style of the reports, and write it.

    Args:
        size: width and height in inches.
        files: files to write; the suffix selects the format.
        style: further settings of matplotlib (rcParams).
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shared: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42}
    shared.update(style or {})
    with rc_context(shared):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)  # never opens a window
        yield figure
        for file in files:
            # Without a date in the file, the same results give the same bytes.
            figure.savefig(file, dpi=150, metadata={"CreationDate": None} if file.suffix == ".pdf" else None)


def score(row: Row, key: str, reference: float | None) -> str:
    """Format the mean, the standard deviation and the difference to a reference as a cell."""
    mean, deviation = row.mean(key), row.deviation(key)
    if mean is None:
        return MISSING
    text = f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")
    return text if reference is None else f"{text} ({mean - reference:+.1f})"


def format_number(value: float | None) -> str:
    """Format a number, rounded to an integer, as a cell."""
    return MISSING if value is None else f"{value:.0f}"


def untrained(rows: Sequence[Row], framework: str, key: str) -> float | None:
    """Return the mean of the untrained backbone under a key, preferably in the given framework.

    The backbone is the same network in every framework, so one run is enough for all.
    """
    found = [row for row in rows if row.method == "untrained" and row.mean(key) is not None]
    found.sort(key=lambda row: row.framework != framework)
    return found[0].mean(key) if found else None


def notes(rows: Sequence[Row], *, spread: str = "sample standard deviation") -> list[str]:
    """Return the lines below a table: the number of seeds, and the missing runs.

    Args:
        rows: the rows of the suite.
        spread: name of the number after ±.
    """
    lines = []
    seeds = max((len(row.results) for row in rows), default=0)
    if seeds > 1:
        lines.append(f"Mean ± {spread} over up to {seeds} seeds.")
    missing = [str(run) for row in rows for run in row.missing]
    if missing:
        lines += ["", "Missing (not finished or failed; each folder has a log.txt): " + ", ".join(missing)]
    return lines
