"""Measure the quality of features without labels, without any framework: ``python -m plugins.tools.quality``.

The features are those of a .npy, .npz or .pt file, of a folder of VISSL's ``extract_features``, or of a trained
backbone on images::

    python -m plugins.tools.quality features.npy
    python -m plugins.tools.quality features/d8192 --split test
    python -m plugins.tools.quality trained_models/ssl_ey/first --data datasets/imagenet/train --views 10
"""

import argparse
import json
import math
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plugins.metrics import Quality
from plugins.metrics.monitor import QualityValues
from plugins.tools.command import Parser, UserError, exit_on_user_error, integer_from, positive_number


class Channels(NamedTuple):
    """Normalisation of red, green and blue, which should be that of the training; by default ImageNet's."""

    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    """Above 0."""


class Augmentation(NamedTuple):
    """Augmentation of the views, which should be that of the training."""

    min_scale: float = 0.2
    """Least area of the crops, in (0, 1]."""
    jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1)
    """Strength of the colour jitter: brightness, contrast, saturation and hue."""
    jitter_prob: float = 0.8
    gray_prob: float = 0.2
    flip_prob: float = 0.5


def parser() -> argparse.ArgumentParser:
    """Return the argument parser of the command."""
    found = Parser(
        prog="python -m plugins.tools.quality",
        description="Print RankMe, α-ReQ, LiDAR and other metrics of features, which need no labels.",
    )
    add = found.add_argument
    source = "a .npy, .npz or .pt file [N, D] or [views, N, D], a folder of features, a checkpoint, or a run's folder"
    add("sources", type=Path, nargs="+", metavar="SOURCE", help=source)
    add("--split", choices=["train", "test"], default="train", help="of a folder of features (default: train)")
    add("--layer", metavar="NAME", help="of a folder of features, if it has several")
    add("--data", type=Path, metavar="FOLDER", help="images for a checkpoint, one folder per class")
    add("--arch", metavar="NAME", help="network of a checkpoint (default: the ResNet that fits)")
    add("--size", type=positive_number(int), default=224, help="side of the images in pixels (default: 224)")
    rgb, imagenet = ("RED", "GREEN", "BLUE"), Channels()
    add("--mean", type=float, nargs=3, default=imagenet.mean, metavar=rgb, help="of the channels (default: ImageNet's)")
    positive = positive_number(float)
    add(
        "--std", type=positive, nargs=3, default=imagenet.std, metavar=rgb, help="of the channels (default: ImageNet's)"
    )
    add("--views", type=integer_from(0), default=0, help="augmented views for LiDAR and alignment (default: 0, none)")
    add("--images", type=integer_from(2), default=1000, help="images with such views, drawn at random (default: 1000)")
    usual = Augmentation()
    add("--min-scale", type=_share, default=usual.min_scale, help="least area of their crops (default: 0.2)")
    names = ("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE")
    add("--jitter", type=_share, nargs=4, default=usual.jitter, metavar=names, help="(default: 0.4 0.4 0.4 0.1)")
    add("--jitter-prob", type=_share, default=usual.jitter_prob, help="probability of the jitter (default: 0.8)")
    add("--gray-prob", type=_share, default=usual.gray_prob, help="probability of a grey view (default: 0.2)")
    add("--flip-prob", type=_share, default=usual.flip_prob, help="probability of a flip (default: 0.5)")
    add("--seed", type=integer_from(0), default=0, help="seed of images and augmentations (default: 0)")
    add("--batch-size", type=positive_number(int), default=256, help="images in a batch (default: 256)")
    add("--num-workers", type=integer_from(0), default=0, help="workers of the data loader (default: 0)")
    add("--device", help="cpu, cuda, ... (default: a GPU if one is available)")
    add("--json", action="store_true", help="print JSON instead of a table")
    return found


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text}")
    return value


def of_features(views: Tensor, device: torch.device | None = None) -> QualityValues:
    """Compute the metrics of features, ``[N, D]`` or ``[V, N, D]``."""
    quality = Quality()
    views = views if views.ndim == 3 else views[None]
    for start in range(0, views.shape[1], 4096):
        quality.update([*views[:, start : start + 4096].to(device)])
    return quality.values()


