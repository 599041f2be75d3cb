"""Definitions of a run and of a suite of experiments.

A suite is a list of runs. A run is one method in one framework with one seed: a sequence of commands (pre-training,
kNN, linear evaluation), each in a separate process, and a function that collects the numbers that they write.

The suites contain no hyperparameters: those are in the YAML files that the commands name. This package imports only the
standard library, so that the command line can be checked before the environment exists.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Request:
    """Options of the command line that change the runs.

    Args:
        out: folder of all results.
        seeds: each method runs once with each seed.
        epochs: number of pre-training epochs; None uses the value of the YAML file.
        devices: number of GPUs of each pre-training; None uses the value of the YAML file.
        data: names of the data sets to run on; None selects all data sets of the suite.
        data_folder: folder of the data sets, one subfolder each.
        elsewhere: whether the runs are executed on other machines than the preparation.
    """

    out: Path = Path("results")
    seeds: Sequence[int] = (0,)
    epochs: int | None = None
    devices: int | None = None
    data: Sequence[str] | None = None
    data_folder: Path = Path("datasets")
    elsewhere: bool = False


@dataclass(frozen=True)
class Step:
    """One command of a run: a name for the log and the arguments of ``python``."""

    name: str
    arguments: tuple[str, ...]


class Progress(NamedTuple):
    """State of a pre-training: finished epochs, total epochs, and the latest mean loss and online accuracy or None.

    The accuracy is that of the online classifier on the validation images, in per cent.
    """

    epoch: int
    epochs: int
    loss: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Run:
    """One method in one framework on one data set with one seed.

    Args:
        framework, method, dataset, seed: identity of the run, written to result.json.
        folder: folder of all its output.
        steps: its commands, in order.
        collect: reads the numbers that the commands wrote and returns name → value for result.json.
        needs: names of the runs that must be finished before this one starts.
        epochs: number of epochs given on the command line; None uses the value of the YAML file.
        label: name of the run within the suite, if the method alone is not unique.
        progress: folder → state of the pre-training; None if it is not known yet.
        gpus: number of GPUs that its training uses.
    """

    framework: str
    method: str
    dataset: str
    seed: int
    folder: Path
    steps: tuple[Step, ...]
    collect: Callable[["Run"], dict[str, Any]]
    needs: tuple[str, ...] = ()
    epochs: int | None = None
    label: str | None = None
    progress: Callable[[Path], Progress | None] = lambda folder: None
    gpus: int = 0

    @property
    def name(self) -> str:
        """Name of the run in lists, logs and patterns."""
        return f"{self.framework}/{self.label or self.method}/seed{self.seed}"

    @property
    def result(self) -> Path:
        """File that is written when the run is finished."""
        return self.folder / "result.json"

    @property
    def log(self) -> Path:
        """File that receives the output of its commands."""
        return self.folder / "log.txt"


def no_preparation(runs: Sequence[Run], request: Request) -> list[tuple[str, ...]]:
    """Return no commands: the preparation of a suite that needs none."""
    return []


@dataclass(frozen=True)
class Suite:
    """Runs that are compared with each other.

    Args:
        title: one line for ``--help``.
        folder: name of the folder of results.
        frameworks: framework → function that lists its runs.
        sample: (framework, method) pairs that run by default, in the order in which they start; None runs everything.
            Options such as ``--all``, ``--framework`` or ``--only`` select from all runs instead.
        options: the options that the suite accepts, of seeds, epochs, devices and data.
        datasets: allowed values of ``--data``.
        prepare: (runs to do, request) → arguments of the ``python`` commands to execute before all runs.
        report: arguments of the ``python`` command to execute after all runs; the folder of results is appended.
        jobs: default number of concurrent runs; None is one per core.
    """

    title: str
    folder: str
    frameworks: Mapping[str, Callable[[Request], list[Run]]]
    sample: Sequence[tuple[str, str]] | None = None
    options: tuple[str, ...] = ("seeds", "epochs")
    datasets: tuple[str, ...] = ()
    prepare: Callable[[Sequence[Run], Request], list[tuple[str, ...]]] = no_preparation
    report: tuple[str, ...] = ("-m", "plugins.experiments.report")
    jobs: Callable[[Request], int | None] = lambda request: None
