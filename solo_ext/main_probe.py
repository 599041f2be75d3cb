"""Linear and MLP probes of a checkpoint's features: ``python -m solo_ext.main_probe``.

The features of all images are computed once. Which probes are fitted to them says a YAML file, such as
configs/solo/tinyimagenet/probe.yaml.
"""

import argparse
from pathlib import Path
from typing import Any

from plugins.tools.command import Parser, UserError, exit_on_user_error
from solo_ext.main_knn import add_arguments, number

_FILE = {"probes": list, "hidden_dim": int, "holdout": float, "batch_size": int, "lr": float, "epochs": int}
_PROBE = {"kind": str, "fraction": float, "weight_decay": list, "epochs": int}
_KINDS = {list: "a list", int: "a whole number", float: "a number", str: "a word"}


def parser() -> argparse.ArgumentParser:
    """The command line: that of main_knn without its neighbours, and what is fitted and how it is chosen."""
    found = Parser(
        prog="python -m solo_ext.main_probe",
        description="Accuracy of linear and MLP probes on the frozen features of a pre-trained backbone.",
    )
    add_arguments(found)
    add = found.add_argument
    add("--config", type=Path, required=True, help="YAML file: configs/solo/tinyimagenet/probe.yaml, or one like it")
    held = "what a weight decay is chosen on: a held-out part of the training labels, or, as published, the test images"
    add("--select", choices=["validation", "test"], default="validation", help=held)
    add("--seed", type=number(int, zero=True), default=0, help="of the labels that are drawn and of each fit")
    add("--output", type=Path, help="write the accuracies to this JSON file too")
    return found


def read_probes(path: Path) -> list[Any]:
    """The probes of a YAML file.

    Args:
        path: of the file; its ``lr`` is multiplied by ``batch_size`` / 256. A probe can have ``epochs`` of its own.

    Returns:
        A :class:`plugins.tools.probe.Probe` for each.

    Raises:
        UserError: the file is missing, or an entry is missing, unknown, of another kind or out of its range.
    """
    import yaml
    from omegaconf import OmegaConf

    from plugins.tools.probe import Probe

    if not path.is_file():
        raise UserError(f"--config is no file: {path}")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML file: {' '.join(str(error).split())}") from None
    shared = _entries(content, _FILE, str(path))
    probes = shared.pop("probes")
    if not probes:
        raise UserError(f"{path}: probes must name at least one")
    shared["lr"] *= shared["batch_size"] / 256
    found = []
    for index, given in enumerate(probes):
        place = f"{path}: probes[{index}]"
        own = {"epochs": shared["epochs"], **given} if isinstance(given, dict) else given
        own = _entries(own, _PROBE, place)
        if not all(_is(value, float) for value in own["weight_decay"]):
            raise UserError(f"{place}.weight_decay must be a list of numbers, got {own['weight_decay']!r}")
        probe = Probe(**{**shared, **own, "weight_decay": tuple(own["weight_decay"])})
        try:
            probe.check()
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        found.append(probe)
    return found


def _entries(given: Any, kinds: dict[str, type], place: str) -> dict[str, Any]:
    if not isinstance(given, dict) or set(given) != set(kinds):
        have = ", ".join(map(str, given)) if isinstance(given, dict) else repr(given)
        raise UserError(f"{place} must have the entries {', '.join(kinds)}, got {have}")
    for key, kind in kinds.items():
        if not _is(given[key], kind):
            raise UserError(f"{place}: {key} must be {_KINDS[kind]}, got {given[key]!r}")
    return dict(given)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Fit every probe of the file.

    Returns:
        What :func:`plugins.tools.probe.evaluate_probe` returns, for each.

    Raises:
        UserError: a path, a checkpoint or an entry of the file is wrong.
    """
    probes = read_probes(args.config)

    from plugins.tools.probe import evaluate_probe
    from plugins.tools.records import write_json
    from solo_ext.features import collect, extractor, open_evaluation

    run, device, images = open_evaluation(args, "probes learn labels")
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
        how = "" if row["select"] == "nothing" else f", chosen on the {row['select']} images"
        print(
            f"{row['kind']} probe, {row['labels']} labels: acc@1 {row['acc1']:.2f} %  acc@5 {row['acc5']:.2f} %  "
            f"(weight decay {row['weight_decay']:g}{how})",
            flush=True,
        )
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
