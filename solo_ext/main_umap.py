"""Draw the features of a checkpoint with UMAP: ``python -m solo_ext.main_umap``. The options are solo-learn's."""

import argparse
import time
from pathlib import Path

from plugins.tools.command import Parser, UserError, exit_on_user_error, positive_number
from solo_ext.main_knn import add_arguments


def parser() -> argparse.ArgumentParser:
    """Build the command line: solo-learn's options, and those of the output and of UMAP."""
    found = Parser(
        prog="python -m solo_ext.main_umap",
        description="Draws the features of a pre-trained backbone in two dimensions, coloured by class, to the files "
        "train_umap and val_umap, each as PDF, PNG and CSV. Points of images without class folders are grey.",
    )
    add_arguments(found)
    add = found.add_argument
    add("--output", type=Path, help="output folder; default: umap in the run's folder")
    add(
        "--seed",
        type=positive_number(int, zero=True),
        default=0,
        help="seed of UMAP and of the random choice of images",
    )
    most = "maximum number of images of each split, chosen at random; 0: all"
    add("--max_images", type=positive_number(int, zero=True), default=20_000, help=most)
    add(
        "--n_neighbors",
        type=positive_number(int),
        default=15,
        help="neighbours of each point: large values show global structure, small values local structure",
    )
    return found


_NAMES = {"train": "training", "val": "validation"}


def draw(args: argparse.Namespace) -> Path:
    """Draw the training images and, if given, the validation images.

    Returns:
        The folder of the pictures.

    Raises:
        UserError: a path or a checkpoint is invalid, or there are too few images.
    """
    from plugins.tools.umap import check_installed, embed, plot, write_points

    check_installed()
    if args.n_neighbors < 2:
        raise UserError(f"--n_neighbors must be at least 2, got {args.n_neighbors}")
    import torch
    from torch.utils.data import Subset

    from solo_ext.features import class_names, collect, extractor, open_images, read_run, usable_device

    folder = Path(args.pretrained_checkpoint_dir)
    run, device = read_run(folder, args.epoch), usable_device(args.device)
    images = open_images(args, run, need_labels=False)
    for split, found in images.items():
        if len(found) <= args.n_neighbors:
            raise UserError(
                f"UMAP needs more than --n_neighbors {args.n_neighbors} {_NAMES[split]} images, got {len(found)}"
            )
    if 0 < args.max_images <= args.n_neighbors:
        raise UserError(f"--max_images must be above --n_neighbors {args.n_neighbors}, got {args.max_images}")
    extract = extractor(run, device, projector=False)
    output = args.output or folder / "umap"
    for split, found in images.items():
        if 0 < args.max_images < len(found):
            rows = torch.randperm(len(found), generator=torch.Generator().manual_seed(args.seed))[: args.max_images]
            print(f"{split}: {args.max_images} of {len(found)} images, chosen at random (--max_images 0 draws all)")
            found = Subset(found, rows.sort().values.tolist())
        features = collect(found, extract, device, batch_size=args.batch_size, workers=args.num_workers, title=split)
        labels, width = features["labels"].tolist(), features["backbone"].shape[1]
        print(f"{split}: UMAP of {len(labels)} features of width {width} ...", end=" ", flush=True)
        began = time.perf_counter()
        points = embed(features["backbone"], neighbours=args.n_neighbors, seed=args.seed)
        print(f"{time.perf_counter() - began:.0f} s", flush=True)
        classes, stem = class_names(found), output / f"{split}_umap"
        title = f"{run.config.get('method') or 'backbone'}, {args.dataset}: {len(labels)} {_NAMES[split]} images"
        plot(points, labels, classes, title, [stem.with_suffix(".pdf"), stem.with_suffix(".png")])
        write_points(points, labels, classes, stem.with_suffix(".csv"))
    print(f"wrote {output}", flush=True)
    return output


def main() -> None:
    """Run the command."""
    from solo_ext.launch import hide_warnings

    hide_warnings()
    with exit_on_user_error():
        draw(parser().parse_args())


if __name__ == "__main__":
    main()
