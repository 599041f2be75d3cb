"""UMAP of features: points, pictures of them, and a callback that draws one while a method is trained."""

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
from omegaconf import DictConfig
from torch import Tensor, nn

from plugins.install import not_installed
from plugins.tools.command import UserError
from solo_ext.checkpoint import check_writable
from solo_ext.compat import pl
from solo_ext.loaders import evaluation_loader

NEIGHBOURS = 15
"""How many neighbours UMAP looks at unless told otherwise; its own default."""

_LEGEND_ROWS = 25
_LEGEND_MOST = 100  # classes; the names of more would not be read


def check_installed() -> None:
    """Refuse to begin without umap-learn.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("umap") is None:
        raise UserError(not_installed("umap"))


def embed(features: Tensor, *, neighbours: int = NEIGHBOURS, seed: int = 0) -> np.ndarray:
    """The features in two dimensions, the same each time.

    Args:
        features: ``[N, D]``.
        neighbours: of each point, >= 2.
        seed: of UMAP's random numbers; the global ones, and torch's number of threads, are left alone.

    Returns:
        Coordinates ``[N, 2]``, float32.

    Raises:
        UserError: there are not more rows than neighbours, or a feature is infinite or no number.
    """
    if len(features) <= neighbours:
        raise UserError(f"UMAP with {neighbours} neighbours needs more than {neighbours} images, got {len(features)}")
    if not torch.isfinite(features).all():
        raise UserError("the features hold infinite values or no numbers: the network has diverged")
    with _undisturbed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies, and that a seed means one thread
        from umap import UMAP  # takes many seconds

        found = UMAP(n_components=2, n_neighbors=neighbours, random_state=seed).fit_transform(features.float().numpy())
    return np.asarray(found, dtype=np.float32)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Undo what UMAP does to its process: numba sets the threads of torch too, an import draws from ``random``."""
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
        return list(colormaps["tab10"].colors)[:count]
    if count <= 20:
        return list(colormaps["tab20"].colors)[:count]
    # around the circle of hues, three brightnesses by turns to tell neighbours apart
    return [colorsys.hls_to_rgb(index / count, (0.4, 0.55, 0.7)[index % 3], 0.75) for index in range(count)]


def plot(points: np.ndarray, labels: Sequence[int], classes: Sequence[str], title: str, files: Iterable[Path]) -> None:
    """Draw points in the colours of their classes; grey where they have none.

    Args:
        points: ``[N, 2]``.
        labels: ``[N]``; -1 where there is none.
        classes: names by label; numbers are written where they are too few.
        title: above the picture.
        files: where to write it; the ending says in what format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = np.asarray(labels)
    figure = Figure(figsize=(7, 7))
    FigureCanvasAgg(figure)  # no window, whatever the user's matplotlib is set to
    axes = figure.add_subplot()
    size = float(np.clip(20000 / len(points), 2, 30))
    order = np.random.default_rng(0).permutation(len(points))  # else the last class would lie on top
    present = [int(label) for label in np.unique(labels) if label >= 0]
    colours = dict(zip(present, _colours(len(present)), strict=True))
    shades = [colours.get(int(label), (0.6, 0.6, 0.6)) for label in labels[order]]
    axes.scatter(*points[order].T, s=size, c=shades, alpha=0.7, linewidths=0, rasterized=len(points) > 5000)
    axes.set(title=title, xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    axes.set_aspect("equal", adjustable="datalim")  # distances are what a UMAP shows
    if 0 < len(present) <= _LEGEND_MOST:
        names = {label: classes[label] if label < len(classes) else str(label) for label in present}
        handles = [axes.scatter([], [], s=40, color=colours[label], label=names[label]) for label in present]
        columns = -(-len(present) // _LEGEND_ROWS)
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), ncols=columns, frameon=False)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150, bbox_inches="tight")


def write_points(points: np.ndarray, labels: Sequence[int], classes: Sequence[str], file: Path) -> None:
    """Write the coordinates as CSV: x, y, label, class; both last are empty where there is no label."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["x", "y", "label", "class"])
        for (x, y), label in zip(points.tolist(), labels, strict=True):
            name = classes[label] if 0 <= label < len(classes) else ""
            writer.writerow([f"{x:.5f}", f"{y:.5f}", label if label >= 0 else "", name])


class AutoUMAP(pl.Callback):
    """Draws the validation images every ``auto_umap.frequency`` epochs and after the last.

    Written to ``<auto_umap.dir>/<method>/<version>/<name>-<version>-ep=<epoch>.pdf``, where solo-learn writes them, as
    PNG too, and to Weights & Biases where that is on. Training goes on as if it had not been there.

    Args:
        cfg: the configuration, with ``auto_umap.dir`` and ``auto_umap.frequency``.
        folder: the run's folder, for its version.

    Raises:
        UserError: umap-learn is not installed.
    """

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        check_installed()
        self.frequency = cfg.auto_umap.frequency
        self.folder = Path(cfg.auto_umap.dir) / cfg.method / folder.name
        self.stem = f"{cfg.name}-{folder.name}"
        self.seed = cfg.seed
        self.reading = (cfg.optimizer.batch_size, cfg.data.num_workers)

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Refuse to train where nothing could be drawn."""
        val = trainer.datamodule.val
        if val is None:
            raise UserError("auto_umap draws the labelled validation images: it needs data.val_path")
        if len(val) <= NEIGHBOURS:
            raise UserError(f"auto_umap needs more than {NEIGHBOURS} validation images, got {len(val)}")
        check_writable(self.folder, "auto_umap.dir")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw, if it is time to, on the first process; the others go on until they need it."""
        epoch = trainer.current_epoch
        if (epoch + 1) % self.frequency != 0 and epoch + 1 != trainer.max_epochs:
            return
        if not trainer.is_global_zero:
            return
        features, labels = self._features(trainer, module)
        if not torch.isfinite(features).all():
            print(f"auto_umap: no picture of epoch {epoch}: the features are not finite", flush=True)
            return
        files = [self.folder / f"{self.stem}-ep={epoch}{ending}" for ending in (".pdf", ".png")]
        title = f"{self.stem}, epoch {epoch + 1}: {len(labels)} validation images"
        classes = getattr(trainer.datamodule.val, "classes", [])
        plot(embed(features, seed=self.seed), labels.tolist(), classes, title, files)
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.WandbLogger):
                logger.log_image("validation_umap", [str(files[1])])

    @torch.no_grad()
    def _features(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[Tensor, Tensor]:
        """Features and labels of all validation images."""
        parts, labels = [], []
        precision = trainer.precision_plugin
        # a loader draws a random number when it starts, which training must not miss
        with _evaluating(module), torch.random.fork_rng(devices=[]), precision.val_step_context():
            for images, targets in evaluation_loader(trainer.datamodule.val, *self.reading):
                images = precision.convert_input(images.to(module.device))
                parts.append(module.backbone(images).float().cpu())
                labels.append(targets.cpu())
        return torch.cat(parts), torch.cat(labels)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each submodule gets its own mode back."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
