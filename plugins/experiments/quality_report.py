"""Correlation of label-free quality with kNN accuracy: ``python -m plugins.experiments.quality_report FOLDER``.

The features of each run are computed anew from its checkpoint: kNN accuracy on the validation images, the metrics on
the training images. The command writes quality.md, quality.json and quality.png into the folder.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plugins.experiments.results import FAINT, INK, MISSING, markdown_table, read_rows
from plugins.experiments.suites import lightly
from plugins.tools.command import Parser, UserError, exit_on_user_error, integer_from, positive_number
from plugins.tools.quality import Augmentation, Channels, image_sets
from plugins.tools.records import write_json

TITLES = {
    "rankme": "RankMe",
    "alpha_req": "α-ReQ",
    "stable_rank": "stable rank",
    "participation_ratio": "participation ratio",
    "nesum": "NESum",
    "lidar": "LiDAR",
    "alignment": "alignment",
    "uniformity": "uniformity",
}
"""Metric → title."""
AUGMENTATION = Augmentation(0.6, (0.4, 0.4, 0.8, 0.5), jitter_prob=1, gray_prob=0.8, flip_prob=0)
CHANNELS = Channels(**lightly.CHANNELS)
"""Augmentation and normalisation of the digits runs."""
COLOURS = {"solo": "#1f6fb4", "lightly": "#c8553d", "vissl": "#4a8f5b"}


def checkpoint(run: Path) -> Path:
    """Return the folder of a run's checkpoint: the run's, or that of the training within it."""
    inner = [run, run / run.parent.name, run / "pretrain"]
    if run.parent.name == "supervised":  # in other runs this is a classifier on frozen features
        inner.append(run / "linear" / "all")
    return next((path for path in inner if [*path.glob("*.ckpt")] or (path / "checkpoint.torch").is_file()), run)


def measure(
    folder: Path, data: Path, *, arch: str, size: int, views: int, images: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Compute kNN accuracy and metrics of each finished run.

    Args:
        folder: results of a suite.
        data: folder of the images, with ``train`` and ``val``.
        arch: network of the runs.
        size: side of the images in pixels.
        views: number of augmented views for LiDAR and alignment.
        images: number of images that have them.

    Returns:
        A dictionary for each run, and one line for each run whose checkpoint is not that of the network.
    """
    import torch

    from plugins.tools.hub import load_weights
    from plugins.tools.knn import knn_accuracy
    from plugins.tools.quality import of_network

    torch.manual_seed(0)
    print(f"reading {data}", flush=True)
    sets = image_sets(data / "train", size=size, views=views, images=images, how=AUGMENTATION, channels=CHANNELS)
    train_images = [_in_memory(part) for part in sets]
    val_images = [_in_memory(part) for part in image_sets(data / "val", size=size, channels=CHANNELS)]
    found, skipped = [], []
    runs = [(row, run) for row in read_rows(folder) for run in row.folders]
    for number, (row, run) in enumerate(runs, 1):
        name = f"{row.framework}/{row.method}/{run.name}"
        print(f"{number}/{len(runs)}  {name}", flush=True)
        try:
            model = load_weights(checkpoint(run), arch)
        except UserError as error:
            skipped.append(f"{name}: {error}")
            continue
        cpu = torch.device("cpu")
        values, train, labels = of_network(model, train_images, cpu)
        _, val, classes = of_network(model, val_images, cpu)
        knn = knn_accuracy(train, labels, val, classes)[0]
        metrics = {key: value.item() for key, value in values._asdict().items()}
        found.append({"framework": row.framework, "method": row.method, "run": run.name, "knn": knn, **metrics})
    return found, skipped


def _in_memory(images: Any) -> Any:
    """Read all images once, so that all runs see the same augmented views."""
    import torch

    views, classes = zip(*(images[index] for index in range(len(images))), strict=True)
    return torch.utils.data.TensorDataset(torch.stack(views), torch.tensor(classes))


def correlations(runs: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float, int]]:
    """Return Spearman's and Pearson's correlation of each metric with kNN accuracy, and the number of runs."""
    from scipy.stats import pearsonr, spearmanr

    found = {}
    for name in TITLES:
        pairs = [(run[name], run["knn"]) for run in runs if math.isfinite(run[name])]
        if len(pairs) > 2:
            x, y = zip(*pairs, strict=True)
            rho: Any = spearmanr(x, y)[0]
            r: Any = pearsonr(x, y)[0]
            found[name] = (float(rho), float(r), len(pairs))
    return found


