"""Live table of the runs of a suite, for terminals. It needs ``rich``."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from plugins.experiments.suites.runner import Status, clock

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

STYLES = {"waiting": "dim", "finished": "green", "failed": "red"}
"""State → style of its row."""
FRAME_LINES = 5
"""Number of lines besides the runs: title, header and frame."""


class LiveTable:
    """A table of runs that is redrawn in place.

    Args:
        console: the terminal.
    """

    def __init__(self, console: "Console") -> None:
        from rich.live import Live

        self._console = console
        self.live = Live(console=console, auto_refresh=False, transient=True)

    def update(self, statuses: Sequence[Status], title: str) -> None:
        """Redraw the table.

        Args:
            statuses: of all runs, in the order of the rows.
            title: line above the table.
        """
        self.live.update(make_table(statuses, title, rows=self._console.height - FRAME_LINES), refresh=True)

    def report_line(self, text: str) -> None:
        """Print a line above the table."""
        self._console.print(text, markup=False, highlight=False)


def make_table(statuses: Sequence[Status], title: str, *, rows: int) -> "Table":
    """Build the table, one row per run.

    Args:
        statuses: of all runs, in the order of the rows.
        title: line above the table.
        rows: maximal number of rows. If there are more runs, active and failed runs take precedence over waiting and
            finished ones.

    Returns:
        A renderable of rich.
    """
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", expand=False)
    for name in ("run", "state", "progress"):
        table.add_column(name, no_wrap=True)
    for name in ("epoch", "loss", "ETA", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("result", overflow="fold")
    for status in _visible(statuses, max(rows, 1)):
        progress = status.progress
        finished = status.state == "finished"
        total = progress.epochs if progress else 1
        done = total if finished else progress.epoch if progress else 0
        table.add_row(
            status.name,
            status.state,
            ProgressBar(total=total, completed=done, width=12),
            f"{progress.epoch}/{progress.epochs}" if progress else "",
            "" if progress is None or progress.loss is None else f"{progress.loss:.4g}",
            "" if status.eta is None else clock(status.eta),
            "" if status.seconds is None else clock(status.seconds),
            Text(status.detail),
            style=STYLES.get(status.state),
        )
    return table


def _visible(statuses: Sequence[Status], rows: int) -> list[Status]:
    if len(statuses) <= rows:
        return list(statuses)
    order = {"failed": 1, "waiting": 2, "finished": 3}  # active runs are named after their step and come first
    ranked = sorted(range(len(statuses)), key=lambda index: order.get(statuses[index].state, 0))
    return [statuses[index] for index in sorted(ranked[:rows])]


@contextmanager
def live_table(console: "Console | None" = None) -> Iterator[LiveTable | None]:
    """Open the live table during the ``with`` block.

    Args:
        console: a console of rich; None uses standard output.

    Yields:
        The table, or None if the output is not a terminal, if ``NO_COLOR`` is set, if ``TERM`` is ``dumb``, or if rich
        is not installed. In these cases the caller prints plain lines.
    """
    if console is None:
        if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
            yield None
            return
        try:
            from rich.console import Console
        except ImportError:
            yield None
            return
        console = Console()
    if not console.is_terminal or console.is_dumb_terminal or console.no_color:
        yield None
        return
    table = LiveTable(console)
    with table.live:
        yield table
