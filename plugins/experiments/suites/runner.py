"""Execution of the commands of many runs, several runs at a time.

An interrupted run continues with the command that was interrupted. A failed run does not stop the others. A finished
run leaves a ``result.json``.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from plugins.experiments.suites import Progress, Run, Step
from plugins.experiments.warm import WarmProcess
from plugins.tools.command import UserError
from plugins.tools.process import hold_folder
from plugins.tools.records import read_json, write_json

THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment of every command. On two cores, two methods with one thread each are faster than one with two threads."""
ENVIRONMENT = {**THREADS, "PYTHONUNBUFFERED": "1"}
POLL_SECONDS = 0.2
TABLE_SECONDS = 1.0
"""Time between two updates of the live table."""
PROGRESS_SECONDS = 15.0
"""Time between two plain lines of progress."""
KILL_SECONDS = 10.0
LAST_LINES = 12
RUN_LOCK = ".run-lock"
"""The file in a run's folder that is locked while its commands are executed, by a suite or by a job of a cluster."""
FAILURE = "failed.json"
"""The file in a run's folder with the reason why its last execution failed; deleted when the run starts again."""


def shell(arguments: Sequence[str]) -> str:
    """Format a command so that it can be pasted into a shell."""
    return (
        " ".join(f"{name}={value}" for name, value in THREADS.items()) + " " + shlex.join([sys.executable, *arguments])
    )


@dataclass
class Job:
    """An active run."""

    run: Run
    remaining: list[Step]
    started: float
    step_started: float = 0.0
    process: "subprocess.Popen[bytes] | WarmProcess | None" = None
    log: IO[bytes] | None = None
    lock: IO[str] | None = None


@dataclass
class Outcome:
    """Names of the finished runs, failed and skipped runs with the reason, and the durations of the finished ones.

    A run is skipped if another process executes it.
    """

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Status:
    """State of a run, as a row of the live table shows it.

    Args:
        name: name of the run.
        state: ``waiting``, ``finished``, ``failed``, ``skipped``, or the name of the active step.
        progress: progress of the pre-training; None if it is not known.
        seconds: seconds since the start of the run; None if it has not started.
        eta: remaining seconds of the pre-training; None if they are not known.
        detail: scores of a finished run, reason and log of a failed one.
    """

    name: str
    state: str = "waiting"
    progress: Progress | None = None
    seconds: float | None = None
    eta: float | None = None
    detail: str = ""


