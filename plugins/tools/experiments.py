"""Runs a suite of experiments: ``python -m plugins.tools.experiments digits``.

A suite is a list of runs. A run is one method in one framework with one seed: a list of commands that follow each other
in processes of their own (pre-train, kNN, linear evaluation), and the numbers picked from what they write. Several runs
go side by side. A run that is finished (its ``result.json`` exists) is skipped, one that was interrupted goes on with
the command that was interrupted, one that fails stops no other.

This file holds no hyperparameter: those are in the YAML files that the commands name.
"""

import argparse
import contextlib
import csv
import fnmatch
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

from plugins.tools.warm import WarmProcess

THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment of every command. One thread each: two methods side by side are faster than one on two cores."""
POLL_SECONDS = 0.2
PROGRESS_SECONDS = 15.0
KILL_SECONDS = 10.0
LAST_LINES = 12


class UsageError(Exception):
    """A user's mistake, told in one sentence."""


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Args:
        out: folder of all results.
        seeds: each method runs once with each.
        epochs: of pre-training; None leaves it to the YAML.
    """

    out: Path = Path("results")
    seeds: Sequence[int] = (0,)
    epochs: int | None = None


@dataclass(frozen=True)
class Step:
    """One command of a run: a name for the log and the arguments of ``python``."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One method in one framework with one seed.

    Args:
        framework, method, dataset, seed: what it is; they go into result.json.
        folder: where it writes everything.
        steps: its commands, in order.
        collect: reads the numbers that the commands wrote: name → value, for result.json.
        needs: names of the runs that must be finished before it starts.
        epochs: epochs that the user asked for, None where the YAML decides.
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

    @property
    def name(self) -> str:
        """Its name in lists, logs and patterns."""
        return f"{self.framework}/{self.method}/seed{self.seed}"

    @property
    def result(self) -> Path:
        """The file that says that it is finished."""
        return self.folder / "result.json"

    @property
    def log(self) -> Path:
        """Where the output of its commands goes."""
        return self.folder / "log.txt"


@dataclass(frozen=True)
class Suite:
    """Runs that are compared with each other.

    Args:
        title: one line for ``--help``.
        folder: name of its folder of results.
        frameworks: framework → function that lists its runs.
        prepare: arguments of the ``python`` commands that go before all runs.
        report: arguments of the ``python`` command that goes after them; the folder of results is appended.
    """

    title: str
    folder: str
    frameworks: Mapping[str, Callable[[Request], list[Run]]]
    prepare: tuple[tuple[str, ...], ...] = ()
    report: tuple[str, ...] = ("-m", "plugins.tools.report")


# --------------------------------------------------------------------------------------- digits in solo-learn

DIGITS = Path("datasets/digits")


def solo_digits(request: Request) -> list[Run]:
    """The runs of the digits in solo-learn: every method that has a YAML there, an untrained and a supervised backbone.

    Args:
        request: folder, seeds, epochs.

    Returns:
        The runs, in the order in which they should start.
    """
    from plugins.methods import METHODS

    configs = _solo_configs("digits")
    methods = sorted(method for method in METHODS if (configs / f"{method}.yaml").is_file())
    runs = []
    for seed in request.seeds:
        runs.append(_solo_pretrained("untrained", seed, None, configs, request.out))
        runs += [_solo_pretrained(method, seed, request.epochs, configs, request.out) for method in methods]
        runs.append(_solo_supervised(seed, request.epochs, configs, request.out))
    return runs


def _solo_configs(dataset: str) -> Path:
    """Our YAML files: those of the working directory, else those that were installed with solo_ext."""
    here = Path("configs/solo") / dataset
    if here.is_dir():
        return here
    spec = importlib.util.find_spec("solo_ext")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / "configs" / dataset).is_dir():
            return Path(folder) / "configs" / dataset
    raise UsageError(f"no folder {here} here and none installed with solo_ext; run this from the checkout")


