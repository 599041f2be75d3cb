"""Table and figure of a suite on several data sets: ``python -m plugins.experiments.report --by-dataset FOLDER``.

The folder of a run is ``<framework>/<method>_<data set>/seed<n>/``. A row of the table is a method on a data set, with
its published accuracy.
"""

from collections.abc import Sequence
from pathlib import Path

from plugins.experiments.published import PUBLISHED, Published
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
from plugins.experiments.suites import solo

SCORES = {
    "online": "online",
    "online_top5": "top-5",
    "knn": "kNN",
    "linear": "linear",
    "linear_top5": "top-5",
}
"""Key in result.json → title of the column."""


def split_label(row: Row) -> tuple[str, str]:
    """Return the method and the data set of a row."""
    method, _, dataset = row.method.rpartition("_")
    return method, dataset


def names(rows: Sequence[Row]) -> list[str]:
    """Return the method of each row, followed by the framework if there is more than one."""
    several = len({row.framework for row in rows}) > 1
    return [split_label(row)[0] + (f" ({row.framework})" if several else "") for row in rows]


def ordered_rows(folder: Path) -> list[Row]:
    """Return the rows of a suite, sorted by data set, then by method, both in the order of the suite."""
    methods = [variant.name for variant in (*solo.IMPLICIT_VAR_REG, *solo.SSL_EY)]
    datasets = list(solo.DATA)

    def place(row: Row) -> tuple[int, int, str]:
        method, dataset = split_label(row)
        return (
            datasets.index(dataset) if dataset in datasets else len(datasets),
            methods.index(method) if method in methods else len(methods),
            row.method,
        )

    return sorted(read_rows(folder), key=place)


def make_table(rows: Sequence[Row], published: dict[str, Published]) -> str:
    """Return the table in Markdown, with an explanation of its columns.

    Args:
        rows: the rows of the suite.
        published: run → published accuracy.

    Returns:
        Text that ends with a newline.
    """
    shown = [key for key in SCORES if any(row.values(key) for row in rows)]
    head = [
        *("data set", "method", "epochs"),
        *(f"{SCORES[key]} (%)" for key in shown),
        *("published (%)", "top-5 (%)", "hours"),
    ]
    body = []
    for row, name in zip(rows, names(rows), strict=True):
        _, dataset = split_label(row)
        known = published.get(row.method)
        hours = row.mean("seconds")
        body.append(
            [
                dataset,
                name + ("" if row.results else ": missing"),
                format_number(row.mean("epochs")),
                *(score(row, key, None) for key in shown),
                f"{known.top1:.2f}" if known else "",
                f"{known.top5:.2f}" if known and known.top5 is not None else "",
                MISSING if hours is None else f"{hours / 3600:.2f}",
            ]
        )
    lines = [
        *markdown_table(head, body, words=2),
        "",
        "Accuracy after the last epoch on test images (TinyImageNet, ImageNet, ImageNet-100, digits: validation).",
        "Online: a linear classifier on detached features, trained during pre-training. kNN: 20 neighbours.",
        "Linear: a linear classifier on the frozen backbone, trained afterwards. Hours: duration of pre-training.",
    ]
    sources = sorted({known.source for known in published.values()})
    lines.append(
        f"Published: {'; '.join(sources)}." if sources else "Published: no numbers are available for these runs."
    )
    return "\n".join([*lines, *notes(rows)]) + "\n"


def make_figure(rows: Sequence[Row], published: dict[str, Published], files: Sequence[Path]) -> None:
    """Draw a panel for each data set, with a line for each method.

    Args:
        rows: the rows of the suite.
        published: run → published accuracy.
        files: files to write; the suffix selects the format.
    """
    datasets = list(dict.fromkeys(split_label(row)[1] for row in rows))
    methods = list(dict.fromkeys(names(rows)))
    marks = {"online": ("o", ACCENT, "online"), "knn": ("^", FAINT, "kNN"), "linear": ("s", INK, "linear")}
    size = 2.2 + 2.4 * len(datasets), 1.4 + 0.32 * len(methods)
    with drawn(size, files) as figure:
        for ax, dataset in zip(figure.subplots(1, len(datasets), sharey=True, squeeze=False)[0], datasets, strict=True):
            for row, title in zip(rows, names(rows), strict=True):
                if split_label(row)[1] != dataset:
                    continue
                place = methods.index(title)
                for key, (mark, colour, name) in marks.items():
                    mean = row.mean(key)
                    if mean is not None:
                        ax.errorbar(
                            mean,
                            place,
                            xerr=row.deviation(key),
                            fmt=mark,
                            color=colour,
                            ms=5.5,
                            capsize=2.5,
                            label=name,
                        )
                if row.method in published:
                    ax.plot(published[row.method].top1, place, "x", color=SECOND, ms=7, mew=1.8, label="published")
            ax.set_title(dataset, loc="left")
            ax.set_xlabel("accuracy (%)")
            ax.grid(axis="x", color="#eeeeee")
            ax.set_axisbelow(True)
            ax.margins(x=0.12)
            ax.set_yticks(range(len(methods)), methods)
            ax.set_ylim(len(methods) - 0.4, -0.6)
        handles = {
            name: handle for ax in figure.axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False)


def write(folder: Path) -> str | None:
    """Write table.md, figure.png and figure.pdf of a suite.

    Args:
        folder: folder of the results; its name selects the published numbers.

    Returns:
        The table, or None if there are no runs.
    """
    rows = ordered_rows(folder) if folder.is_dir() else []
    if not rows:
        return None
    published = PUBLISHED.get(folder.resolve().name, {})
    table = make_table(rows, published)
    (folder / "table.md").write_text(table)
    make_figure(rows, published, [folder / "figure.png", folder / "figure.pdf"])
    return table