def read_file(path: Path) -> Tensor | None:
    """Read the features of a .npy, .npz or .pt file, ``[N, D]`` or ``[V, N, D]``.

    Args:
        path: the file. A .npz file has one array, or one of the name ``features``. A .pt file has a tensor, or a
            dictionary with the tensor ``features``.

    Returns:
        The features in single precision; None if it is a file of another kind, such as a checkpoint.

    Raises:
        UserError: the file is unreadable, or its features are invalid.
    """
    import numpy as np

    if path.suffix == ".pt":
        from plugins.tools.unpickle import read_without_code

        content = read_without_code(path)[0]
        found = content.get("features") if isinstance(content, dict) else content
        if not isinstance(found, Tensor):
            return None
    elif path.suffix in (".npy", ".npz"):
        try:
            content = np.load(path, allow_pickle=False)
            found = _only_array(path, dict(content)) if path.suffix == ".npz" else content
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is not a readable {path.suffix} file: {str(error).splitlines()[0]}") from None
        if isinstance(found, np.ndarray) and np.issubdtype(found.dtype, np.floating):
            found = torch.from_numpy(found.astype(np.float32, copy=False))
    else:
        return None
    shape = list(getattr(found, "shape", ()))
    if not isinstance(found, Tensor) or not found.is_floating_point() or len(shape) not in (2, 3) or 0 in shape:
        kind = getattr(found, "dtype", type(found).__name__)
        raise UserError(f"{path} must hold floating-point numbers [N, D] or [views, N, D], got {kind} {shape}")
    if not bool(found.isfinite().all()):
        raise UserError(f"{path} holds numbers that are not finite; remove these rows")
    return found.float()


def _only_array(path: Path, arrays: Mapping[str, Any]) -> Any:
    if "features" not in arrays and len(arrays) != 1:
        raise UserError(f"{path} must have an array with the name features, got {', '.join(arrays) or 'no array'}")
    return arrays.get("features", next(iter(arrays.values())))