def _solo_pretrained(method: str, seed: int, epochs: int | None, configs: Path, out: Path) -> Run:
    """Pre-train, then evaluate the frozen backbone."""
    base = out / "digits" / "solo"
    folder = base / method / f"seed{seed}"
    pretrain = _solo_command(
        "main_pretrain",
        configs,
        method,
        {
            "seed": seed,
            "checkpoint.dir": base,
            "checkpoint.version": f"seed{seed}",
            "auto_resume.enabled": True,
            **_solo_data("train"),
        },
        epochs,
    )
    linear = {"seed": seed, "pretrained_feature_extractor": folder, "checkpoint.dir": folder}
    return Run(
        framework="solo",
        method=method,
        dataset="digits",
        seed=seed,
        folder=folder,
        steps=(
            Step("pretrain", pretrain),
            _solo_knn(folder, folder),
            _solo_linear("linear", configs, "linear", {**linear, "checkpoint.version": "all", **_solo_data("train")}),
            _solo_linear(
                "linear_5", configs, "linear_5", {**linear, "checkpoint.version": "five", **_solo_data("train_5")}
            ),
        ),
        collect=collect_solo,
        epochs=epochs,
    )


def _solo_supervised(seed: int, epochs: int | None, configs: Path, out: Path) -> Run:
    """Train backbone and classifier with labels, from the weights of the untrained run."""
    folder = out / "digits" / "solo" / "supervised" / f"seed{seed}"
    untrained = out / "digits" / "solo" / "untrained" / f"seed{seed}"
    start = {"seed": seed, "pretrained_feature_extractor": untrained, "checkpoint.dir": folder}
    return Run(
        framework="solo",
        method="supervised",
        dataset="digits",
        seed=seed,
        folder=folder,
        steps=(
            _solo_linear(
                "train", configs, "supervised", {**start, "checkpoint.version": "all", **_solo_data("train")}, epochs
            ),
            _solo_knn(folder / "linear" / "all", folder),
            _solo_linear(
                "train_5", configs, "supervised_5", {**start, "checkpoint.version": "five", **_solo_data("train_5")}
            ),
        ),
        collect=collect_solo,
        needs=(f"solo/untrained/seed{seed}",),
        epochs=epochs,
    )


def _solo_data(split: str) -> dict[str, Path]:
    return {"data.train_path": DIGITS / split, "data.val_path": DIGITS / "val"}


def _solo_command(
    module: str, configs: Path, name: str, overrides: Mapping[str, Any], epochs: int | None = None
) -> tuple[str, ...]:
    if epochs is not None:
        overrides = {**overrides, "max_epochs": epochs}
    return (
        *("-m", f"solo_ext.{module}", "--config-path", str(configs), "--config-name", f"{name}.yaml"),
        *(f"++{key}={_hydra_value(value)}" for key, value in overrides.items()),
    )


def _solo_linear(step: str, configs: Path, name: str, overrides: Mapping[str, Any], epochs: int | None = None) -> Step:
    return Step(step, _solo_command("main_linear", configs, name, overrides, epochs))


def _solo_knn(checkpoints: Path, folder: Path) -> Step:
    options = {
        "pretrained_checkpoint_dir": checkpoints,
        "dataset": "digits",
        "train_data_path": DIGITS / "train",
        "val_data_path": DIGITS / "val",
        "k": 20,
        "temperature": 0.07,
        "distance_function": "cosine",
        "feature_type": "backbone",
        "num_workers": 0,
        "output": folder / "knn.json",
    }
    flags = (text for key, value in options.items() for text in (f"--{key}", str(value)))
    return Step("knn", ("-m", "solo_ext.main_knn", *flags))


def _hydra_value(value: Any) -> str:
    """A value as Hydra's override grammar wants it: quoted unless it is plainly a word, a number or a path."""
    text = str(value)
    if re.fullmatch(r"[\w./+-]+", text, re.ASCII):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def collect_solo(run: Run) -> dict[str, Any]:
    """The numbers of a run in solo-learn, from knn.json, linear.json and pretrain.json in its folder.

    Args:
        run: a run whose commands have all succeeded.

    Returns:
        What result.json says beside the identity of the run. Accuracies are those of the last epoch: taking the best
        epoch would be choosing on the validation labels.
    """
    linear = _read_json(run.folder / "linear" / "all" / "linear.json")
    pretrain = run.folder / "pretrain.json"
    training = _read_json(pretrain) if pretrain.is_file() else linear
    return {
        "epochs": training.get("epochs"),
        "knn": _read_json(run.folder / "knn.json")[0]["acc1"],
        "linear": linear["acc1"],
        "linear_5": _read_json(run.folder / "linear" / "five" / "linear.json")["acc1"],
        "images_per_second": training.get("images_per_second"),
        "seconds": training.get("seconds"),
        "versions": training.get("versions"),
        "config": training.get("config"),
    }


