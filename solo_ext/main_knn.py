"""Evaluate a checkpoint with k-nearest neighbours: ``python -m solo_ext.main_knn``. The options are solo-learn's."""

import argparse
from pathlib import Path
from typing import Any

from plugins.tools.command import Parser, UserError, exit_on_user_error, positive_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of solo-learn that select the run and the images, and ``--device``."""
    add = parser.add_argument
    add("--pretrained_checkpoint_dir", required=True, help="folder of a run, with args.json and a checkpoint")
    add(
        "--epoch",
        type=positive_number(int, zero=True),
        help="N of ep=N in the name of the checkpoint; default: the newest (checkpoint.keep_prev=True keeps all)",
    )
    add("--dataset", required=True, help="cifar10, imagenet, ..., or custom for folders of your own")
    add("--train_data_path", required=True, help="folder of the training images, or the HDF5 file")
    add("--val_data_path", help="the same for validation images; default for CIFAR and STL-10: the training path")
    formats = ["image_folder", "dali", "h5"]
    add(
        "--data_format",
        default=formats[0],
        choices=formats,
        help="reader of the images; dali is the same as image_folder, since there is no augmentation",
    )
    add("--data_fraction", type=float, default=-1.0, help="fraction of the training images to use; -1: all")
    add(
        "--no_labels",
        action="store_true",
        help="custom data: the images have no labels; they are in the folder itself or in subfolders",
    )
    add("--skip_bad_images", action="store_true", help="leave out images that cannot be decoded, and name them")
    add("--mean", type=float, nargs=3, help="custom data: mean of each channel; default: as in pre-training")
    add("--std", type=float, nargs=3, help="custom data: standard deviation; default: as in pre-training")
    add("--batch_size", type=positive_number(int), default=256)
    add("--num_workers", type=positive_number(int, zero=True), default=2, help="number of processes that read images")
    add("--device", help="cpu, cuda, ...; default: a GPU if there is one")


def parser() -> argparse.ArgumentParser:
    """Build the command line: solo-learn's options, ``--device`` and ``--output``."""
    found = Parser(
        prog="python -m solo_ext.main_knn",
        description="Weighted k-nearest-neighbour accuracy of a pre-trained backbone or its projector.",
    )
    add_arguments(found)
    add = found.add_argument
    add("--k", type=positive_number(int), nargs="+", default=[20], help="numbers of neighbours")
    add("--temperature", type=positive_number(float), nargs="+", default=[0.07], help="temperature, for the cosine")
    add("--distance_function", nargs="+", default=["cosine"], choices=["cosine", "euclidean"])
    add("--feature_type", nargs="+", default=["backbone"], choices=["backbone", "projector"])
    add("--output", type=Path, help="JSON file for the accuracies")
    return found


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compute the accuracy for every combination of feature, k, distance and temperature.

    Returns:
        A list of {feature_type, k, distance_function, temperature, acc1, acc5}; accuracies in per cent.

    Raises:
        UserError: an option, a path or a checkpoint is invalid.
    """
    from plugins.tools.records import write_json
    from solo_ext.features import collect, extractor, open_evaluation
    from solo_ext.knn import WeightedKNNClassifier

    run, device, images = open_evaluation(args, "k-nearest neighbours need labels")
    if max(args.k) > len(images["train"]):
        raise UserError(f"--k must not exceed the number of training images, {len(images['train'])}, got {max(args.k)}")
    extract = extractor(run, device, projector="projector" in args.feature_type)
    reading = {"batch_size": args.batch_size, "workers": args.num_workers}
    train = collect(images["train"], extract, device, **reading, title="train")
    val = collect(images["val"], extract, device, **reading, title="val")

    results = []
    for kind in args.feature_type:
        for k in args.k:
            for distance in args.distance_function:
                for temperature in args.temperature if distance == "cosine" else [None]:
                    knn = WeightedKNNClassifier(k=k, T=temperature or 1.0, distance_fx=distance, device=device)
                    knn(train[kind], train["labels"], val[kind], val["labels"])
                    acc1, acc5 = knn.compute()
                    row = {"feature_type": kind, "k": k, "distance_function": distance, "temperature": temperature}
                    results.append({**row, "acc1": acc1, "acc5": acc5})
                    print(f"{kind}  k {k}  {distance}  T {temperature}:  acc@1 {acc1:.2f} %  acc@5 {acc5:.2f} %")
    if args.output is not None:
        write_json(args.output, results)
    return results


def main() -> None:
    """Run the command."""
    from solo_ext.launch import hide_warnings

    hide_warnings()
    with exit_on_user_error():
        evaluate(parser().parse_args())


if __name__ == "__main__":
    main()
