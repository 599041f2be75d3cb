"""Fit probes to the features of a checkpoint: ``python -m solo_ext.main_probe``.

The features of all images are computed once. A YAML file, such as configs/solo/tinyimagenet/probe.yaml, lists the
probes. :mod:`plugins.tools.probe_file` documents its entries.
"""

import argparse
from pathlib import Path
from typing import Any

from plugins.tools.command import Parser, UserError, exit_on_user_error, positive_number
from solo_ext.main_knn import add_arguments


def parser() -> argparse.ArgumentParser:
    """Build the command line: the options of main_knn for the run and the images, and those of the probes."""
    found = Parser(
        prog="python -m solo_ext.main_probe",
        description="Accuracy of linear probes and MLPs on the frozen features of a pre-trained backbone.",
    )
    add_arguments(found)
    add = found.add_argument
    add(
        "--config",
        type=Path,
        required=True,
        help="YAML file of the probes, such as configs/solo/tinyimagenet/probe.yaml",
    )
    held = "data for choosing a setting: a held-out part of the training labels or, as published, the test images"
    add("--select", choices=["validation", "test"], default="validation", help=held)
    add("--seed", type=positive_number(int, zero=True), default=0, help="seed of the drawn labels and of each fit")
    add("--output", type=Path, help="JSON file for the accuracies")
    return found


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Fit every probe of the file.

    Returns:
        For each probe, the result of :func:`plugins.tools.probe.evaluate_probe`.

    Raises:
        UserError: a path, a checkpoint or an entry of the file is invalid.
    """
    from plugins.tools.probe import describe, evaluate_probe
    from plugins.tools.probe_file import read_probes

    probes = read_probes(args.config)

    from plugins.tools.records import write_json
    from solo_ext.features import collect, extractor, open_evaluation

    run, device, images = open_evaluation(args, "probes need labels")
    extract = extractor(run, device, projector=False)
    sides = []
    for split in ("train", "val"):
        options = {"batch_size": args.batch_size, "workers": args.num_workers, "title": split}
        found = collect(images[split], extract, device, **options)
        sides.append((found["backbone"].float().to(device), found["labels"].to(device)))

    results = []
    for probe in probes:
        try:
            row = evaluate_probe(*sides, probe, select=args.select, seed=args.seed)
        except ValueError as error:
            raise UserError(f"{args.config}: {error}") from None
        results.append(row)
        how = "" if row["select"] is None else f", chosen on the {row['select']} images"
        print(
            f"{row['kind']} probe, {row['labels']} labels: acc@1 {row['acc1']:.2f} %  acc@5 {row['acc5']:.2f} %  "
            f"({describe(row)}{how})",
            flush=True,
        )
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
