"""Runs the commands of many runs, several runs side by side.

A run that was interrupted goes on with the command that was interrupted, one that fails stops no other, and one that is
finished leaves a ``result.json``.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from plugins.experiments.suites import Run, Step
from plugins.experiments.warm import WarmProcess
from plugins.tools.command import UserError
from plugins.tools.records import read_json, write_json

THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment of every command. One thread each: two methods side by side are faster than one on two cores."""
POLL_SECONDS = 0.2
PROGRESS_SECONDS = 15.0
KILL_SECONDS = 10.0
LAST_LINES = 12


def shell(arguments: Sequence[str]) -> str:
    """A command as it can be pasted into a shell."""
    return (
        " ".join(f"{name}={value}" for name, value in THREADS.items()) + " " + shlex.join([sys.executable, *arguments])
    )


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
                now = time.monotonic()
                # runs of days need no line every quarter of a minute
                if now - spoken >= max(PROGRESS_SECONDS, (now - self.began) / 60) and self.active:
                    spoken = now
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
            except UserError as error:
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
        write_json(run.result, result)
        self.outcome.finished.append(run.name)
        self.outcome.seconds.append(time.monotonic() - job.started)
        scores = ", ".join(
            f"{name} {result[key]:.1f}"
            for name, key in (("online", "online"), ("kNN", "knn"), ("linear", "linear"), ("5 labels", "linear_5"))
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
        return job.run.progress(job.run.folder) if job.remaining and job.remaining[0].name == "pretrain" else None

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
    if arguments[0] == "-m" and arguments[1].startswith(("solo_ext.", "lightly_ext.", "vissl_ext.")):
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
    return read_json(file) if file.is_file() else {}


def _note_step(run: Run, step: Step, *, seconds: float | None) -> None:
    """Write down that a command has started (no seconds) or has succeeded."""
    took = None if seconds is None else round(seconds, 1)
    write_json(
        run.folder / "steps.json", {**_read_steps(run), step.name: {"arguments": step.arguments, "seconds": took}}
    )


def _remaining_steps(run: Run) -> list[Step]:
    """The commands that have not yet succeeded.

    Raises:
        UserError: the folder holds the beginning of the same run with other arguments; going on would mix the two.
    """
    notes = _read_steps(run)
    first = run.steps[0]
    if first.name in notes and tuple(notes[first.name]["arguments"]) != first.arguments:
        raise UserError(
            f"{run.folder} holds an unfinished run that was started with other settings; delete it to start again"
        )
    for index, step in enumerate(run.steps):
        note = notes.get(step.name, {"arguments": (), "seconds": None})
        if note["seconds"] is None or tuple(note["arguments"]) != step.arguments:
            return list(run.steps[index:])
    return []


def _last_lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").rstrip().splitlines()[-LAST_LINES:]
    except OSError:
        return []


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
