"""k-nearest-neighbour evaluation of a checkpoint: ``python -m solo_ext.main_knn``, options as solo-learn's."""

import argparse
from pathlib import Path
from typing import Any

from plugins.tools.command import Parser, UserError, exit_on_user_error, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add solo-learn's options that say which run and which images, and ``--device``."""
    add = parser.add_argument
    add("--pretrained_checkpoint_dir", required=True, help="folder of a run: args.json and a checkpoint")
    add("--dataset", required=True, help="cifar10, imagenet, ..., or custom: folders of your own")
    add("--train_data_path", required=True, help="folder of the training images; h5: the file")
    add("--val_data_path", help="folder of the validation images; CIFAR and STL-10: the same unless given")
    formats = ["image_folder", "dali", "h5"]
    add("--data_format", default=formats[0], choices=formats, help="dali reads folders too: nothing is augmented here")
    add("--data_fraction", type=float, default=-1.0, help="part of the training images to use; -1: all")
    add("--no_labels", action="store_true", help="custom data: the images lie in the folder itself")
    add("--mean", type=float, nargs=3, help="custom data: of each channel; as in pre-training unless given")
    add("--std", type=float, nargs=3, help="custom data: of each channel; as in pre-training unless given")
    add("--batch_size", type=number(int), default=256)
    add("--num_workers", type=number(int, zero=True), default=2, help="processes that read images")
    add("--device", help="cpu, cuda, ...; a GPU if there is one")


def parser() -> argparse.ArgumentParser:
    """The command line: solo-learn's options, and ``--device`` and ``--output``."""
    found = Parser(
        prog="python -m solo_ext.main_knn",
        description="Weighted k-nearest-neighbour accuracy of a pre-trained backbone or its projector.",
    )
    add_arguments(found)
    add = found.add_argument
    add("--k", type=number(int), nargs="+", default=[20], help="numbers of neighbours")
    add("--temperature", type=number(float), nargs="+", default=[0.07], help="for the cosine")
    add("--distance_function", nargs="+", default=["cosine"], choices=["cosine", "euclidean"])
    add("--feature_type", nargs="+", default=["backbone"], choices=["backbone", "projector"])
    add("--output", type=Path, help="write the accuracies to this JSON file too")
    return found


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every combination of feature, k, distance and temperature.

    Returns:
        A list of {feature_type, k, distance_function, temperature, acc1, acc5}; accuracies in per cent.

    Raises:
        UserError: a path or a checkpoint is wrong.
    """
    from plugins.tools.records import write_json
    from solo_ext.features import collect, extractor, open_evaluation
    from solo_ext.knn import WeightedKNNClassifier

    run, device, images = open_evaluation(args, "k-nearest neighbours vote with their labels")
    if max(args.k) > len(images["train"]):
        raise UserError(f"--k {max(args.k)} is more than the {len(images['train'])} training images")
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
    """The command."""
    from solo_ext.launch import quieten

    quieten()
    with exit_on_user_error():
        evaluate(parser().parse_args())


if __name__ == "__main__":
    main()