SUITES: dict[str, Suite] = {
    "digits": Suite(
        title="every method on 1797 real handwritten digits, beside an untrained and a supervised backbone",
        folder="digits",
        frameworks={"solo": solo_digits},
        prepare=(("-m", "plugins.tools.data", "digits", "--out", str(DIGITS)),),
    ),
}


# ----------------------------------------------------------------------------------------------------- running


@dataclass
class Job:
    """A run that is in progress."""

    run: Run
    remaining: list[Step]
    started: float
    step_started: float = 0.0
    process: "subprocess.Popen[bytes] | WarmProcess | None" = None
    log: IO[bytes] | None = None


@dataclass
class Outcome:
    """What became of the runs: their names, and why some failed."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


class Runner:
    """Runs the commands of many runs, several runs side by side.

    Args:
        runs: what to run; a run waits for those that it needs.
        jobs: how many at a time.
        say: prints a line.
    """

    def __init__(self, runs: Sequence[Run], *, jobs: int, say: Callable[[str], None] = print) -> None:
        self.waiting = list(runs)
        self.total = len(self.waiting)
        self.jobs = jobs
        self.say = say
        self.active: list[Job] = []
        self.outcome = Outcome()
        self.began = time.monotonic()

    def go(self) -> Outcome:
        """Run everything. On an interrupt the processes are ended first, then it is passed on."""
        spoken = time.monotonic()
        try:
            while self.waiting or self.active:
                self._start()
                self._advance()
                if time.monotonic() - spoken >= PROGRESS_SECONDS and self.active:
                    spoken = time.monotonic()
                    self.say(self._progress())
                if self.active:
                    time.sleep(POLL_SECONDS)
        finally:
            self._end_processes()
        return self.outcome

    def _start(self) -> None:
        """Start runs while there are free places."""
        for run in list(self.waiting):
            broken = [name for name in run.needs if name in self.outcome.failed]
            if broken:
                self.waiting.remove(run)
                self._fail(run, f"not started: it needs {broken[0]}, which failed")
                continue
            ahead = {other.name for other in self.waiting} | {job.run.name for job in self.active}
            if len(self.active) >= self.jobs or any(name in ahead for name in run.needs):
                continue
            self.waiting.remove(run)
            try:
                remaining = _remaining_steps(run)
            except UsageError as error:
                self._fail(run, str(error))
                continue
            self.active.append(Job(run, remaining, started=time.monotonic()))

    def _advance(self) -> None:
        """Look at each process that runs; start the next command, or finish the run."""
        for job in list(self.active):
            if job.process is not None:
                status = job.process.poll()
                if status is None:
                    continue
                self._close(job)
                step = job.remaining.pop(0)
                took = _clock(time.monotonic() - job.step_started)
                if status != 0:
                    how = f"status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"
                    self.active.remove(job)
                    self._fail(job.run, f"{step.name} ended with {how} after {took}", log=True)
                    continue
                _note_step(job.run, step, seconds=time.monotonic() - job.step_started)
            if job.remaining:
                self._launch(job)
            else:
                self.active.remove(job)
                self._finish(job)

    def _launch(self, job: Job) -> None:
        step = job.remaining[0]
        job.run.folder.mkdir(parents=True, exist_ok=True)
        _note_step(job.run, step, seconds=None)
        job.log = job.run.log.open("ab")
        job.log.write(f"\n# {time.strftime('%Y-%m-%d %H:%M:%S')} {step.name}\n# {shell(step.arguments)}\n".encode())
        job.log.flush()
        job.step_started = time.monotonic()
        # A session of its own, so that the whole family of the command can be ended, data loaders included.
        job.process = _start(step.arguments, job.log)
        self.say(f"{self._elapsed()}  {job.run.name}: {step.name}")

    def _finish(self, job: Job) -> None:
        run = job.run
        try:
            numbers = run.collect(run)
            result = {
                "framework": run.framework,
                "method": run.method,
                "dataset": run.dataset,
                "seed": run.seed,
                **numbers,
                "step_seconds": {name: step["seconds"] for name, step in _read_steps(run).items()},
            }
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            self._fail(run, f"its commands succeeded, but their output is not as expected: {error!r}", log=True)
            return
        _write_json(run.result, result)
        self.outcome.finished.append(run.name)
        self.outcome.seconds.append(time.monotonic() - job.started)
        scores = ", ".join(
            f"{name} {result[key]:.1f}"
            for name, key in (("kNN", "knn"), ("linear", "linear"), ("5 labels", "linear_5"))
            if isinstance(result.get(key), int | float)
        )
        done = len(self.outcome.finished) + len(self.outcome.failed)
        took = _clock(time.monotonic() - job.started)
        self.say(
            f"{self._elapsed()}  {run.name}: finished in {took} ({done} of {self.total}){scores and ': ' + scores}"
        )

    def _fail(self, run: Run, why: str, *, log: bool = False) -> None:
        self.outcome.failed[run.name] = why
        self.say(f"{self._elapsed()}  {run.name}: FAILED: {why}")
        if log:
            self.say(f"    log: {run.log}; it ends with")
            for line in _last_lines(run.log):
                self.say(f"    | {line}")

    def _progress(self) -> str:
        states = []
        for job in self.active:
            epoch = self._epoch(job)
            step = job.remaining[0].name if job.remaining else ""
            states.append(f"{job.run.name} {step}" + (f" epoch {epoch[0]}/{epoch[1]}" if epoch else ""))
        done = len(self.outcome.finished) + len(self.outcome.failed)
        left = self._seconds_left()
        eta = f", about {_clock(left)} left" if left is not None else ""
        return f"{self._elapsed()}  {done} of {self.total} done{eta} | {' | '.join(states)}"

    def _epoch(self, job: Job) -> tuple[int, int] | None:
        return read_epoch(job.run.folder) if job.remaining and job.remaining[0].name == "pretrain" else None

    def _seconds_left(self) -> float | None:
        """From the mean time of the finished runs, else from how far the present ones have come in pre-training."""
        now = time.monotonic()
        expected = list(self.outcome.seconds)
        if not expected:
            for job in self.active:
                epoch = self._epoch(job)
                if epoch and 0 < epoch[0] < epoch[1]:
                    expected.append((now - job.started) * epoch[1] / epoch[0])
        if not expected:
            return None
        mean = sum(expected) / len(expected)
        work = mean * len(self.waiting) + sum(max(mean - (now - job.started), 0) for job in self.active)
        return work / min(self.jobs, max(len(self.waiting) + len(self.active), 1))

    def _elapsed(self) -> str:
        return _clock(time.monotonic() - self.began)

    def _close(self, job: Job) -> None:
        if job.log is not None:
            job.log.close()
        job.process = job.log = None

    def _end_processes(self) -> None:
        """Ask every process to end, then end those that did not, at once on a second interrupt."""
        processes = [job.process for job in self.active if job.process is not None]
        try:
            for process in processes:
                _signal_family(process, signal.SIGTERM)
            deadline = time.monotonic() + KILL_SECONDS
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired, TimeoutError):
                    process.wait(max(deadline - time.monotonic(), 0.1))
        finally:
            for process in processes:
                _signal_family(process, signal.SIGKILL)
                process.wait()
        for job in self.active:
            self._close(job)


def _start(arguments: Sequence[str], log: IO[bytes]) -> "subprocess.Popen[bytes] | WarmProcess":
    """Start a ``python`` command in a session of its own, so that its whole family can be ended, data loaders included.

    Our own modules start warm, which spares each of them the import of torch and the framework.
    """
    environment = {**THREADS, "PYTHONUNBUFFERED": "1"}
    if arguments[0] == "-m" and arguments[1].startswith("solo_ext."):
        return WarmProcess(arguments, log, environment)
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def _signal_family(process: "subprocess.Popen[bytes] | WarmProcess", number: signal.Signals) -> None:
    """Send a signal to a command and all that it started; its process group has its own number."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _read_steps(run: Run) -> dict[str, Any]:
    file = run.folder / "steps.json"
    return _read_json(file) if file.is_file() else {}


