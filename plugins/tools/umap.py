"""UMAP of features: coordinates in two dimensions, and pictures of them.

UMAP: McInnes, Healy & Melville 2018, arXiv:1802.03426.
"""

import colorsys
import csv
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plugins.install import not_installed
from plugins.tools.command import UserError

NEIGHBOURS = 15
"""Default number of neighbours, the same as umap-learn's."""

_LEGEND_ROWS = 25
_LEGEND_MOST = 100  # classes; there is no legend for more


def check_installed() -> None:
    """Check that umap-learn is installed.

    Raises:
        UserError: umap-learn is not installed.
    """
    if find_spec("umap") is None:
        raise UserError(not_installed("umap"))


def embed(features: Tensor, *, neighbours: int = NEIGHBOURS, seed: int = 0) -> np.ndarray:
    """Embed features in two dimensions, reproducibly.

    Args:
        features: ``[N, D]``.
        neighbours: neighbours of each point, >= 2.
        seed: seed of UMAP; global random states and torch's number of threads do not change.

    Returns:
        Coordinates ``[N, 2]``, float32.

    Raises:
        UserError: there are not more rows than neighbours, or a feature is inf or NaN.
    """
    if len(features) <= neighbours:
        raise UserError(f"UMAP with {neighbours} neighbours needs more than {neighbours} images, got {len(features)}")
    if not torch.isfinite(features).all():
        raise UserError("the features contain inf or NaN: the network has diverged")
    with _global_state_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from its dependencies, and that a seed implies one thread
        from umap import UMAP  # slow to import

        found = UMAP(n_components=2, n_neighbors=neighbours, random_state=seed).fit_transform(features.float().numpy())
    return np.asarray(found, dtype=np.float32)


@contextmanager
def _global_state_kept() -> Iterator[None]:
    """Restore global state: numba changes torch's threads, and an import draws from ``random``."""
    threads, python, numpy = torch.get_num_threads(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(python)
        np.random.set_state(numpy)


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](index)[:3] for index in range(count)]
    if count <= 20:
        return [colormaps["tab20"](index)[:3] for index in range(count)]
    # equally spaced hues with three alternating values of lightness
    return [colorsys.hls_to_rgb(index / count, (0.4, 0.55, 0.7)[index % 3], 0.75) for index in range(count)]


def plot(points: np.ndarray, labels: Sequence[int], classes: Sequence[str], title: str, files: Iterable[Path]) -> None:
    """Draw points in the colours of their classes; points without a label are grey.

    Args:
        points: ``[N, 2]``.
        labels: ``[N]``; -1 means no label.
        classes: names by label; a label without a name is shown as its number.
        title: title of the picture.
        files: files to write; the suffix selects the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    numbers = np.asarray(labels)
    figure = Figure(figsize=(7, 7))
    FigureCanvasAgg(figure)  # never opens a window
    axes = figure.add_subplot()
    size = float(np.clip(20000 / len(points), 2, 30))
    order = np.random.default_rng(0).permutation(len(points))  # in class order, the last class would cover the others
    present = [int(label) for label in np.unique(numbers) if label >= 0]
    colours = dict(zip(present, _colours(len(present)), strict=True))
    shades = [colours.get(int(label), (0.6, 0.6, 0.6)) for label in numbers[order]]
    axes.scatter(*points[order].T, s=size, c=shades, alpha=0.7, linewidths=0, rasterized=len(points) > 5000)
    axes.set(title=title, xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    axes.set_aspect("equal", adjustable="datalim")  # the same scale on both axes
    if 0 < len(present) <= _LEGEND_MOST:
        names = {label: classes[label] if label < len(classes) else str(label) for label in present}
        handles = [axes.scatter([], [], s=40, color=colours[label], label=names[label]) for label in present]
        columns = -(-len(present) // _LEGEND_ROWS)
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), ncols=columns, frameon=False)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150, bbox_inches="tight")


def write_points(points: np.ndarray, labels: Sequence[int], classes: Sequence[str], file: Path) -> None:
    """Write the coordinates as CSV: x, y, label, class; label and class are empty without a label."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["x", "y", "label", "class"])
        for (x, y), label in zip(points.tolist(), labels, strict=True):
            name = classes[label] if 0 <= label < len(classes) else ""
            writer.writerow([f"{x:.5f}", f"{y:.5f}", label if label >= 0 else "", name])
