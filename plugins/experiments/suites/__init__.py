"""Suites of experiments: what a run is, what a suite is, and the table of all suites.

A suite is a list of runs. A run is one method in one framework with one seed: a list of commands that follow each other
in processes of their own (pre-train, kNN, linear evaluation), and the numbers picked from what they write.

Nothing here holds a hyperparameter: those are in the YAML files that the commands name. Nothing here needs more than
the standard library, so that a command line can be checked before the environment is made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Args:
        out: folder of all results.
        seeds: each method runs once with each.
        epochs: of pre-training; None leaves it to the YAML.
        devices: GPUs of each pre-training; None leaves it to the YAML.
        data: data sets to run on; None takes all of the suite.
        data_folder: where data sets are, each under its usual name.
    """

    out: Path = Path("results")
    seeds: Sequence[int] = (0,)
    epochs: int | None = None
    devices: int | None = None
    data: Sequence[str] | None = None
    data_folder: Path = Path("datasets")


@dataclass(frozen=True)
class Step:
    """One command of a run: a name for the log and the arguments of ``python``."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One method in one framework on one data set with one seed.

    Args:
        framework, method, dataset, seed: what it is; they go into result.json.
        folder: where it writes everything.
        steps: its commands, in order.
        collect: reads the numbers that the commands wrote: name → value, for result.json.
        needs: names of the runs that must be finished before it starts.
        epochs: epochs that the user asked for, None where the YAML decides.
        label: its name among the runs of the suite, where the method's alone does not tell it apart.
        progress: folder → finished epochs of the pre-training and epochs in all, None where it is not known yet.
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
    progress: Callable[[Path], tuple[int, int] | None] = lambda folder: None

    @property
    def name(self) -> str:
        """Its name in lists, logs and patterns."""
        return f"{self.framework}/{self.label or self.method}/seed{self.seed}"

    @property
    def result(self) -> Path:
        """The file that says that it is finished."""
        return self.folder / "result.json"

    @property
    def log(self) -> Path:
        """Where the output of its commands goes."""
        return self.folder / "log.txt"


def nothing(runs: Sequence[Run], request: Request) -> list[tuple[str, ...]]:
    """The preparation of a suite that needs none."""
    return []


@dataclass(frozen=True)
class Suite:
    """Runs that are compared with each other.

    Args:
        title: one line for ``--help``.
        folder: name of its folder of results.
        frameworks: framework → function that lists its runs.
        sample: framework → the only methods that run where the command line picks neither framework nor runs; a
            framework that is not named here runs whole.
        options: those of the command line's options that it understands, of seeds, epochs, devices and data.
        datasets: what ``--data`` may name.
        prepare: (runs to do, request) → arguments of the ``python`` commands that go before all runs.
        report: arguments of the ``python`` command that goes after them; the folder of results is appended.
        jobs: runs at a time where the user does not say; None: one a core.
    """

    title: str
    folder: str
    frameworks: Mapping[str, Callable[[Request], list[Run]]]
    sample: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: tuple[str, ...] = ("seeds", "epochs")
    datasets: tuple[str, ...] = ()
    prepare: Callable[[Sequence[Run], Request], list[tuple[str, ...]]] = nothing
    report: tuple[str, ...] = ("-m", "plugins.experiments.report")
    jobs: Callable[[Request], int | None] = lambda request: None
