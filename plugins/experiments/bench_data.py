"""Images per second of the two data loaders of solo_ext: ``python -m plugins.experiments.bench data``.

"loader" is the standard loader (Pillow in worker processes), "DALI" is ``data.format: dali``. Both compute the same two
views of the same files with the same augmentations (random crop, colour jitter, grey scale, blur, flip). The number of
worker processes equals the number of DALI threads. The loaders run alternately in one process. The command prints the
medians over rounds, and the median ratio.

    python -m plugins.experiments.bench data                                    # synthetic JPEGs of 256 px
    python -m plugins.experiments.bench data --images datasets/imagenet/train --device gpu --workers 16
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from plugins.tools.command import UserError, exit_on_user_error, integer_from

SYNTHETIC = 512
"""Number of synthetic images if no folder is given."""


class DataResult(NamedTuple):
    """Images per second, medians over the rounds."""

    images: int
    crop: int
    batch_size: int
    workers: int
    device: str
    host: str
    loader: float
    dali: float
    ratio: float
    """Median over rounds of the ratio DALI / loader."""
    rounds: list[tuple[float, float]]


def bench_data(
    images: str | Path | None = None,
    *,
    device: str = "cpu",
    batch_size: int = 64,
    workers: int = 2,
    crop: int = 224,
    batches: int = 8,
    rounds: int = 3,
) -> DataResult:
    """Compare DALI with the standard loader.

    Args:
        images: a folder of class folders; None creates synthetic JPEGs of 256 px.
        device: device of DALI, "cpu" or "gpu".
        batch_size: number of images per batch.
        workers: number of processes of the loader, and of threads of DALI.
        crop: side of the views in pixels.
        batches: number of timed batches per round, after one that fills the queues.
        rounds: number of rounds.

    Raises:
        UserError: DALI or the GPU is missing, or there are no images.
    """
    from solo_ext.compat import GENERATION

    with _folder(images) as folder:
        readers = {form: _images(folder, form, device, batch_size, workers, crop) for form in ("image_folder", "dali")}
        count, speeds = len(readers["dali"].train), []
        if count < 2 * batch_size:
            raise UserError(f"the benchmark needs at least two batches of {batch_size}, got {count} images")
        for epoch in range(rounds):
            pair = [_speed(reader.train_dataloader(), epoch, batches) for reader in readers.values()]
            speeds.append((pair[0], pair[1]))
    return DataResult(
        *(count, crop, batch_size, workers, device, GENERATION),
        loader=statistics.median(loader for loader, _ in speeds),
        dali=statistics.median(dali for _, dali in speeds),
        ratio=statistics.median(dali / loader for loader, dali in speeds),
        rounds=speeds,
    )


@contextmanager
def _folder(images: str | Path | None) -> Iterator[Path]:
    """Yield the folder of images, or a temporary one with synthetic images."""
    if images is not None:
        yield Path(images)
        return
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        make_jpegs(Path(folder), SYNTHETIC)
        yield Path(folder)


def make_jpegs(folder: Path, count: int, side: int = 256) -> None:
    """Write synthetic JPEGs into two class folders: noise on several scales, with file sizes similar to ImageNet's.

    Args:
        folder: the folder to write into.
        count: number of images.
        side: side of the images in pixels.
    """
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(count):
        picture = np.zeros((side, side, 3))
        for scale in (4, 16, 64, side):
            grid = Image.fromarray(rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8))
            picture += np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC), float) * (scale**-0.5)
        picture = (255 * picture / picture.max()).astype(np.uint8)
        path = folder / f"class{index % 2}" / f"{index:05}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path, quality=85)


def _images(folder: Path, form: str, device: str, batch_size: int, workers: int, crop: int) -> Any:
    """Build the data module of a pre-training on these images."""
    from omegaconf import OmegaConf

    from solo_ext.config import check_data
    from solo_ext.data import pretrain_images
    from solo_ext.transforms import complete_views

    view = {
        "rrc": {"enabled": True, "crop_min_scale": 0.08, "crop_max_scale": 1.0},
        "color_jitter": {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
        **{"grayscale": {"prob": 0.2}, "gaussian_blur": {"prob": 0.5}, "horizontal_flip": {"prob": 0.5}},
        **{"crop_size": crop, "num_crops": 2},
    }
    paths = {"train_path": str(folder), "val_path": None, "no_labels": False, "fraction": -1}
    cfg = OmegaConf.create(
        {
            "data": {"dataset": "custom", "format": form, "num_workers": workers, **paths},
            **{"dali": {"device": device}, "accelerator": "auto", "devices": 1, "seed": 0},
            **{"optimizer": {"batch_size": batch_size}, "augmentations": complete_views([view])},
            "debug_augmentations": False,
        }
    )
    check_data(cfg)
    return pretrain_images(cfg)


def _speed(loader: Any, epoch: int, batches: int) -> float:
    """Return the images per second over ``batches`` batches, or the rest of the epoch, after a first batch."""
    loader.sampler.set_epoch(epoch)
    source = iter(loader)
    next(source)
    began, count = time.perf_counter(), 0
    for _, views, _ in source:
        count += len(views[0])
        batches -= 1
        if batches == 0:
            break
    if views[0].is_cuda:
        torch.cuda.synchronize()
    return count / (time.perf_counter() - began)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench data``."""
    add = parser.add_argument
    add("--images", type=Path, help=f"folder of class folders (default: {SYNTHETIC} synthetic JPEGs of 256 px)")
    add("--device", choices=("cpu", "gpu"), default="cpu", help="device of DALI (default: %(default)s)")
    add("--batch-size", type=integer_from(1), default=64, help="images per batch (default: %(default)s)")
    add("--workers", type=integer_from(1), default=2, help="loader processes, DALI threads (default: %(default)s)")
    add("--crop", type=integer_from(1), default=224, help="side of the two views in pixels (default: %(default)s)")
    add("--batches", type=integer_from(1), default=8, help="timed batches per round (default: %(default)s)")
    add("--rounds", type=integer_from(1), default=3, help="number of rounds (default: %(default)s)")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the benchmark and print the table.

    Returns:
        The environment, and a list with the result.

    Raises:
        SystemExit: with status 2, after a one-line error, if the images or DALI are missing.
    """
    from solo_ext.launch import hide_warnings

    hide_warnings()
    with exit_on_user_error():
        result = bench_data(
            options.images,
            device=options.device,
            batch_size=options.batch_size,
            workers=options.workers,
            crop=options.crop,
            batches=options.batches,
            rounds=options.rounds,
        )
    print("| images | crop | batch | workers | DALI on | loader, images/s | DALI, images/s | times faster |")
    print("|-------:|-----:|------:|--------:|---------|-----------------:|---------------:|-------------:|")
    print(
        f"| {result.images} | {result.crop} | {result.batch_size} | {result.workers} | {result.device} "
        f"| {result.loader:.0f} | {result.dali:.0f} | {result.ratio:.2f} |"
    )
    return {"torch": torch.__version__}, [result._asdict()]