class Runner:
    """Execute the commands of many runs, several runs at a time.

    Args:
        runs: the runs; a run waits for those that it needs.
        jobs: maximal number of active runs.
        report_line: prints a line.
        show: draws the state of all runs below a title, every ``TABLE_SECONDS``. If it is given, ``report_line``
            receives failures only.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        *,
        jobs: int,
        report_line: Callable[[str], None] = print,
        show: Callable[[Sequence[Status], str], None] | None = None,
    ) -> None:
        self.waiting = list(runs)
        self.total = len(self.waiting)
        self.jobs = jobs
        self.report_line = report_line
        self.show = show
        self.statuses = {run.name: Status(run.name) for run in runs}
        self.active: list[Job] = []
        self.outcome = Outcome()
        self.began = time.monotonic()

    def go(self) -> Outcome:
        """Execute all runs. On an interrupt, terminate the processes and raise the interrupt again."""
        reported = time.monotonic()
        try:
            while self.waiting or self.active:
                self._start()
                self._advance()
                now = time.monotonic()
                # for runs that take days, a plain line every 15 seconds would be too many
                interval = TABLE_SECONDS if self.show else max(PROGRESS_SECONDS, (now - self.began) / 60)
                if now - reported >= interval and self.active:
                    reported = now
                    self._report_progress()
                if self.active:
                    time.sleep(POLL_SECONDS)
        finally:
            self._end_processes()
        return self.outcome

    def _start(self) -> None:
        """Start waiting runs until the maximal number is active."""
        for run in list(self.waiting):
            broken = {
                **dict.fromkeys(self.outcome.failed, "failed"),
                **dict.fromkeys(self.outcome.skipped, "is skipped"),
            }
            needed = next((name for name in run.needs if name in broken), None)
            if needed is not None:
                self.waiting.remove(run)
                self._fail(run, f"not started: it needs {needed}, which {broken[needed]}")
                continue
            ahead = {other.name for other in self.waiting} | {job.run.name for job in self.active}
            if len(self.active) >= self.jobs or any(name in ahead for name in run.needs):
                continue
            self.waiting.remove(run)
            try:
                lock = hold_folder(run.folder, RUN_LOCK)
            except UserError as error:
                self._skip(run, str(error))
                continue
            except OSError as error:
                self._fail(run, f"{run.folder} cannot be written: {error.strerror}")
                continue
            if run.result.is_file():  # another process has finished it since the runs were listed
                lock.close()
                self._skip(run, f"finished before ({run.result})")
                continue
            try:
                remaining = _remaining_steps(run)
            except UserError as error:
                lock.close()
                self._fail(run, str(error))
                continue
            (run.folder / FAILURE).unlink(missing_ok=True)
            self.active.append(Job(run, remaining, started=time.monotonic(), lock=lock))

    def _advance(self) -> None:
        """Poll the processes; when one has ended, start the next command of its run, or finish the run."""
        for job in list(self.active):
            if job.process is not None:
                status = job.process.poll()
                if status is None:
                    continue
                self._close(job)
                step = job.remaining.pop(0)
                took = clock(time.monotonic() - job.step_started)
                if status != 0:
                    how = f"status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"
                    self.active.remove(job)
                    self._fail(job.run, f"{step.name} ended with {how} after {took}", log=True)
                    self._release(job)
                    continue
                _note_step(job.run, step, seconds=time.monotonic() - job.step_started)
            if job.remaining:
                self._launch(job)
            else:
                self.active.remove(job)
                self._finish(job)
                self._release(job)

    def _launch(self, job: Job) -> None:
        step = job.remaining[0]
        job.run.folder.mkdir(parents=True, exist_ok=True)
        _note_step(job.run, step, seconds=None)
        job.log = job.run.log.open("ab")
        job.log.write(f"\n# {time.strftime('%Y-%m-%d %H:%M:%S')} {step.name}\n# {shell(step.arguments)}\n".encode())
        job.log.flush()
        job.step_started = time.monotonic()
        job.process = _start(step.arguments, job.log)
        self._report_event(f"{job.run.name}: {step.name}")

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
            self._fail(run, f"the commands succeeded, but their output files are invalid: {error!r}", log=True)
            return
        write_json(run.result, result)
        self.outcome.finished.append(run.name)
        self.outcome.seconds.append(time.monotonic() - job.started)
        scores = format_scores(result)
        done = len(self.outcome.finished) + len(self.outcome.failed)
        seconds = time.monotonic() - job.started
        progress = run.progress(run.folder)
        self.statuses[run.name] = Status(run.name, "finished", progress=progress, seconds=seconds, detail=scores)
        self._report_event(
            f"{run.name}: finished in {clock(seconds)} ({done} of {self.total}){scores and ': ' + scores}"
        )

    def _fail(self, run: Run, why: str, *, log: bool = False) -> None:
        self.outcome.failed[run.name] = why
        detail = f"log: {run.log}" if log else why
        self.statuses[run.name] = replace(self.statuses[run.name], state="failed", eta=None, detail=detail)
        self.report_line(f"{self._elapsed()}  {run.name}: FAILED: {why}")
        if log:
            write_json(run.folder / FAILURE, {"reason": why})
            self.report_line(f"    log: {run.log}; last lines:")
            for line in _last_lines(run.log):
                self.report_line(f"    | {line}")

    def _skip(self, run: Run, why: str) -> None:
        self.outcome.skipped[run.name] = why
        self.statuses[run.name] = Status(run.name, "skipped", detail=why)
        self.report_line(f"{self._elapsed()}  {run.name}: skipped: {why}")

    def _report_event(self, text: str) -> None:
        """Print a line on a run, or update the live table."""
        if self.show is None:
            self.report_line(f"{self._elapsed()}  {text}")
        else:
            self._report_progress()

    def _report_progress(self) -> None:
        if self.show is None:
            self.report_line(f"{self._summary()} | {' | '.join(self._active_steps())}")
            return
        for job in self.active:
            self.statuses[job.run.name] = self._status(job)
        self.show(list(self.statuses.values()), self._summary())

    def _status(self, job: Job) -> Status:
        """Read the state of an active run."""
        now = time.monotonic()
        epoch = self._epoch(job)
        return Status(
            job.run.name,
            state=job.remaining[0].name if job.remaining else "starting",
            progress=job.run.progress(job.run.folder),
            seconds=now - job.started,
            eta=(now - job.step_started) * (epoch.epochs / epoch.epoch - 1) if epoch and epoch.epoch else None,
        )

    def _active_steps(self) -> list[str]:
        states = []
        for job in self.active:
            epoch = self._epoch(job)
            step = job.remaining[0].name if job.remaining else ""
            states.append(f"{job.run.name} {step}" + (f" epoch {epoch.epoch}/{epoch.epochs}" if epoch else ""))
        return states

    def _summary(self) -> str:
        """Format the elapsed time, the number of completed runs and the remaining time."""
        done = len(self.outcome.finished) + len(self.outcome.failed) + len(self.outcome.skipped)
        left = self._seconds_left()
        eta = f", about {clock(left)} left" if left is not None else ""
        return f"{self._elapsed()}  {done} of {self.total} done{eta}"

    def _epoch(self, job: Job) -> Progress | None:
        """Read the progress of a run whose pre-training is active."""
        return job.run.progress(job.run.folder) if job.remaining and job.remaining[0].name == "pretrain" else None

    def _seconds_left(self) -> float | None:
        """Estimate the remaining time from the finished runs, or from the pre-training of the active ones."""
        now = time.monotonic()
        expected = list(self.outcome.seconds)
        if not expected:
            for job in self.active:
                epoch = self._epoch(job)
                if epoch and 0 < epoch.epoch < epoch.epochs:
                    expected.append((now - job.started) * epoch.epochs / epoch.epoch)
        if not expected:
            return None
        mean = sum(expected) / len(expected)
        work = mean * len(self.waiting) + sum(max(mean - (now - job.started), 0) for job in self.active)
        return work / min(self.jobs, max(len(self.waiting) + len(self.active), 1))

    def _elapsed(self) -> str:
        return clock(time.monotonic() - self.began)

    def _release(self, job: Job) -> None:
        if job.lock is not None:
            job.lock.close()

    def _close(self, job: Job) -> None:
        if job.log is not None:
            job.log.close()
        job.process = job.log = None

    def _end_processes(self) -> None:
        """Send SIGTERM to all processes, then SIGKILL to those that have not ended; at once on a second interrupt."""
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
            self._release(job)


def is_warm(arguments: Sequence[str]) -> bool:
    """Return whether a command is forked from the server process that has already imported torch and its framework."""
    return arguments[0] == "-m" and arguments[1].startswith(
        ("solo_ext.", "lightly_ext.", "vissl_ext.", "plugins.tools.")
    )


def _start(arguments: Sequence[str], log: IO[bytes]) -> "subprocess.Popen[bytes] | WarmProcess":
    """Start a ``python`` command in a new session, so that a signal reaches all its children, such as data loaders.

    Commands of the adapters and tools are forked from a process that has already imported torch and the framework.
    """
    if is_warm(arguments):
        return WarmProcess(arguments, log, ENVIRONMENT)
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **ENVIRONMENT},
        start_new_session=True,
    )


def _signal_family(process: "subprocess.Popen[bytes] | WarmProcess", number: signal.Signals) -> None:
    """Send a signal to the process group of a command."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _read_steps(run: Run) -> dict[str, Any]:
    file = run.folder / "steps.json"
    return read_json(file) if file.is_file() else {}