def make_table(runs: Sequence[dict[str, Any]], skipped: Sequence[str]) -> str:
    """Return the report in Markdown: correlations over all, self-supervised and a framework's runs, then each run."""
    own = [run for run in runs if run["method"] not in ("untrained", "supervised")]
    every, ours = correlations(runs), correlations(own)
    head = ["metric", "Spearman", "Pearson", "runs", "Spearman, self-supervised", "Pearson, self-supervised", "runs "]
    body = []
    for name, title in TITLES.items():
        cells = [found.get(name) for found in (every, ours)]
        texts = [
            [MISSING] * 3 if cell is None else [f"{cell[0]:.2f}", f"{cell[1]:.2f}", str(cell[2])] for cell in cells
        ]
        body.append([title, *texts[0], *texts[1]])
    lines = [*markdown_table(head, body), ""]
    by_framework = {
        name: correlations([run for run in own if run["framework"] == name])
        for name in COLOURS
        if any(run["framework"] == name for run in own)
    }
    body = [
        [title, *(f"{found[name][0]:.2f}" if name in found else MISSING for found in by_framework.values())]
        for name, title in TITLES.items()
    ]
    lines += [*markdown_table(["Spearman, self-supervised", *by_framework], body), ""]
    titles = ["framework", "method", "run", "kNN (%)", *TITLES.values()]
    rows = [
        [run["framework"], run["method"], run["run"], f"{run['knn']:.1f}"]
        + [f"{run[name]:.3g}" if math.isfinite(run[name]) else MISSING for name in TITLES]
        for run in sorted(runs, key=lambda run: -run["knn"])
    ]
    lines += markdown_table(titles, rows, words=3)
    if skipped:
        lines += ["", "Left out:", "", *(f"- {line}" for line in skipped)]
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw kNN accuracy over each metric."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    found = correlations(runs)
    figure, axes = pyplot.subplots(2, 4, figsize=(11, 5.2), sharey=True)
    for ax, (name, title) in zip(axes.flat, TITLES.items(), strict=True):
        for framework, colour in COLOURS.items():
            own = [run for run in runs if run["framework"] == framework]
            ax.scatter([run[name] for run in own], [run["knn"] for run in own], s=14, color=colour, label=framework)
        for run in runs:
            if run["method"] in ("untrained", "supervised") and math.isfinite(run[name]):
                place = (run[name], run["knn"])
                right = run[name] > sum(ax.get_xlim()) / 2
                side = {"ha": "right", "xytext": (-4, 3)} if right else {"ha": "left", "xytext": (4, 3)}
                ax.annotate(run["method"], place, fontsize=6, color=INK, textcoords="offset points", **side)
        rho = f"   ρ = {found[name][0]:.2f}" if name in found else ""
        ax.set_title(f"{title}{rho}", fontsize=9, color=INK)
        ax.tick_params(labelsize=7, colors=FAINT)
        ax.locator_params(axis="x", nbins=5)
        ax.margins(y=0.1)  # room for a name above the highest point
    for ax in axes[:, 0]:
        ax.set_ylabel("kNN accuracy (%)", fontsize=8)
    axes[0, 0].legend(fontsize=6, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    parser: argparse.ArgumentParser = Parser(
        prog="python -m plugins.experiments.quality_report",
        description="Correlation of label-free metrics with the kNN accuracy over the runs of a suite.",
    )
    add = parser.add_argument
    add("folder", type=Path, help="results of the suite: results/digits")
    add("--data", type=Path, default=Path("datasets/digits"), help="images (default: datasets/digits)")
    add("--arch", default="resnet8", help="network of the runs (default: resnet8)")
    add("--size", type=positive_number(int), default=16, help="side of the images in pixels (default: 16)")
    add("--views", type=integer_from(2), default=50, help="augmented views for LiDAR and alignment (default: 50)")
    add("--images", type=integer_from(2), default=200, help="images that have such views (default: 200)")
    with exit_on_user_error():
        args = parser.parse_args(argv)
        for folder in (args.folder, args.data):
            if not folder.is_dir():
                raise UserError(f"there is no folder {folder}")
        runs, skipped = measure(
            args.folder, args.data, arch=args.arch, size=args.size, views=args.views, images=args.images
        )
        if len(runs) < 3:
            raise UserError(f"{args.folder} has {len(runs)} usable runs, a correlation needs at least 3; run the suite")
        text = make_table(runs, skipped)
        (args.folder / "quality.md").write_text(text)
        write_json(args.folder / "quality.json", {"runs": runs, "skipped": skipped})
        draw(runs, args.folder / "quality.png")
        print(f"\n{text}\nwritten: {args.folder / 'quality.md'}, quality.json and quality.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