def _note_step(run: Run, step: Step, *, seconds: float | None) -> None:
    """Write down that a command has started (no seconds) or has succeeded."""
    took = None if seconds is None else round(seconds, 1)
    _write_json(
        run.folder / "steps.json", {**_read_steps(run), step.name: {"arguments": step.arguments, "seconds": took}}
    )


def _remaining_steps(run: Run) -> list[Step]:
    """The commands that have not yet succeeded.

    Raises:
        UsageError: the folder holds the beginning of the same run with other arguments; going on would mix the two.
    """
    notes = _read_steps(run)
    first = run.steps[0]
    if first.name in notes and tuple(notes[first.name]["arguments"]) != first.arguments:
        raise UsageError(
            f"{run.folder} holds an unfinished run that was started with other settings; delete it to start again"
        )
    for index, step in enumerate(run.steps):
        note = notes.get(step.name, {"arguments": (), "seconds": None})
        if note["seconds"] is None or tuple(note["arguments"]) != step.arguments:
            return list(run.steps[index:])
    return []


def read_epoch(folder: Path) -> tuple[int, int] | None:
    """How far the pre-training in a folder has come.

    Args:
        folder: of the run, with Lightning's metrics.csv and solo-learn's args.json.

    Returns:
        Finished epochs and epochs in all; None where either is not known yet.
    """
    try:
        total = int(_read_json(folder / "args.json")["max_epochs"])
        with (folder / "metrics.csv").open(newline="") as file:
            epochs = [float(row["epoch"]) for row in csv.DictReader(file) if row.get("epoch")]
        return int(max(epochs)) + 1, total
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def _write_json(file: Path, content: Any) -> None:
    scratch = file.with_name(f".{file.name}.tmp")
    scratch.write_text(json.dumps(content, indent=2) + "\n")
    scratch.replace(file)


