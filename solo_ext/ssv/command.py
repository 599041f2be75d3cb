"""The command line of Self-Supervised-Vision's main.py."""

import os
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from plugins.tools.command import Parser, UserError, did_you_mean, first_process, print_on_rank_zero
from plugins.tools.shipped import shipped_configs
from solo_ext.ssv.arguments import Arguments
from solo_ext.ssv.grammar import ALGORITHMS, ARCHS, check

__all__ = ["TASKS", "Arguments", "change_entries", "main", "parser", "read_document", "run"]

PACKAGED = shipped_configs("ssv")
"""Folder of our own YAML files."""
_OUTPUT = "SOLO_EXT_SSV_OUTPUT"
"""Environment variable with the name of the folder, for the processes that a run starts."""


def _train(arguments: Arguments) -> None:
    from solo_ext.ssv.train import train

    train(arguments)


def _linear_eval(arguments: Arguments) -> None:
    from solo_ext.ssv.evaluate import linear_eval

    linear_eval(arguments)


def _get_features(arguments: Arguments) -> None:
    from solo_ext.ssv.evaluate import get_features

    get_features(arguments)


TASKS: dict[str, Callable[[Arguments], None]] = {
    "train": _train,
    "linear_eval": _linear_eval,
    "get_features": _get_features,
}
"""The tasks by name."""


def parser() -> Parser:
    """Return the parser of the command line."""
    made = Parser(
        "python -m solo_ext.ssv",
        description="Train and evaluate with the YAML files of Self-Supervised-Vision.",
        epilog="example: python -m solo_ext.ssv --config configs/byol.yaml --algo byol --arch resnet18 --task train",
    )
    add = made.add_argument
    add("-c", "--config", required=True, type=Path, help="YAML file; if configs/ALGO.yaml is missing, ours is used")
    add("-m", "--arch", required=True, choices=ARCHS, help="network")
    add("-a", "--algo", required=True, choices=list(ALGORITHMS), help="algorithm")
    add("-t", "--task", required=True, choices=list(TASKS), help="what to do")
    add("-o", "--output", default=None, help="name of the run's folder, in outputs/ALGO/ARCH; default: the time")
    add("-l", "--load", default=None, type=Path, help="folder of the trained network")
    add("--devices", default=1, type=int, help="devices that share a batch; default: 1")
    add("--wandb", action="store_true", help="log to Weights & Biases, in the project that the file names")
    add("entries", nargs="*", metavar="key=value", help="entries of the file to change, such as epochs=10")
    return made


def read_document(path: Path, algo: str) -> dict[str, Any]:
    """Read a YAML file; one of ours takes the place of a missing ``configs/<algo>.yaml``.

    Args:
        path: the file.
        algo: the algorithm.

    Raises:
        UserError: there is no such file, or it is not a YAML file with entries.
    """
    from solo_ext.launch import check_file

    if not path.is_file():
        relative = path.parts[1:] if path.parts[:1] == ("configs",) else ()
        relative = relative[1:] if relative[:1] == ("ssv",) else relative
        ours = PACKAGED.joinpath(*relative) if relative else PACKAGED
        if not ours.is_file():
            files = sorted(file.name for file in PACKAGED.glob("*.yaml"))
            near = did_you_mean(path.name, files)
            raise UserError(f"--config is not a file: {path}; ours are configs/{{{','.join(files)}}}{near}")
        print_on_rank_zero(f"{path} does not exist: using {ours}")
        path = ours
    check_file(path)
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def change_entries(document: dict[str, Any], entries: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a document with other values of some entries.

    Args:
        document: the content of a YAML file.
        entries: each ``key=value``, where the parts of a key are joined by dots.

    Raises:
        UserError: an argument has no ``=``, or its value is not YAML.

    >>> change_entries({"data": {"root": "a", "batch_size": 2}}, ["data.root=b", "epochs=3"])
    {'data': {'root': 'b', 'batch_size': 2}, 'epochs': 3}
    """
    changed: dict[str, Any] = dict(document)
    for entry in entries:
        key, sign, text = entry.partition("=")
        if not sign or not key:
            raise UserError(f"{entry!r} is not key=value; see --help")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"the value of {entry!r} is not valid YAML") from None
        *above, last = key.split(".")
        section = changed
        for name in above:
            inner = section.get(name)
            section[name] = dict(inner) if isinstance(inner, dict) else {}
            section = section[name]
        section[last] = value
    return changed


def _output(given: str | None) -> str:
    """Return the name of the run's folder, the same in the processes that the run starts."""
    if given is None and not first_process() and _OUTPUT in os.environ:
        return os.environ[_OUTPUT]
    os.environ[_OUTPUT] = given or datetime.now().strftime("%d-%m-%Y_%H-%M")
    return os.environ[_OUTPUT]


def run(argv: Sequence[str] | None = None) -> None:
    """Parse a command line and do its task.

    Raises:
        UserError: an argument, the file or the data is invalid.
    """
    given = parser().parse_args(argv)
    if given.devices < 1:
        raise UserError(f"--devices must be a number above 0, got {given.devices}")
    if given.task != "train" and given.load is None:
        raise UserError(f"--task {given.task} needs a trained network: give its folder with --load")
    document = check(change_entries(read_document(given.config, given.algo), given.entries), given.algo)
    arguments = Arguments(
        document, given.algo, given.arch, _output(given.output), given.load, given.devices, given.wandb
    )
    TASKS[given.task](arguments)


def main() -> None:
    """Run the command."""
    from plugins.tools.command import exit_on_user_error
    from plugins.tools.process import end_with_first_process, exit_when_stopped
    from solo_ext.launch import hide_warnings

    end_with_first_process()
    hide_warnings()
    with exit_on_user_error(), exit_when_stopped("run the command again"):
        run()