def plain_transform(size: int, channels: Channels) -> Callable[[Any], Tensor]:
    """Return the transform of evaluation: a centre crop."""
    from torchvision import transforms as T

    resize = T.Resize(size if size <= 64 else size * 256 // 224)
    return T.Compose([resize, T.CenterCrop(size), T.ToTensor(), T.Normalize(*channels)])


def views_transform(size: int, how: Augmentation, channels: Channels) -> Callable[[Any], Tensor]:
    """Return the transform of the views: crop, flip, colour jitter and grey."""
    from torchvision import transforms as T

    crop = T.RandomResizedCrop(size, scale=(how.min_scale, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    jitter = T.RandomApply([T.ColorJitter(*how.jitter)], how.jitter_prob)
    steps = [crop, T.RandomHorizontalFlip(how.flip_prob), jitter, T.RandomGrayscale(how.gray_prob)]
    return T.Compose([*steps, T.ToTensor(), T.Normalize(*channels)])


def image_sets(
    data: Path,
    *,
    size: int = 224,
    views: int = 0,
    images: int = 1000,
    how: Augmentation | None = None,
    channels: Channels | None = None,
) -> list[Any]:
    """Open the images of a folder without augmentation, and some of them once for each augmented view.

    Args:
        data: images, one folder per class.
        size: side of the images in pixels.
        views: number of augmented views.
        images: number of images that have them, drawn with torch's generator.
        how: their augmentation.
        channels: normalisation of all images.

    Raises:
        UserError: the folder is missing or has no images.
    """
    from plugins.tools.folders import ImageFolder
    from plugins.tools.images import open_image

    if not data.is_dir():
        raise UserError(f"there is no folder {data}")
    channels = channels or Channels()
    augment = views_transform(size, how or Augmentation(), channels)
    try:
        whole = ImageFolder(str(data), plain_transform(size, channels), loader=open_image)
        augmented = ImageFolder(str(data), augment, loader=open_image)
    except FileNotFoundError as error:
        raise UserError(f"{data} must hold a folder of images for each class: {error}") from None
    chosen = torch.randperm(len(whole))[:images].sort().values.tolist()
    return [whole, *[torch.utils.data.Subset(augmented, chosen)] * views]


@torch.no_grad()
def of_network(
    model: nn.Module, images: Sequence[Any], device: torch.device, *, batch: int = 256, workers: int = 0
) -> tuple[QualityValues, Tensor, Tensor]:
    """Compute the metrics of a backbone's features.

    LiDAR and alignment are those of the augmented views, the other metrics those of the images without augmentation.

    Args:
        model: images ``[B, 3, size, size]`` → features ``[B, D]``, in evaluation mode.
        images: data sets of (image, class) as of :func:`image_sets`; with fewer than two views there are no LiDAR and
            alignment.
        device: device of the computation.
        batch: number of images in a batch.
        workers: number of workers of the data loader.

    Returns:
        The metrics, the features without augmentation ``[N, D]`` and the classes ``[N]``, on the CPU.

    Raises:
        UserError: an image cannot be read.
    """
    from plugins.tools.extract import extract

    titles = ["images", *(f"view {view} of {len(images) - 1}" for view in range(1, len(images)))]
    sides = [
        extract(model, part, device, batch=batch, workers=workers, title=title)
        for part, title in zip(images, titles, strict=True)
    ]
    rows = [features.flatten(1) for features, _ in sides]
    values = of_features(rows[0], device)
    if len(rows) > 2:
        of_views = of_features(torch.stack(rows[1:]), device)
        values = values._replace(lidar=of_views.lidar, alignment=of_views.alignment)
    return values, rows[0], sides[0][1]


def measure(source: Path, args: argparse.Namespace) -> QualityValues:
    """Compute the metrics of one source of the command line.

    Raises:
        UserError: the source is missing or invalid, or ``--data`` is missing.
    """
    from plugins.tools.features import load_features, usable_device

    device = usable_device(args.device)
    if not source.exists():
        raise UserError(f"there is no file or folder {source}")
    if source.is_file() and (features := read_file(source)) is not None:
        return of_features(features, device)
    if source.is_dir() and any(source.glob("rank*_chunk*_inds.npy")):
        return of_features(load_features(source, args.split, args.layer)[0], device)
    if args.data is None:
        raise UserError(f"{source} is no file of features; a checkpoint needs images: --data FOLDER")
    from plugins.tools.hub import load_weights

    model = load_weights(source, args.arch)
    torch.manual_seed(args.seed)
    how = Augmentation(args.min_scale, args.jitter, args.jitter_prob, args.gray_prob, args.flip_prob)
    channels = Channels(args.mean, args.std)
    images = image_sets(args.data, size=args.size, views=args.views, images=args.images, how=how, channels=channels)
    return of_network(model, images, device, batch=args.batch_size, workers=args.num_workers)[0]


def table(results: dict[str, dict[str, float | None]]) -> str:
    """Return a table with a line for each source."""
    names = list(next(iter(results.values())))
    rows = [["source", *names]]
    rows += [
        [source, *("–" if v is None else f"{v:.4g}" for v in values.values())] for source, values in results.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    with exit_on_user_error():
        args = parser().parse_args(argv)
        if args.views == 1:
            raise UserError("--views must be 0 or at least 2, got 1")
        if args.min_scale == 0 or args.jitter[3] > 0.5:
            raise UserError("--min-scale must be above 0, and the hue of --jitter at most 0.5")
        results: dict[str, dict[str, float | None]] = {}
        for source in args.sources:
            try:
                values = {name: value.item() for name, value in measure(source, args)._asdict().items()}
            except ValueError as error:
                raise UserError(f"{source}: {error}") from None
            results[str(source)] = {name: value if math.isfinite(value) else None for name, value in values.items()}
        print(json.dumps(results, indent=1) if args.json else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
