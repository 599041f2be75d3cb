"""Evaluate features with probes, without any framework: ``python -m plugins.tools.linear_eval``.

The features come from two pairs of .npy files, from a folder of VISSL's ``extract_features``, or from images and a
DISSL model (published weights or a file in their format)::

    python -m plugins.tools.linear_eval --train X.npy Y.npy --test X_TEST.npy Y_TEST.npy
    python -m plugins.tools.linear_eval --features FOLDER --config dissl_transfer
    python -m plugins.tools.linear_eval --weights dissl_resnet50_d8192_e400_m6 \\
        --train-dir datasets/imagenet/train --val-dir datasets/imagenet/val --save features/d8192
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from plugins.install import not_installed
from plugins.tools.command import Parser, UserError, exit_on_user_error, positive_number

_OF_WEIGHTS = ("train_dir", "val_dir", "save", "batch_size", "num_workers")


def parser() -> argparse.ArgumentParser:
    """Return the argument parser of the command."""
    found = Parser(
        prog="python -m plugins.tools.linear_eval",
        description="Fit probes to precomputed features and print their accuracies. No framework is needed.",
    )
    source = found.add_argument_group("features (give one of --train, --features and --weights)")
    add = source.add_argument
    files = ("X.npy", "Y.npy")
    add("--train", type=Path, nargs=2, metavar=files, help="training features [N, D] and classes [N]")
    add("--test", type=Path, nargs=2, metavar=files, help="with --train: test features and classes")
    add("--features", type=Path, metavar="FOLDER", help="output folder of VISSL's extract_features or of --save")
    add("--layer", metavar="NAME", help="with --features: the layer, if the folder has several")
    add("--weights", metavar="NAME|FILE", help="a DISSL model: its name or a file (plugins.tools.export --to dissl)")
    add("--train-dir", type=Path, metavar="FOLDER", help="with --weights: training images, one folder per class")
    add("--val-dir", type=Path, metavar="FOLDER", help="with --weights: test images, one folder per class")
    add("--save", type=Path, metavar="FOLDER", help="with --weights: save the features here, for --features")
    add("--batch-size", type=positive_number(int), help="with --weights: batch size (default: 128)")
    add("--num-workers", type=positive_number(int, zero=True), help="with --weights: data loader workers (default: 2)")
    add = found.add_argument
    shipped = "dissl_linear (default), dissl_transfer, or a YAML file such as configs/probes/dissl_linear.yaml"
    add("--config", type=Path, default=Path("dissl_linear"), help=f"the probes to fit: {shipped}")
    held = "images for the choice of a setting: held-out training images or, as published, the test images"
    add("--select", choices=["validation", "test"], default="validation", help=held)
    add("--seed", type=positive_number(int, zero=True), default=0, help="seed of the drawn labels and of each fit")
    add("--device", help="cpu, cuda, ... (default: a GPU if one is available)")
    add("--output", type=Path, help="also write the accuracies to this JSON file")
    return found


def _check(args: argparse.Namespace) -> None:
    """Raise a UserError if options are missing or exclude each other."""
    sources = {"--train": args.train, "--features": args.features, "--weights": args.weights}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise UserError(f"give one of {', '.join(sources)}, got {' and '.join(given) or 'none'}; see --help")
    of = {"test": "--train", "layer": "--features", **dict.fromkeys(_OF_WEIGHTS, "--weights")}
    for name, owner in of.items():
        if getattr(args, name) is not None and owner not in given:
            raise UserError(f"--{name.replace('_', '-')} goes with {owner}, not with {given[0]}")
    needed = {"--train": ("test",), "--features": (), "--weights": ("train_dir", "val_dir")}[given[0]]
    for name in needed:
        if getattr(args, name) is None:
            raise UserError(f"{given[0]} needs --{name.replace('_', '-')}")
    for path in (args.output, args.save):
        if path is not None and path.exists() and path.is_dir() == (path is args.output):
            raise UserError(f"{path} is a {'folder' if path.is_dir() else 'file'}")
    if args.save is not None and args.save.is_dir() and any(args.save.iterdir()):
        raise UserError(
            f"--save {args.save} is not empty; give another folder, or --features {args.save} to evaluate it"
        )


def read_sides(args: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Return features and classes of the training and of the test images, on the CPU.

    Raises:
        UserError: a file, a folder or the weights are missing or invalid.
    """
    from plugins.tools.features import load_arrays, load_features, save_features, usable_device

    if args.train is not None:
        sides = [load_arrays(*args.train), load_arrays(*args.test)]
    elif args.features is not None:
        sides = [load_features(args.features, split, args.layer) for split in ("train", "test")]
    else:
        from plugins.tools.extract import extract, open_folders
        from plugins.tools.weights import load_dissl

        device = usable_device(args.device)
        images = open_folders(args.train_dir, args.val_dir)
        model = load_dissl(args.weights)
        options = {"batch": args.batch_size or 128, "workers": 2 if args.num_workers is None else args.num_workers}
        splits = ("train", "test")
        sides = [
            extract(model, part, device, **options, title=split) for split, part in zip(splits, images, strict=True)
        ]
        if args.save is not None:
            for split, side in zip(splits, sides, strict=True):
                save_features(args.save, split, "backbone", *side)
    widths = [features.shape[1] for features, _ in sides]
    if widths[0] != widths[1]:
        raise UserError(f"the training features have {widths[0]} dimensions, the test features {widths[1]}")
    return sides


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return a table with one line per setting: accuracies in per cent, and a star after the chosen setting."""
    from plugins.tools.probe import describe

    lines = [f"{'probe':<9} {'setting':<52} {'top-1':>7} {'top-5':>7} {'held-out top-1':>15}"]
    for result in results:
        for row in result["grid"]:
            held = "–" if row["validation_acc1"] is None else f"{row['validation_acc1']:.2f}"
            star = " *" if all(result[key] == row[key] for key in row if key != "validation_acc1") else ""
            numbers = f"{row['acc1']:>7.2f} {row['acc5']:>7.2f} {held:>15}{star}"
            lines.append(f"{result['kind']:<9} {describe(row):<52} {numbers}")
    return "\n".join(lines)


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Fit every probe of the file and print a table.

    Returns:
        The result of :func:`plugins.tools.probe.evaluate_probe` for each probe.

    Raises:
        UserError: an option, a path, the weights or an entry of the file is invalid, or a package is missing.
    """
    _check(args)
    try:
        from tqdm import tqdm

        from plugins.tools.features import usable_device
        from plugins.tools.probe import evaluate_probe
        from plugins.tools.probe_file import read_probes
        from plugins.tools.records import write_json

        probes, device = read_probes(args.config), usable_device(args.device)
        train, test = ((features.to(device), labels.to(device)) for features, labels in read_sides(args))
        results = []
        for probe in probes:
            bar = lambda settings, kind=probe.kind: tqdm(settings, desc=kind, disable=None)  # noqa: E731
            try:
                results.append(evaluate_probe(train, test, probe, select=args.select, seed=args.seed, track=bar))
            except ValueError as error:
                raise UserError(f"{args.config}: {error}") from None
    except ModuleNotFoundError as error:
        raise UserError(not_installed(error.name or "")) from None
    print(table(results))
    for row in results:
        how = "" if row["select"] is None else f", chosen on the {row['select']} images (*)"
        print(f"{row['kind']} probe, {row['labels']} labels: top-1 {row['acc1']:.2f} %  top-5 {row['acc5']:.2f} %{how}")
    if args.output is not None:
        write_json(args.output, results)
    return results


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    with exit_on_user_error():
        evaluate(parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