def _note_step(run: Run, step: Step, *, seconds: float | None) -> None:
    """Record in steps.json that a command has started (``seconds`` is None) or succeeded."""
    took = None if seconds is None else round(seconds, 1)
    write_json(
        run.folder / "steps.json", {**_read_steps(run), step.name: {"arguments": step.arguments, "seconds": took}}
    )


def _remaining_steps(run: Run) -> list[Step]:
    """List the commands that have not succeeded yet.

    Raises:
        UserError: the folder contains an unfinished run with other arguments.
    """
    notes = _read_steps(run)
    first = run.steps[0]
    if first.name in notes and tuple(notes[first.name]["arguments"]) != first.arguments:
        raise UserError(
            f"{run.folder} contains an unfinished run that was started with other settings; delete it to start again"
        )
    for index, step in enumerate(run.steps):
        note = notes.get(step.name, {"arguments": (), "seconds": None})
        if note["seconds"] is None or tuple(note["arguments"]) != step.arguments:
            return list(run.steps[index:])
    return []


def format_scores(result: Mapping[str, Any]) -> str:
    """Format the accuracies in a result.json, in per cent.

    >>> format_scores({"knn": 92.44, "linear": None})
    'kNN 92.4'
    """
    titles = {"online": "online", "knn": "kNN", "linear": "linear", "linear_5": "5 labels"}
    found = {title: result.get(key) for key, title in titles.items()}
    return ", ".join(f"{title} {value:.1f}" for title, value in found.items() if isinstance(value, int | float))


def _last_lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").rstrip().splitlines()[-LAST_LINES:]
    except OSError:
        return []


def clock(seconds: float) -> str:
    """Format a duration as ``m:ss`` or ``h:mm:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