def _last_lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").rstrip().splitlines()[-LAST_LINES:]
    except OSError:
        return []


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


# ------------------------------------------------------------------------------------------------ command line


def shell(arguments: Sequence[str]) -> str:
    """A command as it can be pasted into a shell."""
    return (
        " ".join(f"{name}={value}" for name, value in THREADS.items()) + " " + shlex.join([sys.executable, *arguments])
    )


def select(runs: Sequence[Run], pattern: str | None) -> list[Run]:
    """The runs whose name holds a pattern, and those that they need.

    Args:
        runs: of the suite.
        pattern: part of a name, ``*`` and ``?`` as in a shell; None selects all.

    Returns:
        The selected runs in their order.

    Raises:
        UsageError: there are none.
    """
    if pattern is None:
        return list(runs)
    chosen = {run.name for run in runs if fnmatch.fnmatchcase(run.name, f"*{pattern}*")}
    if not chosen:
        raise UsageError(f"--only {pattern} matches none of the runs: {', '.join(run.name for run in runs)}")
    needed = {name for run in runs if run.name in chosen and not run.result.is_file() for name in run.needs}
    return [run for run in runs if run.name in chosen | needed]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; needs nothing but the standard library.

    Raises:
        UsageError: it is wrong.
    """
    parser = _Parser(
        prog="python -m plugins.tools.experiments",
        description="Run a suite of experiments. Finished runs are skipped, interrupted ones go on.",
        epilog="suites: " + "; ".join(f"{name}: {suite.title}" for name, suite in SUITES.items()),
        allow_abbrev=False,
    )
    parser.add_argument("suite", metavar="SUITE", help=f"one of {', '.join(SUITES)}")
    parser.add_argument("--framework", metavar="NAME", help="only the runs of this framework (default: all)")
    parser.add_argument("--only", metavar="PATTERN", help="only runs with this in their name; * and ? as in a shell")
    parser.add_argument("--seeds", type=_positive, default=1, metavar="N", help="seeds 0 to N-1 (default: 1)")
    parser.add_argument("--epochs", type=_positive, metavar="N", help="epochs of pre-training instead of the YAML's")
    parser.add_argument("--jobs", type=_positive, default=_cores(), metavar="N", help="runs at a time (default: cores)")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="FOLDER", help="(default: results)")
    parser.add_argument("--list", action="store_true", help="name the runs and stop")
    parser.add_argument("--dry-run", action="store_true", help="print the exact commands and stop")
    parser.add_argument("--check", action="store_true", help="check this command line and stop")
    options = parser.parse_args(argv)
    if options.suite not in SUITES:
        raise UsageError(f"unknown suite {options.suite!r}; the suites are: {', '.join(SUITES)}")
    frameworks = SUITES[options.suite].frameworks
    if options.framework is not None and options.framework not in frameworks:
        raise UsageError(
            f"suite {options.suite} has no framework {options.framework!r}; it has: {', '.join(frameworks)}"
        )
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_suite(options: argparse.Namespace) -> int:
    """Do what a command line asks for.

    Returns:
        The exit status: 1 where a run or the report failed.

    Raises:
        UsageError: the selection is empty.
    """
    suite = SUITES[options.suite]
    request = Request(out=options.out, seeds=range(options.seeds), epochs=options.epochs)
    frameworks = [options.framework] if options.framework else list(suite.frameworks)
    runs = select([run for name in frameworks for run in suite.frameworks[name](request)], options.only)
    if options.list:
        width = max(len(run.name) for run in runs)
        for run in runs:
            print(f"{run.name:{width}}  {'finished' if run.result.is_file() else 'to do'}")
        return 0
    to_do = [run for run in runs if not run.result.is_file()]
    results = options.out / suite.folder
    report = (*suite.report, str(results))
    if options.dry_run:
        _print_commands(suite, runs, report)
        return 0
    for run in runs:
        if run.result.is_file():
            print(_skipped(run), flush=True)
    status = 0
    if to_do:
        for arguments in suite.prepare:
            if _call(arguments) != 0:
                print(f"error: preparation failed, nothing was run: {shell(arguments)}", file=sys.stderr)
                return 1
        jobs = min(options.jobs, len(to_do))
        print(
            f"{len(to_do)} runs, {jobs} at a time; logs in {results}/<framework>/<method>/seed<n>/log.txt", flush=True
        )
        outcome = Runner(to_do, jobs=jobs, say=lambda line: print(line, flush=True)).go()
        status = 1 if outcome.failed else 0
    if _call(report) != 0:
        print(f"error: the report failed: {shell(report)}", file=sys.stderr)
        status = 1
    if to_do:
        _summarise(outcome, {run.name: run for run in to_do})
    return status


def _print_commands(suite: Suite, runs: Sequence[Run], report: Sequence[str]) -> None:
    for arguments in suite.prepare:
        print(shell(arguments))
    for run in runs:
        if run.result.is_file():
            print(f"# {_skipped(run)}")
            continue
        print(f"# {run.name}")
        for step in run.steps:
            print(shell(step.arguments))
    print("# report")
    print(shell(report))


def _skipped(run: Run) -> str:
    epochs = _read_json(run.result).get("epochs")
    if run.epochs is not None and epochs != run.epochs:
        return (
            f"{run.name}: skipped, finished with {epochs} epochs, not {run.epochs}; delete {run.folder} to run it again"
        )
    return f"{run.name}: skipped, finished before ({run.result})"


def _summarise(outcome: Outcome, runs: Mapping[str, Run]) -> None:
    print(f"{len(outcome.finished)} runs finished, {len(outcome.failed)} failed", flush=True)
    for name, why in outcome.failed.items():
        print(f"failed: {name}: {why}; log: {runs[name].log}", file=sys.stderr, flush=True)


def _call(arguments: Sequence[str]) -> int:
    """Run a command in the foreground."""
    return subprocess.run([sys.executable, *arguments], env={**os.environ, **THREADS}, check=False).returncode


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 1 (a run failed), 2 (a user's mistake) or 130 (interrupted)."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        options = parse(argv)
        return 0 if options.check else run_suite(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, the same command goes on with the others", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
